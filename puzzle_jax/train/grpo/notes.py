"""What a run of reinforcement learning says of its answers while it goes on, each thing once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Console

from puzzle_jax.evaluate.accuracy import unscored_note
from puzzle_jax.generate.traces import Trace
from puzzle_jax.train.grpo.inputs import GrpoInputs
from puzzle_jax.train.grpo.metrics import passes
from puzzle_jax.train.grpo.policy_batches import Judged
from puzzle_jax.train.grpo.prompts import Prompts
from puzzle_jax.train.grpo.rollouts import Rollout

_MOST_REASONS = 100


class Notes:
    """Says it on a console."""

    def __init__(self, inputs: GrpoInputs, console: Console) -> None:
        self._inputs, self._console = inputs, console
        self._never_right = NeverRight(inputs.recipe.reward.right)
        self._told: set[object] = set()

    @property
    def advice(self) -> str:
        """Of `NeverRight`."""
        return self._never_right.advice

    def step(self, number: int, judged: Judged, prompts: Prompts) -> None:
        """Why answers of a step were lost, that problems are too long to ask, that no answer counts as right, and of
        which tasks and efforts there is nothing to learn."""
        everyone = [rollout for group in judged.groups for rollout in group]
        self._tell_lost(number, everyone)
        self._tell_too_long(prompts)
        if message := self._never_right.add(everyone):
            self._say(message)
        bounds = self._inputs.recipe.prompts
        for pair, rate in prompts.silent().items():
            self._once(
                pair,
                f"task {pair[0]} at effort {pair[1]} gives no signal: {rate:.1%} of its answers are right, outside "
                f"{bounds.min_pass_rate:.0%} to {bounds.max_pass_rate:.0%}; it is asked only now and then{self.advice}",
            )

    def evaluated(self, answers: Sequence[Trace]) -> None:
        """Which questions of an evaluation were not asked, and which answers could not be scored."""
        inputs = self._inputs
        if inputs.too_long:
            self._once(
                "questions",
                f"{len(inputs.too_long)} of the evaluation's {len(inputs.questions.questions())} questions take, with "
                f"their answers, more than the model's context ({inputs.config.max_position} tokens), and are "
                "not asked",
            )
        if note := unscored_note(answers):
            self._say(note)

    def _tell_lost(self, number: int, everyone: Sequence[Rollout]) -> None:
        reasons = Counter(rollout.judgement.reason for rollout in everyone if rollout.judgement.reason is not None)
        for reason, count in reasons.items():
            if len(self._told) < _MOST_REASONS:
                message = f"step {number}: {count} of {len(everyone)} answers could not be judged: the judge {reason}"
                self._once(("lost", reason), message)

    def _tell_too_long(self, prompts: Prompts) -> None:
        prompt = prompts.first_too_long
        if prompt is not None:
            self._once(
                "too long",
                f"{prompt.problem.where}: with its answer the prompt may take {self._inputs.most_tokens(prompt)} "
                f"tokens at effort {prompt.effort}, more than update.row_length "
                f"({self._inputs.recipe.update.row_length}); such problems are passed over, and counted in "
                "metrics.jsonl (passed_over)",
            )

    def _once(self, key: object, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self._say(message)

    def _say(self, message: str) -> None:
        self._console.print(f"  {message}", highlight=False, markup=False, soft_wrap=True)


class NeverRight:
    """Notices that no answer counts as right, which may be for want of the right threshold.

    Args:
      right: reward from which an answer counts as right; None as in `passes`.
    """

    def __init__(self, right: float | None) -> None:
        self._right = right
        self._passed = False
        self._largest: float | None = None
        self._told = False

    def add(self, rollouts: Iterable[Rollout]) -> str | None:
        """Adds a step's answers; what to say, once, if their task gives some a full score and none has passed yet."""
        best_right: float | None = None
        for rollout in rollouts:
            judgement = rollout.judgement
            if judgement.reward is None:
                continue
            self._passed = self._passed or passes(judgement, self._right)
            self._largest = max(judgement.reward, judgement.reward if self._largest is None else self._largest)
            if judgement.score is not None and judgement.score >= 1.0:
                best_right = max(judgement.reward, judgement.reward if best_right is None else best_right)
        if self._passed or self._told or best_right is None:
            return None
        self._told = True
        return (
            f"answers that their task scores as right earn up to {best_right:g}, which is below reward.right "
            f"({self._right:g}): none counts as right, and their problems will be passed over; set reward.right to "
            "what a right answer earns, or leave it out"
        )

    @property
    def advice(self) -> str:
        """What may be wrong where there is nothing to learn from; "" where some answer has passed."""
        if self._passed or self._largest is None:
            return ""
        threshold = 1.0 if self._right is None else self._right
        return (
            f"; no reward has reached {threshold:g}, from which an answer counts as right, and the largest was "
            f"{self._largest:g}: if right answers earn less, set reward.right to what they earn"
        )
