"""Traces that were made elsewhere, split into the sets of a search so that no prompt is in two of them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.traces import Trace


def split_traces(
    traces: Sequence[Trace], shares: Mapping[str, int], config: ModelConfig, source: Path, seed: int = 0
) -> dict[str, list[Trace]]:
    """Sets of traces by name, each with its share of the prompts, in the order of a hash of the prompt.

    Every set has at least one prompt, so that a short file can be searched with too.

    Args:
      traces: of the parent.
      shares: of each set, relative to their sum.
      config: of the parent, whose tokens and positions the traces must fit.
      source: the file, for messages.
      seed: splits otherwise.

    Raises PuzzleError, naming file and trace, for a trace that the parent cannot have written, and where there are
    fewer prompts than sets.
    """
    for number, trace in enumerate(traces):
        _check(trace, config, f"{source}: trace {number}")
    prompts = sorted({trace.prompt for trace in traces}, key=lambda prompt: (_hash(seed, prompt), prompt))
    if len(prompts) < len(shares):
        raise PuzzleError(
            f"{source} holds {len(prompts)} different prompts, but a search splits them into {', '.join(shares)}, each "
            f"with prompts of its own; give at least {len(shares)}"
        )
    # Every set is given one prompt, and its share of the others.
    ends = np.array(list(accumulate(shares.values()))) / sum(shares.values())
    counts = np.diff(np.rint(ends * (len(prompts) - len(shares))), prepend=0).astype(int) + 1
    owners = [name for name, count in zip(shares, counts, strict=True) for _ in range(count)]
    owner = dict(zip(prompts, owners, strict=True))
    found: dict[str, list[Trace]] = {name: [] for name in shares}
    for trace in traces:
        found[owner[trace.prompt]].append(trace)
    return found


def _hash(seed: int, prompt: Sequence[int]) -> int:
    return zlib.crc32(f"{seed} {tuple(prompt)}".encode())


def _check(trace: Trace, config: ModelConfig, where: str) -> None:
    if not trace.prompt or not trace.completion:
        raise PuzzleError(f"{where} has no {'completion' if trace.prompt else 'prompt'}")
    length = len(trace.prompt) + len(trace.completion)
    if length > config.max_position:
        raise PuzzleError(f"{where} has {length} tokens, but the parent's context is {config.max_position}")
    most = max(*trace.prompt, *trace.completion)
    if most >= config.vocab_size or min(*trace.prompt, *trace.completion) < 0:
        raise PuzzleError(f"{where} holds token {most}, but the parent's tokens are 0 to {config.vocab_size - 1}")
