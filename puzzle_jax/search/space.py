"""The space of architectures: for each layer, the expert sets to keep and the windows to choose from.

Attention and experts are separate sub-blocks. Their scores add and their costs add, so a layer has one list of
alternatives for each, and the product exists only in the integer program (`puzzle_jax.search.solve.problem`).
(Puzzle, arXiv 2411.19146, section 3; for mixtures of experts arXiv 2602.11937.)

Left out: how experts are ranked (`puzzle_jax.search.rank.ranking`) and other alternatives (narrower experts, fewer
heads).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from math import prod
from typing import Any, Literal

from puzzle_jax.codec import to_plain
from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.costs.compute import Offer
from puzzle_jax.errors import ConfigError, check_range

Windows = tuple[tuple[int | None, ...], ...]
"""Windows of every layer, the parent's own first; None is full attention."""

DEFAULT_FRACTIONS = (1, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)


@dataclass(frozen=True)
class Restriction:
    """Limits on the alternatives of some layers; None leaves a side open.

    Attributes:
      layers: numbers and ranges, such as "0-3, 7".
      min_experts, max_experts: bounds of the number of experts kept; equal ones pin it.
      windows: allowed windows, "full" for full attention; the parent's own must be among them.
    """

    layers: str
    min_experts: int | None = None
    max_experts: int | None = None
    windows: tuple[int | Literal["full"], ...] | None = None

    def numbers(self, num_layers: int) -> list[int]:
        """The layers' numbers; raises `ConfigError` if the text does not list layers below `num_layers`."""
        found: list[int] = []
        for part in str(self.layers).split(","):
            match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
            if first > last or last >= num_layers:
                raise ConfigError(
                    f"space.restrict has layers {self.layers!r}, but must list numbers and ranges from 0 to "
                    f"{num_layers - 1}, such as '0-3, 7'"
                )
            found += range(first, last + 1)
        return found


@dataclass(frozen=True)
class ExpertChoice:
    """A set of experts that a layer keeps.

    Attributes:
      count: number of experts kept.
      kept: their ids in the parent, ascending.
      method: the ranking rule that proposed them, or several joined by "+" where they agree.
    """

    count: int
    kept: tuple[int, ...]
    method: str

    def __post_init__(self) -> None:
        if len(self.kept) != self.count:
            raise ConfigError(f"an expert choice has count {self.count}, but keeps {len(self.kept)} experts")
        if list(self.kept) != sorted(set(self.kept)):
            raise ConfigError(f"kept experts must be distinct and ascending, but are {list(self.kept)}")

    @property
    def name(self) -> str:
        return f"{self.count} {self.method}"


