"""The layout of rows that hold a prompt and answers to it."""

from __future__ import annotations

from typing import NamedTuple

PROMPT = 1
"""The segment id of a row's prompt; answers have larger ids, and padding has 0."""


class Layout(NamedTuple):
    """Where a row's prompt and answers lie.

    Attributes:
      prefix: number of positions for the prompt, whose last token is in the last of them.
      strip: number of positions per strip.
    """

    prefix: int
    strip: int
