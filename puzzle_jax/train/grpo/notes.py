"""Messages about the answers of a run of reinforcement learning, each printed once while it goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Console

from puzzle_jax.evaluate.accuracy import unscored_note
from puzzle_jax.generate.traces import Trace
from puzzle_jax.train.grpo.inputs import GrpoInputs
from puzzle_jax.train.grpo.metrics import passes
from puzzle_jax.train.grpo.policy_batches import RewardedGroups
from puzzle_jax.train.grpo.prompts import Prompts
from puzzle_jax.train.grpo.rollouts import Rollout

_MOST_REASONS = 100


class Notes:
    """Prints the messages on a console."""

    def __init__(self, inputs: GrpoInputs, console: Console) -> None:
        self._inputs, self._console = inputs, console
        self.threshold = ThresholdMonitor(inputs.recipe.reward.pass_threshold)
        self._said: set[object] = set()

    def step(self, number: int, groups: RewardedGroups, prompts: Prompts) -> None:
        """Reports why answers of a step have no reward, problems that are too long to ask, that no answer passes, and
        the tasks and efforts that give no signal."""
        everyone = [rollout for group in groups.groups for rollout in group]
        reasons = Counter(rollout.outcome.reason for rollout in everyone if rollout.outcome.reason is not None)
        for reason, count in reasons.items():
            if len(self._said) < _MOST_REASONS:
                lost = f"step {number}: {count} of {len(everyone)} answers have no reward: the reward function {reason}"
                self._once(("lost", reason), lost)
        if (prompt := prompts.first_too_long) is not None:
            self._once(
                "too long",
                f"{prompt.problem.where}: with its answer the prompt may take {self._inputs.most_positions(prompt)} "
                f"tokens at effort {prompt.effort}, more than update.row_length "
                f"({self._inputs.recipe.update.row_length}); such problems are passed over, and counted in "
                "metrics.jsonl (passed_over)",
            )
        if message := self.threshold.add(everyone):
            self._say(message)
        bounds = self._inputs.recipe.prompts
        for pair, rate in prompts.without_signal().items():
            self._once(
                pair,
                f"task {pair[0]} at effort {pair[1]} gives no signal: at no difficulty do {bounds.min_pass_rate:.0%} "
                f"to {bounds.max_pass_rate:.0%} of the answers pass ({rate:.1%} in the mean); it is asked only now and "
                "then"
                f"{self.threshold.advice}",
            )

    def evaluated(self, answers: Sequence[Trace]) -> None:
        """Reports how many questions of an evaluation were not asked, and which answers could not be scored."""
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

    def _once(self, key: object, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._say(message)

    def _say(self, message: str) -> None:
        self._console.print(f"  {message}", highlight=False, markup=False, soft_wrap=True)


class ThresholdMonitor:
    """Detects that no answer passes, which may be due to an unsuitable threshold.

    Args:
      threshold: lowest reward that passes; None as in `passes`.
    """

    def __init__(self, threshold: float | None) -> None:
        self._threshold = threshold
        self._passed = self._warned = False
        self._largest: float | None = None

    def add(self, rollouts: Iterable[Rollout]) -> str | None:
        """Adds a step's answers; returns a message, once, if some have their task's full score but none has passed."""
        best_full: float | None = None
        for outcome in (rollout.outcome for rollout in rollouts):
            if outcome.reward is None:
                continue
            self._passed = self._passed or passes(outcome, self._threshold)
            self._largest = max(outcome.reward, outcome.reward if self._largest is None else self._largest)
            if outcome.score is not None and outcome.score >= 1.0:
                best_full = max(outcome.reward, outcome.reward if best_full is None else best_full)
        if self._passed or self._warned or best_full is None:
            return None
        self._warned = True
        return (
            f"answers with a full score of their task earn up to {best_full:g}, which is below reward.pass_threshold "
            f"({self._threshold:g}): none passes, and their problems will be passed over; set reward.pass_threshold to "
            "what a right answer earns, or leave it out"
        )

    @property
    def advice(self) -> str:
        """Advice on what to check if there is nothing to learn from; "" where some answer has passed."""
        if self._passed or self._largest is None:
            return ""
        threshold = 1.0 if self._threshold is None else self._threshold
        return (
            f"; no reward has reached {threshold:g}, from which an answer passes, and the largest was "
            f"{self._largest:g}: if right answers earn less, set reward.pass_threshold to what they earn"
        )