@dataclass(frozen=True)
class Space:
    """Alternatives of every layer of a parent.

    Attributes:
      parent: the model that alternatives replace blocks of.
      expert_choices: per layer, distinct expert sets.
      windows: per layer, windows (None is full attention), the parent's own first.

    Raises `ConfigError`, naming layer, value and rule, when an alternative cannot be built from the parent.
    """

    parent: ModelConfig
    expert_choices: tuple[tuple[ExpertChoice, ...], ...]
    windows: Windows

    def __post_init__(self) -> None:
        layers = self.parent.num_layers
        for name in ("expert_choices", "windows"):
            if len(getattr(self, name)) != layers:
                raise ConfigError(f"{name} has {len(getattr(self, name))} layers, but the parent has {layers}")
        for layer, block in enumerate(self.parent.blocks):
            self._check_experts(layer, block)
            self._check_windows(layer, block)

    def _check_experts(self, layer: int, block: BlockConfig) -> None:
        choices = self.expert_choices[layer]
        if not choices:
            raise ConfigError(f"layer {layer} has no expert choice")
        for choice in choices:
            if choice.count < self.parent.experts_per_token:
                raise ConfigError(
                    f"layer {layer} has a choice of {choice.count} experts, "
                    f"but at least experts_per_token ({self.parent.experts_per_token}) are needed"
                )
            if choice.kept[0] < 0 or choice.kept[-1] >= block.num_experts:
                raise ConfigError(
                    f"layer {layer} keeps experts {choice.kept[0]} to {choice.kept[-1]}, "
                    f"but the parent's are 0 to {block.num_experts - 1}"
                )
        for what, values in (
            ("kept experts", [c.kept for c in choices]),
            ("name", [c.name for c in choices]),
        ):
            if len(set(values)) != len(values):
                raise ConfigError(f"layer {layer} has two expert choices of the same {what}")

    def _check_windows(self, layer: int, block: BlockConfig) -> None:
        windows = self.windows[layer]
        if not windows or windows[0] != block.window:
            raise ConfigError(f"layer {layer} must list the parent's window ({_window(block.window)}) first")
        if len(set(windows)) != len(windows):
            raise ConfigError(f"layer {layer} lists a window twice: {', '.join(map(_window, windows))}")
        for window in windows[1:]:
            if window is None or (block.window is not None and window >= block.window):
                raise ConfigError(
                    f"layer {layer} lists window {_window(window)}, "
                    f"but alternatives must be narrower than the parent's ({_window(block.window)})"
                )

    @property
    def num_layers(self) -> int:
        return self.parent.num_layers

    @property
    def offer(self) -> Offer:
        """The distinct expert counts and windows, on which costs depend."""
        return Offer(self.parent, [self.expert_counts(layer) for layer in range(self.num_layers)], self.windows)

    @property
    def num_alternatives(self) -> int:
        """Number of sub-blocks that need a score: all that differ from the parent's."""
        experts = sum(
            choice.count < block.num_experts
            for choices, block in zip(self.expert_choices, self.parent.blocks, strict=True)
            for choice in choices
        )
        return experts + sum(len(windows) - 1 for windows in self.windows)

    @property
    def num_architectures(self) -> int:
        return prod(len(e) * len(w) for e, w in zip(self.expert_choices, self.windows, strict=True))

    def expert_counts(self, layer: int) -> tuple[int, ...]:
        """Distinct expert counts of a layer, largest first."""
        return tuple(sorted({choice.count for choice in self.expert_choices[layer]}, reverse=True))

    def describe(self) -> str:
        """Describes the space in a few lines; equal layers share one."""
        groups: dict[str, list[int]] = {}
        for layer in range(self.num_layers):
            counts = []
            for count in self.expert_counts(layer):
                sets = sum(choice.count == count for choice in self.expert_choices[layer])
                counts.append(f"{count}" if sets == 1 else f"{count} ({sets} sets)")
            windows = ", ".join(map(_window, self.windows[layer]))
            groups.setdefault(f"experts {', '.join(counts)}; window {windows}", []).append(layer)
        lines = [f"layer{'s' * (len(x) > 1)} {_ranges(x)}: {text}" for text, x in groups.items()]
        lines.append(
            f"{self.num_alternatives} alternatives in {self.num_layers} layers, "
            f"{_magnitude(self.num_architectures)} architectures"
        )
        return "\n".join(lines)

    def to_json(self) -> list[dict[str, Any]]:
        """One object per layer, without the parent."""
        layers = zip(self.expert_choices, self.windows, strict=True)
        return [{"experts": to_plain(choices), "windows": list(windows)} for choices, windows in layers]

    @staticmethod
    def from_json(parent: ModelConfig, layers: Sequence[dict[str, Any]]) -> Space:
        """The inverse of `to_json`."""
        choices = tuple(
            tuple(ExpertChoice(c["count"], tuple(c["kept"]), c["method"]) for c in layer["experts"]) for layer in layers
        )
        return Space(parent, choices, tuple(tuple(layer["windows"]) for layer in layers))


