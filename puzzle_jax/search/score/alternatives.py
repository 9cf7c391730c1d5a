"""The alternatives of a space, each with a number by which scores and the program's groups refer to it.

In a base model, an expert set replaces a layer's experts and leaves its window as it is; a window leaves its experts as
they are. The base's own choices need no score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from puzzle_jax.search.score.replace_one import Alternative, parent_choices
from puzzle_jax.search.solve.problem import Scores, attention_group, experts_group, window_name
from puzzle_jax.search.space import ExpertChoice, Space

Values = Float[np.ndarray, "alternatives"]
Numbers = tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True)
class IndexedAlternatives:
    """Numbered alternatives of a space around a base.

    Attributes:
      space: the space whose alternatives are numbered, in its order.
      listed: layer and choice of every numbered alternative.
      experts, attention: per layer, the number of each of the space's alternatives; None for the base's own.
    """

    space: Space
    listed: tuple[tuple[int, Alternative], ...]
    experts: Numbers
    attention: Numbers

    @staticmethod
    def around(space: Space, base: Sequence[Alternative] | None = None) -> IndexedAlternatives:
        """Numbers the alternatives to the choices of `base`, by default the parent's."""
        listed: list[tuple[int, Alternative]] = []

        def number(layer: int, alternative: Alternative, own: Alternative) -> int | None:
            if alternative.window == own.window and np.array_equal(alternative.expert_mask, own.expert_mask):
                return None
            listed.append((layer, alternative))
            return len(listed) - 1

        experts, attention = [], []
        for layer, own in enumerate(base or parent_choices(space.parent)):
            total = space.parent.blocks[layer].num_experts
            masks = [expert_mask(choice, total) for choice in space.expert_choices[layer]]
            experts.append(tuple(number(layer, Alternative(mask, own.window), own) for mask in masks))
            windows = [Alternative(own.expert_mask, window) for window in space.windows[layer]]
            attention.append(tuple(number(layer, alternative, own) for alternative in windows))
        return IndexedAlternatives(space, tuple(listed), tuple(experts), tuple(attention))

    def scores(self, values: Values, groups: Mapping[str, Values] | None = None) -> Scores:
        """Converts values by number to scores of the space, those of groups likewise; the base's own choices get 0."""

        def of(numbers: Numbers) -> tuple[tuple[float, ...], ...]:
            return tuple(tuple(0.0 if n is None else float(values[n]) for n in layer) for layer in numbers)

        by_group = {name: self.scores(of_group) for name, of_group in (groups or {}).items()}
        return Scores(of(self.experts), of(self.attention), by_group)

    @property
    def owner(self) -> dict[str, dict[str, int | None]]:
        """Numbers of alternatives by the program's group and alternative name."""
        out: dict[str, dict[str, int | None]] = {}
        for layer, (choices, windows) in enumerate(zip(self.space.expert_choices, self.space.windows, strict=True)):
            names = [choice.name for choice in choices]
            out[experts_group(layer)] = dict(zip(names, self.experts[layer], strict=True))
            names = [window_name(window) for window in windows]
            out[attention_group(layer)] = dict(zip(names, self.attention[layer], strict=True))
        return out

    def sets_by_count(self) -> Iterator[list[int]]:
        """Yields, for every layer and count, the numbers of the expert sets that keep that many experts."""
        for choices, numbers in zip(self.space.expert_choices, self.experts, strict=True):
            for count in sorted({choice.count for choice in choices}):
                same = [n for n, choice in zip(numbers, choices, strict=True) if choice.count == count]
                yield [n for n in same if n is not None]

    def keeping(self, numbers: set[int]) -> Space:
        """The space with only the expert sets of these numbers, and those without a number."""
        choices = tuple(
            tuple(c for n, c in zip(of_layer, choices, strict=True) if n is None or n in numbers)
            for of_layer, choices in zip(self.experts, self.space.expert_choices, strict=True)
        )
        return replace(self.space, expert_choices=choices)


def expert_mask(choice: ExpertChoice, experts: int) -> np.ndarray:
    """A mask over a layer's experts that is True for those kept."""
    mask = np.zeros(experts, bool)
    mask[list(choice.kept)] = True
    return mask
