"""The layout of rows that hold a prompt and answers to it."""

from __future__ import annotations

from typing import NamedTuple

PROMPT = 1
"""The segment of a row's prompt; its answers have larger ones, and padding is 0."""


class Layout(NamedTuple):
    """Where a row's prompt and answers lie.

    Attributes:
      prefix: positions of the prompt; the last of them is the prompt's last.
      strip: positions of a strip.
    """

    prefix: int
    strip: int
