"""Rows of one prompt and several answers to it, so that an update runs a prompt once rather than once per answer.

A row is laid out for `kernels.prefix_attention`: the prompt right-aligned in the prefix, answers packed first-fit into
strips, the longest first. Every answer begins with the prompt's last token, from which its first token is predicted,
and omits its own last token, from which nothing is predicted. Prefixes come in a few lengths, each with a compiled
program of its own, and micro-batches have about the same number of positions at each.

Left out: several prompts in a row. A prompt whose answers fill less than a row's strips leaves the rest empty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from puzzle_jax.kernels.prefix_attention import PROMPT, Layout
from puzzle_jax.train.rows import Example, OpenRows, Packed

STRIPS = 3
"""The number of strips in a row. More of them leave rows with few answers emptier; fewer repeat prompts more often."""

_SHORTEST_PREFIX, _LONGER = 64, 8
_STRIP_MULTIPLE = 32


@dataclass(frozen=True)
class RowShape:
    """The shape of a micro-batch."""

    rows: int
    layout: Layout

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.layout.prefix + STRIPS * self.layout.strip


def layout_of(length: int, strip: int) -> Layout:
    """The layout of rows of the given length."""
    return Layout(length - STRIPS * strip, strip)


def strip_of(limit: int) -> int:
    """Positions of a strip that holds answers of up to `limit` tokens."""
    return -(-limit // _STRIP_MULTIPLE) * _STRIP_MULTIPLE


def row_shapes(longest_prompt: int, limit: int, positions: int, parts: int = 1) -> tuple[RowShape, ...]:
    """Shapes for prompts of up to `longest_prompt` tokens and answers of up to `limit`, the shortest prefix first.

    Args:
      positions: approximate positions of a micro-batch, whose number of rows is a positive multiple of `parts`.
    """
    prefixes, prefix = [], _SHORTEST_PREFIX
    while prefix < longest_prompt:
        prefixes.append(prefix)
        prefix *= _LONGER
    prefixes.append(max(longest_prompt, 1))
    shapes = [RowShape(1, Layout(prefix, strip_of(limit))) for prefix in prefixes]
    return tuple(RowShape(max(positions // (shape.length * parts), 1) * parts, shape.layout) for shape in shapes)


def shared_rows(found: Sequence[Example], shapes: Sequence[RowShape], pad_id: int) -> Iterator[Packed]:
    """Packs every example once, in micro-batches of one shape each; missing rows of the last of a shape are padding.

    Extras of a prompt's positions are those of its first example.
    """
    by_prompt: dict[tuple[int, ...], list[Example]] = defaultdict(list)
    for example in found:
        by_prompt[tuple(map(int, example.tokens[: example.prompt_length]))].append(example)
    by_shape: dict[RowShape, list[list[list[Example]]]] = {shape: [] for shape in shapes}
    for prompt, examples in by_prompt.items():
        shape = next(shape for shape in shapes if len(prompt) - 1 <= shape.layout.prefix)
        strips = _strips(examples, shape.layout.strip)
        by_shape[shape] += [strips[start : start + STRIPS] for start in range(0, len(strips), STRIPS)]
    for shape, rows in by_shape.items():
        for start in range(0, len(rows), shape.rows):
            yield _laid_out(rows[start : start + shape.rows], shape, found[0], pad_id)


def _strips(examples: Sequence[Example], strip: int) -> list[list[Example]]:
    """The answers to one prompt, packed into strips."""
    filling = OpenRows[Example](strip, len(examples), lambda example: len(example.tokens) - example.prompt_length)
    for example in sorted(examples, key=lambda example: -len(example.tokens)):
        filling.place(example)
    return filling.rows


def _laid_out(rows: Sequence[Sequence[Sequence[Example]]], shape: RowShape, like: Example, pad_id: int) -> Packed:
    """A micro-batch of rows of strips of answers."""
    (prefix, strip), size = shape.layout, (shape.rows, shape.length)
    tokens, targets = (np.full(size, pad_id, np.int32) for _ in range(2))
    segment_ids, positions = (np.zeros(size, np.int32) for _ in range(2))
    weights = np.zeros(size, np.float32)
    extras = {name: np.zeros((*size, *of.shape[1:]), of.dtype) for name, of in like.extras.items()}

    def put(row: int, start: int, example: Example, part: slice) -> int:
        """Writes a part of an example, and returns where it ends."""
        end = start + part.stop - part.start
        tokens[row, start:end] = example.tokens[part]
        positions[row, start:end] = np.arange(part.start, part.stop)
        for name, values in example.extras.items():
            extras[name][row, start:end] = values[part]
        return end

    for row, strips in enumerate(rows):
        prompt = strips[0][0].prompt_length - 1
        put(row, prefix - prompt, strips[0][0], slice(0, prompt))
        segment_ids[row, prefix - prompt : prefix] = PROMPT
        segment = PROMPT
        for number, members in enumerate(strips):
            start = prefix + number * strip
            for example in members:
                segment += 1
                last = len(example.tokens) - 1
                end = put(row, start, example, slice(prompt, last))
                targets[row, start:end] = example.tokens[prompt + 1 :]
                weights[row, start:end] = 1.0
                segment_ids[row, start:end] = segment
                start = end
    return Packed(tokens, targets, weights, segment_ids, positions, extras)
