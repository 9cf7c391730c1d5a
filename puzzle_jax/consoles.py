"""Consoles that print text as it is: a path or a task may contain what rich would take for markup or an emoji code."""

from __future__ import annotations

import sys

from rich.console import Console


def plain_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that interprets neither markup nor emoji codes; styles are given explicitly.

    It is `width` columns wide where standard output is not a terminal and has no width of its own.
    """
    known = width is None or sys.stdout.isatty()
    return Console(stderr=stderr, width=None if known else width, markup=False, emoji=False)
