"""Metrics of a step's answers in reinforcement learning, and detection of a collapsed reward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from puzzle_jax.tasks.rewards.answers import Reward
from puzzle_jax.train.grpo.policy_batches import RewardedGroups
from puzzle_jax.train.grpo.rollouts import Rollout


def passes(outcome: Reward, threshold: float | None) -> bool:
    """Returns whether an answer that has a reward passes.

    `threshold` is the lowest reward that passes. Where it is None, the task's own score must be full or, if that is not
    known, the reward must be at least 1.
    """
    assert outcome.reward is not None
    if threshold is not None:
        return outcome.reward >= threshold
    return (outcome.reward if outcome.score is None else outcome.score) >= 1.0


def rollout_metrics(groups: RewardedGroups, threshold: float | None) -> dict[str, float]:
    """Means over a step's answers by name; "lost" counts answers whose reward function failed.

    "pass_rate" is the share of answers that pass (`passes`); "shaped_reward" includes the terms for length;
    "groups_kept" and "groups_no_signal" count prompts.
    """
    everyone = [rollout for group in groups.groups for rollout in group]
    rewarded = [rollout for rollout in everyone if rollout.outcome.reward is not None]
    found = {
        "reward": _mean(_reward(rollout) for rollout in rewarded),
        "shaped_reward": float(groups.rewards[groups.counted].mean()) if groups.counted.any() else float("nan"),
        "pass_rate": _mean(passes(rollout.outcome, threshold) for rollout in rewarded),
        "tokens": _mean(rollout.length for rollout in everyone),
        "truncated": _mean(rollout.generated.truncated for rollout in everyone),
        "lost": float(sum(rollout.outcome.reason is not None for rollout in everyone)),
        "groups_kept": float(groups.signal.sum()),
        "groups_no_signal": float((~groups.signal).sum()),
    }
    for effort, members in _by(everyone, lambda rollout: rollout.prompt.effort).items():
        known = [rollout for rollout in members if rollout.outcome.reward is not None]
        found[f"tokens/{effort}"] = _mean(rollout.length for rollout in members)
        found[f"pass_rate/{effort}"] = _mean(passes(rollout.outcome, threshold) for rollout in known)
    for task, members in _by(rewarded, lambda rollout: rollout.prompt.problem.task).items():
        found[f"reward/{task}"] = _mean(map(_reward, members))
    return found


@dataclass
class RunningReward:
    """The mean reward of the last steps, and its best value so far.

    Attributes:
      share: fraction of the best value below which the reward counts as collapsed; 0 means never.
      steps: number of steps that the mean is over.
    """

    share: float
    steps: int
    _last: list[float] = field(default_factory=list)
    _best: float | None = None

    def add(self, reward: float) -> str | None:
        """Adds a step's mean reward (NaN is ignored); returns a message if the reward has now collapsed."""
        if not np.isfinite(reward):
            return None
        self._last = [*self._last, float(reward)][-self.steps :]
        if len(self._last) < self.steps:
            return None
        running = float(np.mean(self._last))
        self._best = running if self._best is None else max(self._best, running)
        if not self.share or self._best <= 0 or running >= self.share * self._best:
            return None
        return (
            f"the reward has collapsed: its mean over {self.steps} steps is {running:.3f}, below {self.share:g} of the "
            f"best, {self._best:.3f}"
        )

    def get_state(self) -> dict[str, object]:
        return {"last": self._last, "best": self._best}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._last, self._best = list(state["last"]), state["best"]


def _reward(rollout: Rollout) -> float:
    assert rollout.outcome.reward is not None
    return rollout.outcome.reward


def _mean(values: Iterable[float]) -> float:
    """The mean of the values, or NaN, which metrics write as null, where there are none."""
    found = list(values)
    return float(np.mean(found)) if found else float("nan")


def _by(members: Iterable[Rollout], key: Callable[[Rollout], str]) -> dict[str, list[Rollout]]:
    found: dict[str, list[Rollout]] = {}
    for member in members:
        found.setdefault(key(member), []).append(member)
    return dict(sorted(found.items()))
