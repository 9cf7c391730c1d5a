"""Traces that were made elsewhere, dealt to the sets of a search so that no prompt is in two of them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.traces import Trace


def deal_traces(
    traces: Sequence[Trace], shares: Mapping[str, int], config: ModelConfig, source: Path, seed: int = 0
) -> dict[str, list[Trace]]:
    """Sets of traces by name, each about its share of the prompts, by a hash of the prompt.

    Args:
      traces: of the parent.
      shares: of each set, relative to their sum.
      config: of the parent, whose tokens and positions the traces must fit.
      source: the file, for messages.
      seed: deals otherwise.

    Raises PuzzleError, naming file and trace, for a trace that the parent cannot have written, and where a set would
    be empty.
    """
    for number, trace in enumerate(traces):
        _check(trace, config, f"{source}: trace {number}")
    ends = np.array(list(accumulate(shares.values()))) / sum(shares.values())
    dealt: dict[str, list[Trace]] = {name: [] for name in shares}
    for trace in traces:
        at = zlib.crc32(f"{seed} {trace.prompt}".encode()) / 2**32
        dealt[list(shares)[int(np.searchsorted(ends, at, side="right"))]].append(trace)
    for name, of_set in dealt.items():
        if not of_set:
            prompts = len({trace.prompt for trace in traces})
            raise PuzzleError(f"{source} holds {prompts} different prompts, of which none falls to {name}; give more")
    return dealt


def _check(trace: Trace, config: ModelConfig, where: str) -> None:
    if not trace.prompt or not trace.completion:
        raise PuzzleError(f"{where} has no {'completion' if trace.prompt else 'prompt'}")
    length = len(trace.prompt) + len(trace.completion)
    if length > config.max_position:
        raise PuzzleError(f"{where} has {length} tokens, but the parent's context is {config.max_position}")
    most = max(*trace.prompt, *trace.completion)
    if most >= config.vocab_size or min(*trace.prompt, *trace.completion) < 0:
        raise PuzzleError(f"{where} holds token {most}, but the parent's tokens are 0 to {config.vocab_size - 1}")
