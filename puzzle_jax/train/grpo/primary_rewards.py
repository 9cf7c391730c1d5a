"""Rewards that the primary process finds for all: what a reward function gives may differ from host to host."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import TracebackType

import jax

from puzzle_jax.processes.distributed import from_primary, kv_delete, on_primary, process_index
from puzzle_jax.tasks.rewards.answers import Answer, Reward
from puzzle_jax.tasks.rewards.workers import TIME_LIMIT, RewardWorkers


class PrimaryRewards:
    """`RewardWorkers` of the primary process; all processes must make the same calls, with equal answers.

    With several processes, answers that were begun are judged when they are waited for, all together.
    """

    def __init__(
        self,
        *,
        function: str | None = None,
        time_limit: float = TIME_LIMIT,
        processes: int = 1,
        environment: Sequence[str] | None = None,
    ) -> None:
        self._judges: RewardWorkers | None = None
        self._turn = 0
        self._begun: list[tuple[Answer, bool]] = []
        self._tickets = 0

        def start() -> None:
            self._judges = RewardWorkers(
                function=function, time_limit=time_limit, processes=processes, environment=environment
            )

        on_primary("start judges", start)

    def __enter__(self) -> PrimaryRewards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._judges is not None:
            self._judges.close()

    def judge(self, answers: Sequence[Answer], *, own_score: bool = False) -> list[Reward]:
        """The judgement of every answer, in the same order; `own_score` asks the tasks in place of the function."""
        return self._told([(answer, own_score) for answer in answers])

    def begin(self, answer: Answer, *, own_score: bool = False) -> int:
        """See `RewardWorkers`."""
        if jax.process_count() == 1:
            return self._first.begin(answer, own_score=own_score)
        self._begun.append((answer, own_score))
        return self._tickets + len(self._begun) - 1

    def finished(self, *, wait: bool) -> list[tuple[int, Reward]]:
        """See `RewardWorkers`; must be called in the same order by all processes where `wait` is true."""
        if jax.process_count() == 1:
            return self._first.finished(wait=wait)
        if not wait or not self._begun:
            return []
        begun, first, self._begun = self._begun, self._tickets, []
        self._tickets += len(begun)
        return list(enumerate(self._told(begun), first))

    def _told(self, asked: Sequence[tuple[Answer, bool]]) -> list[Reward]:
        """The primary process's judgements, in all processes."""
        self._turn += 1
        judgements = from_primary(_name(self._turn), lambda: json.dumps(self._judge(asked)))
        if process_index() == 0:
            # Answers of this turn were sampled by all processes together, after they had read those before.
            kv_delete(_name(self._turn - 1))
        return [Reward(*each) for each in json.loads(judgements)]

    def _judge(self, asked: Sequence[tuple[Answer, bool]]) -> list[tuple[float | None, str | None, float | None]]:
        found = {}
        for own in (False, True):
            chosen = [index for index, (_, asks_own) in enumerate(asked) if asks_own == own]
            judged = self._first.rewards([asked[index][0] for index in chosen], own_score=own) if chosen else []
            found |= dict(zip(chosen, judged, strict=True))
        return [(found[i].reward, found[i].reason, found[i].score) for i in range(len(asked))]

    @property
    def _first(self) -> RewardWorkers:
        assert self._judges is not None, "only the primary process judges"
        return self._judges


def _name(turn: int) -> str:
    return f"judgements/{turn}"
