"""Reinforcement learning with verifiable rewards: from a checkpoint to a policy's checkpoint (`train.run`).

    OUT/transcripts/    sample answers with their rewards, at intervals

A step asks each of its prompts several times, rewards the answers, and learns from how they compare within their group.
The paper trains two policies from one start in this way, one for accuracy at high effort and one for short answers at
mixed efforts, and averages their weights (`train.average.weights`).

Left out: sampling that runs ahead of learning, and tool use.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate.accuracy import answer_questions
from puzzle_jax.evaluate.statistics import by_effort
from puzzle_jax.generate.batches import micro_batches as trace_batches
from puzzle_jax.generate.calibrate import calibrate_cache
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.sharding import generation_mesh, on_mesh
from puzzle_jax.model.spec import Params
from puzzle_jax.processes.distributed import primary_console
from puzzle_jax.train.checkpoints import abstract_state
from puzzle_jax.train.distill.objectives import Fixed
from puzzle_jax.train.grpo import policy_batches
from puzzle_jax.train.grpo.inputs import GrpoInputs
from puzzle_jax.train.grpo.metrics import RunningReward, passes, rollout_metrics
from puzzle_jax.train.grpo.notes import Notes
from puzzle_jax.train.grpo.policy import MAXIMUM, Policy
from puzzle_jax.train.grpo.policy_update import PolicyUpdate
from puzzle_jax.train.grpo.primary_rewards import PrimaryRewards
from puzzle_jax.train.grpo.prompts import NothingToAsk, Prompt
from puzzle_jax.train.grpo.recipe import GrpoRecipe
from puzzle_jax.train.grpo.rollouts import Rollout, Sampler
from puzzle_jax.train.grpo.shared_rows import shared_rows
from puzzle_jax.train.grpo.transcripts import StepTranscripts
from puzzle_jax.train.loop import EVALUATION, Job, Trained, open_checkpoints
from puzzle_jax.train.placement import on_host
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.run import CALIBRATION_ANSWERS, CHILD, Run, agreed_inputs, open_placement, report
from puzzle_jax.train.step import TrainState

TRANSCRIPTS = "transcripts"


class RewardCollapse(PuzzleError):
    """The running reward fell far below its best value."""


def grpo(recipe: GrpoRecipe, console: Console) -> Trained:
    """Trains a policy and writes it; on a signal it saves and returns early, without a checkpoint in Hugging Face form.

    Raises PuzzleError, before weights are read and anything is written, for invalid inputs and where `recipe.out` holds
    something else. `RewardCollapse` is raised after the best policy was written.
    """
    console = primary_console(console)
    inputs = agreed_inputs(recipe, partial(GrpoInputs.open, recipe))
    with PrimaryRewards(recipe.reward) as rewards:
        return Trainer(inputs, open_placement(inputs), console, rewards).train()


@dataclass
class Trainer(Run[GrpoInputs]):
    """A run of reinforcement learning."""

    rewards: PrimaryRewards

    def __post_init__(self) -> None:
        monitoring = self.recipe.monitoring
        self.running = RunningReward(monitoring.collapse, monitoring.collapse_steps)
        directory = self.recipe.out / TRANSCRIPTS
        self.shown = StepTranscripts(directory, monitoring.transcripts, monitoring.transcript_groups)
        self.prompts = self.inputs.prompts()
        self.notes = Notes(self.inputs, self.console)
        self.answered: tuple[int, list[Trace]] | None = None

    @property
    def recipe(self) -> GrpoRecipe:
        return self.inputs.recipe

    def train(self) -> Trained:
        try:
            return super().train()
        except RewardCollapse:
            self.export_state(self.best())
            report(self.recipe.out, self.console)
            raise

    # Parts of the job ----------------------------------------------------------------------------------------------

    @cached_property
    def sampler(self) -> Sampler:
        inputs, rollout = self.inputs, self.recipe.rollout
        return Sampler(
            student=self.student,
            chat=inputs.model.chat,
            rewards=self.rewards,
            group=rollout.group,
            max_tokens=inputs.limits,
            slots=rollout.slots,
            seed=self.recipe.seed,
            experts=rollout.replay,
            cache=inputs.cache,
            mesh=self.generation_mesh,
        )

    @cached_property
    def generation_mesh(self) -> Mesh | None:
        """The sampler's mesh."""
        return None if self.placement.mesh is None else generation_mesh(self.placement.mesh)

    @cached_property
    def update(self) -> PolicyUpdate:
        update = self.recipe.update
        policy = Policy(self.student, self.inputs.loss, update.token_chunk, update.vocab_chunk, self.recipe.strip)
        return PolicyUpdate(policy, self.optimizer, self.shardings, self.placement.mesh)

    def job(self) -> Job:
        return Job(
            initial=self.initial,
            step=self.step,
            fixed=Fixed(self.base),
            batches=self,
            identity=self.inputs.identity,
            evaluate=self.measure,
            best="error",
            name="reinforcement learning",
            ahead=False,
        )

    # The stream of prompts; its state holds everything that steps carry over besides the parameters ------------------

    def __next__(self) -> list[Prompt]:
        return self._draw(self.recipe.prompts.prompts)

    def _draw(self, count: int) -> list[Prompt]:
        try:
            return self.prompts.draw(count)
        except NothingToAsk as error:
            raise NothingToAsk(f"{error}{self.notes.threshold.advice}") from None

    def get_state(self) -> dict[str, object]:
        return {"prompts": self.prompts.get_state(), "rewards": self.running.get_state()}

    def set_state(self, state: Any, /) -> None:
        self.prompts.set_state(state["prompts"])
        self.running.set_state(state["rewards"])

    # A step --------------------------------------------------------------------------------------------------------

    def step(self, state: TrainState, fixed: Fixed, prompts: list[Prompt]) -> tuple[TrainState, dict[str, float]]:
        """Asks the prompts, rewards the answers, and learns from them.

        Raises RewardCollapse, and PuzzleError when there is nothing left to ask.
        """
        number = int(state.step) + 1
        self.shown.begin(number)
        groups, seconds = self._answers(state.params, fixed, prompts, number)
        metrics = rollout_metrics(groups, self.recipe.reward.pass_threshold) | seconds
        metrics["passed_over"] = float(self.prompts.too_long)
        self.notes.step(number, groups, self.prompts)
        state, learnt = self._learn(state, fixed, policy_batches.learnable(groups, self.inputs.loss))
        self.shown.add(number, groups)
        if message := self.running.add(metrics["reward"]):
            raise RewardCollapse(f"step {number}: {message}; {self.recipe.out / CHILD} is the best policy before")
        return state._replace(step=state.step * 0 + number), metrics | learnt

    def _answers(
        self, params: Params, fixed: Fixed, prompts: list[Prompt], number: int
    ) -> tuple[policy_batches.RewardedGroups, dict[str, float]]:
        """All groups of a step with their rewards, and the time that they took."""
        recipe, started = self.recipe, time.perf_counter()
        policy = self.sampler.params(fixed.base, params)
        sampling = rewarding = 0.0
        groups: list[list[Rollout]] = []
        for round_ in range(1 + recipe.rollout.resample):
            pairs = self.sampler.sample(policy, prompts, f"{number}:{round_}")
            sampled = time.perf_counter()
            found = self.sampler.reward(prompts, pairs)
            sampling, rewarding = sampling + sampled - started, rewarding + time.perf_counter() - sampled
            started = time.perf_counter()
            groups += found
            for prompt, group in zip(prompts, found, strict=True):
                known = [member.outcome for member in group if member.outcome.reward is not None]
                passed = sum(passes(outcome, recipe.reward.pass_threshold) for outcome in known)
                self.prompts.record(prompt, len(known), passed)
            rewarded = policy_batches.reward_groups(groups, self.inputs.loss, self.inputs.limits)
            missing = recipe.prompts.prompts - int(rewarded.signal.sum())
            if missing <= 0 or round_ == recipe.rollout.resample:
                break
            prompts = self._draw(missing)
        tokens = sum(member.length for group in groups for member in group)
        return rewarded, {
            "rollout_seconds": sampling,
            "reward_seconds": rewarding,
            "rollout_tokens_per_second": tokens / sampling,
        }

    def _learn(
        self, state: TrainState, fixed: Fixed, groups: list[list[policy_batches.Learnable]]
    ) -> tuple[TrainState, dict[str, float]]:
        """Runs the updates of a step; returns the next state, and their mean metrics with timings."""
        count = min(self.recipe.update.updates, len(groups))
        if not count:
            return state, {"skipped": 0.0, "updates": 0.0, "update_seconds": 0.0, "score_seconds": 0.0}
        parts = [self._batches([answer for group in groups[part::count] for answer in group]) for part in range(count)]
        started = time.perf_counter()
        scored = [[self._scored(state.params, fixed, batch, count > 1) for batch in part] for part in parts]
        learning = time.perf_counter()
        found: list[Mapping[str, float]] = []
        for part in scored:
            state, metrics = self.update(state, fixed, map(self.placement.rows, part))
            found.append({name: float(value) for name, value in jax.device_get(metrics).items()})
        ended = time.perf_counter()
        tokens = sum(int((batch.segment_ids > 0).sum()) for part in parts for batch in part)
        return state, _combined(found) | {
            "updates": float(count),
            "score_seconds": learning - started,
            "update_seconds": ended - learning,
            "update_tokens_per_second": tokens / (ended - learning),
        }

    def _batches(self, answers: Sequence[policy_batches.Learnable]) -> list[Packed]:
        update, inputs = self.recipe.update, self.inputs
        found = policy_batches.examples(answers, inputs.loss, inputs.limits)
        if update.share_prompts:
            return list(shared_rows(found, self.recipe.shared_shapes, inputs.model.chat.pad_id))
        shape = {"rows": update.rows, "length": update.row_length}
        return list(policy_batches.micro_batches(found, **shape, pad_id=inputs.model.chat.pad_id))

    def _scored(self, params: Params, fixed: Fixed, batch: Packed, old: bool) -> Packed:
        """The batch with log-probabilities from before the step, where the loss or the metrics need them."""
        reference = bool(self.inputs.loss.kl) or self.recipe.update.reference
        if not old and not reference:
            return batch
        placed = self.placement.rows(batch)
        scores = self.update.score(params, fixed, placed, old=old, reference=reference)
        return policy_batches.with_scores(batch, on_host(scores))

    # Evaluation ----------------------------------------------------------------------------------------------------

    def measure(self, state: TrainState) -> dict[str, float]:
        """Metrics of greedy answers: "accuracy", mean "tokens" (both also by effort), "error" and "unscored"."""
        return self._measured(self._greedy(state))

    def _measured(self, found: Sequence[Trace]) -> dict[str, float]:
        efforts = self.inputs.questions.efforts
        values: dict[str, float] = {}
        for effort, summary in by_effort(found, efforts).items():
            values |= {f"accuracy/{effort}": summary.accuracy, f"tokens/{effort}": summary.mean_tokens}
        for name in ("accuracy", "tokens"):
            values[name] = float(np.mean([values[f"{name}/{effort}"] for effort in efforts]))
        unscored = float(sum(trace.unscored is not None for trace in found))
        return values | {"error": 1.0 - values["accuracy"], "unscored": unscored}

    def _greedy(self, state: TrainState) -> list[Trace]:
        """Greedy answers of a policy; those of the policy that was last asked are cached."""
        step = int(state.step)
        if self.answered is None or self.answered[0] != step:
            self.answered = step, self._answer_greedily(state.params)
        return self.answered[1]

    def _answer_greedily(self, trained: Params) -> list[Trace]:
        inputs = self.inputs
        found = answer_questions(
            self.sampler.params(self.base, trained),
            inputs.config,
            inputs.model.chat,
            inputs.questions,
            max_tokens=inputs.limits,
            slots=self.recipe.rollout.slots,
            cache=inputs.cache,
            mesh=self.generation_mesh,
            log_probs=True,  # so that the compiled programs of training's answers serve here, too
            experts=self.recipe.rollout.replay,
            skip=inputs.too_long,
            scorers=self.rewards,
        )
        self.notes.evaluated(found)
        return found

    # Export --------------------------------------------------------------------------------------------------------

    def best(self) -> TrainState:
        """The policy with the best evaluation; where none was kept, the newest policy."""
        with open_checkpoints(self.recipe.out, self.inputs.identity, self.recipe.loop) as checkpoints:
            fresh = self.initial()
            best = checkpoints.best
            found = checkpoints.restore(abstract_state(fresh), None if best is None else best.step)
        return fresh if found is None else found.state

    def export(self, trained: Trained) -> None:
        self.export_state(self.best() if self.recipe.export == "best" else trained.state)

    def export_state(self, state: TrainState) -> None:
        """Writes a policy, in the primary process."""
        step, answers = int(state.step), self._greedy(state)
        evaluated = self._measured(answers)
        scales = self._cache_scales(state.params, answers)
        self.write_child(state.params, "grpo", lambda: self._record(step, evaluated), scales, origin=self.inputs.origin)
        self.console.print(f"policy of step {step}: {self.recipe.out / CHILD}", highlight=False)

    def _record(self, step: int, evaluated: Mapping[str, float]) -> dict[str, object]:
        """This run's entry in provenance."""
        recipe = self.recipe
        return {
            "step": step,
            "tasks": dict(recipe.prompts.task_weights),
            "efforts": dict(recipe.prompts.efforts),
            "answers_per_step": [recipe.prompts.prompts, recipe.rollout.group],
            "reward": recipe.reward.function,
            "loss": asdict(self.inputs.loss),
            "optimizer": asdict(recipe.optimizer),
            "seed": recipe.seed,
            EVALUATION.rstrip("/"): dict(evaluated),
        }

    def _cache_scales(self, trained: Params, answers: Sequence[Trace]) -> KVScales:
        """Scales of the policy's FP8 cache, calibrated on its own answers."""
        batches = trace_batches(answers[:: max(1, len(answers) // CALIBRATION_ANSWERS)])
        with on_mesh(self.generation_mesh):
            return calibrate_cache(self.sampler.params(self.base, trained), self.inputs.config, batches)


def _combined(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over a step's updates; maxima for names that end in `MAXIMUM` and "skipped", and the last learning rate."""

    def one(name: str) -> float:
        values = [metrics[name] for metrics in updates]
        if name.endswith(MAXIMUM) or name == "skipped":
            return max(values)
        return values[-1] if name == "learning_rate" else float(np.mean(values))

    return {name: one(name) for name in updates[-1]}
