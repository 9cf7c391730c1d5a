"""Figures as PNG bytes, drawn without a display and without pyplot's global state.

matplotlib takes half a second to import, so it is imported when the first figure is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from puzzle_jax.files import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinct in colour and in grey (Okabe and Ito's palette), the reference first.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def frontier_figure(points: Mapping[str, Mapping[str, Json]], reference: str) -> bytes:
    """Accuracy against relative request rate, one line per model with its efforts as labelled points.

    `points` are those of evaluation.json; the highest effort of `reference` is the unit of rate.
    """
    figure, axes = canvas(7.0, 4.5)
    for position, (name, efforts) in enumerate(points.items()):
        ordered = sorted(efforts.items(), key=lambda item: item[1]["rate"]["value"])
        rates, accuracies = ([point[key] for _, point in ordered] for key in ("rate", "accuracy"))
        places = [(rate["value"], accuracy["value"]) for rate, accuracy in zip(rates, accuracies, strict=True)]
        colour, below = COLOURS[position % len(COLOURS)], 6 if name == reference else -13
        x, y = zip(*places, strict=True)
        style, bars = "o--" if name == reference else "s-", (_bars(accuracies), _bars(rates))
        axes.errorbar(x, y, *bars, style, label=name, color=colour, linewidth=1.5, elinewidth=0.8, capsize=2)
        for (effort, _), place in zip(ordered, places, strict=True):
            axes.annotate(effort, place, (6, below), textcoords="offset points", fontsize=9, color=colour)
    highest = list(points[reference])[-1]
    axes.set_xlabel(f"request rate relative to {reference} at {highest} effort")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    grid(axes)
    axes.legend(frameon=False)
    return png(figure, dpi=150)


def _bars(estimates: list[Json]) -> list[list[float]]:
    """Lengths of error bars below and above; an end without a limit has none."""
    below = [max(0.0, e["value"] - e["low"]) if e["low"] is not None else 0.0 for e in estimates]
    above = [max(0.0, e["high"] - e["value"]) if e["high"] is not None else 0.0 for e in estimates]
    return [below, above]


# Drawing -------------------------------------------------------------------------------------------------------------


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size, in inches, and its one plot."""
    figure = blank(width, height)
    return figure, figure.add_subplot()


def blank(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure of this size, in inches, without plots."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def grid(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.5)


def legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=9)


def png(figure: Figure, dpi: int = 130) -> bytes:
    """Returns PNG bytes, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
