"""Consoles that print text as it is: a path or a task may hold what rich takes for markup, or for an emoji."""

from __future__ import annotations

import sys

from rich.console import Console


def plain_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console without markup and emoji codes; styles are given as such.

    It is `width` columns wide where standard output is no terminal, whose width nobody knows.
    """
    known = width is None or sys.stdout.isatty()
    return Console(stderr=stderr, width=None if known else width, markup=False, emoji=False)
