"""Judges of the first process, for all: what a reward function says may differ from host to host, and take its time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import TracebackType

from puzzle_jax.processes import from_primary, kv_delete, on_primary, process_index
from puzzle_jax.tasks.judges import Answer, Judgement, Judges


class FirstJudges:
    """As `Judges`, whose arguments and errors it has; all processes must make the same calls, with equal answers."""

    def __init__(self, *, function: str | None = None, time_limit: float = 10.0, processes: int = 1) -> None:
        self._judges: Judges | None = None
        self._turn = 0

        def start() -> None:
            self._judges = Judges(function=function, time_limit=time_limit, processes=processes)

        on_primary("start judges", start)

    def __enter__(self) -> FirstJudges:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._judges is not None:
            self._judges.close()

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """The judgement of every answer, in the same order."""
        self._turn += 1
        judgements = from_primary(_name(self._turn), lambda: json.dumps(self._judge(answers)))
        if process_index() == 0:
            # Answers of this turn were sampled by all processes together, after they heard of the one before.
            kv_delete(_name(self._turn - 1))
        return [Judgement(*each) for each in json.loads(judgements)]

    def _judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        assert self._judges is not None, "only the first process judges"
        return self._judges.judge(answers)


def _name(turn: int) -> str:
    return f"judgements/{turn}"