def candidate_counts(
    num_experts: int,
    experts_per_token: int,
    fractions: Sequence[int | float] = DEFAULT_FRACTIONS,
    divisor: int = 1,
) -> tuple[int, ...]:
    """Expert counts to offer, largest first: fractions of the parent's, rounded to multiples of the divisor.

    The fractions are in (0, 1], no count is below `experts_per_token`, and the divisor is the degree of expert
    parallelism.
    """
    check_range("divisor", divisor, 1)
    counts = set()
    for fraction in fractions:
        check_range("a fraction of experts", fraction, 0, 1, above=True)
        count = round(Fraction(fraction).limit_denominator(1024) * num_experts / divisor) * divisor
        if experts_per_token <= count <= num_experts:
            counts.add(count)
    if not counts:
        raise ConfigError(
            f"divisor is {divisor}, but no multiple of {divisor} near the given fractions of {num_experts} experts "
            f"is at least experts_per_token ({experts_per_token})"
        )
    return tuple(sorted(counts, reverse=True))


def candidate_windows(config: ModelConfig, extra: Iterable[int]) -> Windows:
    """Windows to offer per layer: the parent's own, and on its full layers the extra ones, widest first.

    A window that no context of the model exceeds is full attention and is left out.
    """
    widths = sorted(set(extra), reverse=True)
    for width in widths:
        check_range("a window", width, 1)
    useful = tuple(width for width in widths if width < config.max_position)
    return tuple((block.window, *(useful if block.window is None else ())) for block in config.blocks)


def narrower_windows(windows: Sequence[tuple[int | None, ...]], context: int) -> tuple[Windows, tuple[int, ...]]:
    """Windows per layer without the alternatives that cover a whole context; and the windows left out, widest first."""
    kept = tuple((own, *(w for w in others if w is None or w < context)) for own, *others in windows)
    left_out = {w for layer in windows for w in layer[1:] if w is not None and w >= context}
    return kept, tuple(sorted(left_out, reverse=True))


def restrict(
    counts: Sequence[tuple[int, ...]],
    windows: Sequence[tuple[int | None, ...]],
    restrictions: Iterable[Restriction],
) -> tuple[tuple[tuple[int, ...], ...], Windows]:
    """Expert counts and windows per layer that all restrictions allow.

    Raises `ConfigError`, naming the layer, if nothing is left, or if a layer could not keep the parent's window.
    """
    counts, windows = list(counts), list(windows)
    for rule in restrictions:
        for layer in rule.numbers(len(counts)):
            low, high = rule.min_experts or 0, counts[layer][0] if rule.max_experts is None else rule.max_experts
            left = tuple(count for count in counts[layer] if low <= count <= high)
            if not left:
                offered = ", ".join(map(str, counts[layer]))
                raise ConfigError(
                    f"space.restrict leaves layer {layer} no expert count of {low} to {high}; offered are {offered}"
                )
            counts[layer] = left
            if rule.windows is not None:
                allowed = {None if window == "full" else window for window in rule.windows}
                if windows[layer][0] not in allowed:
                    raise ConfigError(
                        f"space.restrict allows layer {layer} windows {', '.join(map(str, rule.windows))}, but must "
                        f"allow the parent's own ({_window(windows[layer][0])})"
                    )
                windows[layer] = tuple(window for window in windows[layer] if window in allowed)
    return tuple(counts), tuple(windows)


def distinct_choices(choices: Iterable[ExpertChoice]) -> tuple[ExpertChoice, ...]:
    """Merges choices that keep the same experts, largest first; their methods are joined by "+"."""
    methods: dict[tuple[int, ...], list[str]] = {}
    for choice in choices:
        names = methods.setdefault(choice.kept, [])
        if choice.method not in names:
            names.append(choice.method)
    merged = [ExpertChoice(len(kept), kept, "+".join(names)) for kept, names in methods.items()]
    return tuple(sorted(merged, key=lambda choice: -choice.count))


def _window(window: int | None) -> str:
    return "full" if window is None else str(window)


def _ranges(numbers: Sequence[int]) -> str:
    """Writes 0, 1, 2, 5 as "0-2, 5"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{first}-{more[-1]}" if more else f"{first}" for first, *more in runs)


def _magnitude(count: int) -> str:
    return f"{count:,}" if count < 10**6 else f"{count:.1e}".replace("e+", "e")
