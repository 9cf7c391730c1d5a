"""Progress of long work: a bar with the time left, or lines where the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@runtime_checkable
class Advance(Protocol):
    """Reports work done, the total where it was not known before, and a note to show beside it."""

    def __call__(self, amount: int, total: int | None = None, /, *, note: str = "") -> None: ...


@contextmanager
def progress(console: Console, what: str, total: int | None) -> Iterator[Advance]:
    """Shows a bar with the time left or, where the console is not a terminal, a line now and then."""
    if not console.is_terminal:
        yield _Lines(console, what, total)
        return
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, note="")

        def advance(amount: int, total: int | None = None, /, *, note: str = "") -> None:
            bar.update(task, advance=amount, total=total, note=note)

        yield advance


class _Lines:
    """Progress as lines, at most one every `SECONDS`. The time left is estimated without the first report, which may
    include compiling or the work of an earlier run."""

    SECONDS = 20.0

    def __init__(self, console: Console, what: str, total: int | None) -> None:
        self.console, self.what, self.total = console, what, total
        self.done, self.first = 0, 0
        self.start = self.last = time.monotonic()

    def __call__(self, amount: int, total: int | None = None, /, *, note: str = "") -> None:
        self.done, self.total = self.done + amount, total or self.total
        now = time.monotonic()
        if not self.first:
            self.first, self.start = self.done, now
        elif self.total and self.done > self.first and now - self.last >= self.SECONDS:
            left = (now - self.start) * (self.total - self.done) / (self.done - self.first)
            beside = f", {note}" if note else ""
            line = f"  {self.what}: {self.done} of {self.total}, {left:.0f} s left{beside}"
            self.console.print(line, highlight=False)
            self.last = now
