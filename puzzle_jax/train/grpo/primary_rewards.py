"""Rewards that the primary process computes for all, since a reward function's results may differ between hosts."""

from __future__ import annotations

import json
from collections.abc import Sequence

import jax

from puzzle_jax.processes.distributed import from_primary, kv_delete, on_primary, process_index
from puzzle_jax.tasks.rewards.answers import Answer, Reward
from puzzle_jax.tasks.rewards.workers import RewardWorkers
from puzzle_jax.train.grpo.recipe import RewardSettings


class PrimaryRewards:
    """`RewardWorkers` of the primary process; all processes must make the same calls, with equal answers.

    With several processes, answers given to `begin` are rewarded all together, in the next `finished` that waits.
    """

    def __init__(self, settings: RewardSettings | None = None) -> None:
        settings = settings or RewardSettings()
        self._workers: RewardWorkers | None = None
        self._turn = 0
        self._begun: list[tuple[Answer, bool]] = []
        self._tickets = 0

        def start() -> None:
            self._workers = RewardWorkers(
                function=settings.function,
                time_limit=settings.time_limit,
                processes=settings.workers,
                environment=settings.environment,
            )

        on_primary("start reward workers", start)

    def __enter__(self) -> PrimaryRewards:
        return self

    def __exit__(self, *error: object) -> None:
        if self._workers is not None:
            self._workers.close()

    def of(self, answers: Sequence[Answer]) -> list[Reward]:
        """The reward of every answer, in the same order."""
        return self._shared([(answer, False) for answer in answers])

    def begin(self, answer: Answer, *, own_score: bool = False) -> int:
        """See `RewardWorkers.begin`."""
        if jax.process_count() == 1:
            return self._own.begin(answer, own_score=own_score)
        self._begun.append((answer, own_score))
        return self._tickets + len(self._begun) - 1

    def finished(self, *, wait: bool) -> list[tuple[int, Reward]]:
        """See `RewardWorkers.finished`; with `wait`, all processes must call it in the same order."""
        if jax.process_count() == 1:
            return self._own.finished(wait=wait)
        if not wait or not self._begun:
            return []
        begun, first, self._begun = self._begun, self._tickets, []
        self._tickets += len(begun)
        return list(enumerate(self._shared(begun), first))

    def _shared(self, asked: Sequence[tuple[Answer, bool]]) -> list[Reward]:
        """Broadcasts the primary process's rewards to all processes."""
        self._turn += 1
        rewards = from_primary(_name(self._turn), lambda: json.dumps(self._rewards(asked)))
        if process_index() == 0:
            # All processes have read the previous turn's rewards, since they then sampled this turn's answers together.
            kv_delete(_name(self._turn - 1))
        return [Reward(*each) for each in json.loads(rewards)]

    def _rewards(self, asked: Sequence[tuple[Answer, bool]]) -> list[tuple[float | None, str | None, float | None]]:
        found: dict[int, Reward] = {}
        for own in (False, True):
            chosen = [index for index, (_, asks_own) in enumerate(asked) if asks_own == own]
            rewards = self._own.rewards([asked[index][0] for index in chosen], own_score=own) if chosen else []
            found |= dict(zip(chosen, rewards, strict=True))
        return [(found[i].reward, found[i].reason, found[i].score) for i in range(len(asked))]

    @property
    def _own(self) -> RewardWorkers:
        assert self._workers is not None, "only the primary process has reward workers"
        return self._workers


def _name(turn: int) -> str:
    return f"rewards/{turn}"
