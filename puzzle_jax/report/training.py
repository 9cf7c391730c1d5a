"""A training run as one HTML page that opens offline, from its metrics.jsonl: how it went, and what went wrong.

    RUN/report.html

`SECTIONS` says which metrics are plotted where; others get small plots at the end, and metrics that a run does not have
are left out, so that one page serves reinforcement learning, distillation and whatever comes later. The same file gives
the same page. A value of null is a gap in its curve; where lines of the file do not have a metric at all, as most have
none of evaluation, its curve goes on.

Left out: smoothing, several runs in one figure (TensorBoard has both), and sample answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from puzzle_jax.config import EFFORTS
from puzzle_jax.errors import PuzzleError
from puzzle_jax.files import write_beside
from puzzle_jax.report.figures import COLOURS, blank, grid, png
from puzzle_jax.report.html import render
from puzzle_jax.runs import METRICS_FILE, REPORT_FILE, Metrics, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """A plot.

    Attributes:
      label: label of the values, with their unit.
      names: metrics that it shows; a name that ends in "/" stands for all that begin with it.
      share: whether values are shares, from 0 to 1.
      log: whether the scale is logarithmic where all values are above 0.
      stacked: whether the metrics are stacked, each as its share of their sum.
    """

    label: str
    names: tuple[str, ...]
    share: bool = False
    log: bool = False
    stacked: bool = False


_SECONDS = ("rollout_seconds", "reward_seconds", "score_seconds", "update_seconds")

SECTIONS: Mapping[str, tuple[Panel, ...]] = {
    "Reward": (
        Panel("mean reward", ("reward", "reward/")),
        Panel("pass rate", ("pass_rate", "pass_rate/"), share=True),
    ),
    "Evaluation": (
        Panel("accuracy", ("evaluation/accuracy", "evaluation/accuracy/"), share=True),
        Panel("mean tokens of an answer", ("evaluation/tokens", "evaluation/tokens/")),
        Panel("KL, nats per token", ("evaluation/kl",)),
        Panel("loss of the next token, nats", ("evaluation/next_token",)),
    ),
    "Length": (
        Panel("mean tokens of an answer", ("tokens", "tokens/")),
        Panel("truncated answers", ("truncated",), share=True),
    ),
    "Loss": (
        Panel("loss", ("loss",)),
        Panel("norm of the gradient", ("grad_norm",), log=True),
        Panel("learning rate", ("learning_rate",)),
    ),
    "Entropy and KL": (
        Panel("entropy, nats per token", ("entropy",)),
        Panel("KL to the reference, nats per token", ("kl",)),
    ),
    "Ratio of new to old policy": (
        Panel("ratio", ("ratio_mean", "ratio_max"), log=True),
        Panel("clipped tokens", ("clipped",), share=True),
    ),
    "Sampler against trainer": (
        Panel("gap", ("sampler_gap", "sampler_gap_max"), log=True),
        Panel("token-layers with other experts", ("experts_differ",), share=True),
    ),
    "Groups and lost answers": (
        Panel("groups", ("groups_kept", "groups_no_signal")),
        Panel("answers without a reward", ("lost",)),
    ),
    "Speed": (
        Panel("tokens per second", ("rollout_tokens_per_second", "update_tokens_per_second")),
        Panel("share of a step's seconds", _SECONDS, share=True, stacked=True),
    ),
}
"""Title -> plots, in the order of the page."""

OTHER = "other"
_SMALL = 12  # plots per figure of other metrics
_MARGINS = (0.75, 0.1, 0.5, 0.27)
"""Inches to the left of each plot (for its numbers and its label), to its right, below and above."""
_MARKED = 60  # curves of up to this many points have a mark at each

_MAIN: Mapping[str, bool | None] = {
    "reward": True,
    "pass_rate": True,
    "pass_rate/": True,
    "evaluation/accuracy": True,
    "evaluation/accuracy/": True,
    "evaluation/tokens": None,
    "evaluation/kl": False,
    "evaluation/next_token": False,
    "loss": False,
    "tokens": None,
    "truncated": False,
    "entropy": None,
    "kl": None,
    "sampler_gap": False,
    "lost": False,
}
"""Metrics of the table, and whether the best value is the highest; None where neither end is best."""

_MOST = float(np.finfo(np.float32).max)


class Series(NamedTuple):
    """A metric at the steps whose lines have it, in the order of the file; nan stands for null."""

    steps: Float[np.ndarray, "lines"]
    values: Float[np.ndarray, "lines"]


def write_training_report(run_dir: Path) -> Path:
    """Writes RUN/report.html from RUN/metrics.jsonl and returns its path.

    Raises PuzzleError where metrics.jsonl cannot be read, has no step, or holds a line, other than an incomplete last
    one, that is not an object with a step.
    """
    source = run_dir / METRICS_FILE
    lines = read_metrics(source)
    if not lines:
        raise PuzzleError(f"{source} has no line yet, so that there is nothing to show")
    metrics = _series(lines)
    steps, rows = [line["step"] for line in lines], list(_rows(metrics))
    page = render("training", source=_text(str(source)), steps=steps, rows=rows, figures=training_figures(metrics))
    write_beside(run_dir / REPORT_FILE, page.encode())
    return run_dir / REPORT_FILE


def training_figures(metrics: Mapping[str, Series]) -> dict[str, bytes]:
    """PNG files by title: the sections that have a metric, then all other metrics."""
    steps = np.concatenate([series.steps for series in metrics.values()] or [np.zeros(1)])
    span = float(steps.min()), float(steps.max())
    found, known = {}, set()
    for title, panels in SECTIONS.items():
        drawn = {panel: _expanded(panel.names, metrics) for panel in panels}
        drawn = {panel: names for panel, names in drawn.items() if any(name in metrics for name in names)}
        known.update(name for names in drawn.values() for name in names)
        if drawn:
            found[title] = _section(drawn, metrics, span)
    others = sorted(set(metrics) - known)
    for start in range(0, len(others), _SMALL):
        title = OTHER if len(others) <= _SMALL else f"{OTHER} {start // _SMALL + 1}"
        found[title] = _small_plots({name: metrics[name] for name in others[start : start + _SMALL]}, span)
    return found


def _series(lines: list[Metrics]) -> dict[str, Series]:
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                points.setdefault(name, []).append((line["step"], _number(value)))
    return {name: Series(*np.array(of_one, np.float64).T) for name, of_one in sorted(points.items())}


def _number(value: int | float | None) -> float:
    """A value to plot; nan where it is null or not finite in float32."""
    return float(value) if value is not None and abs(value) <= _MOST else math.nan


# The table -----------------------------------------------------------------------------------------------------------


def _rows(metrics: Mapping[str, Series]) -> Iterator[list[str]]:
    """First, last and best value, and the best one's first step, of the main metrics that the run has."""
    for pattern, highest in _MAIN.items():
        if pattern == "loss" and "reward" in metrics:
            highest = None  # a lower policy-gradient loss is no better
        for name in _expanded((pattern,), metrics):
            if name in metrics:
                yield [_text(name), *_cells(metrics[name], highest)]


def _cells(series: Series, highest: bool | None) -> list[str]:
    steps, values = (column[np.isfinite(series.values)] for column in series)
    if not len(values):
        return ["-"] * 4
    ends = [_short(values[0]), _short(values[-1])]
    if highest is None:
        return [*ends, "-", "-"]
    at = int(np.argmax(values) if highest else np.argmin(values))
    return [*ends, _short(values[at]), f"{steps[at]:.0f}"]


def _expanded(names: tuple[str, ...], metrics: Mapping[str, Series]) -> list[str]:
    """Names, with "NAME/" replaced by those it stands for: efforts from low to high, then alphabetically."""
    found = []
    for name in names:
        below = [other[len(name) :] for other in metrics if name.endswith("/") and other.startswith(name)]
        ordered = [effort for effort in EFFORTS if effort in below] + sorted(set(below) - set(EFFORTS))
        found += [name + rest for rest in ordered] if name.endswith("/") else [name]
    return found


def _short(value: float) -> str:
    return f"{value:,.1f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _text(name: str) -> str:
    """A name from any source, with unprintable characters escaped."""
    return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in name)


# Drawing -------------------------------------------------------------------------------------------------------------


def _section(panels: Mapping[Panel, list[str]], metrics: Mapping[str, Series], span: tuple[float, float]) -> bytes:
    """A figure of panels, each with its metrics' names, over the steps of the whole run."""
    from matplotlib.ticker import PercentFormatter

    columns = 3 if len(panels) == 3 else 2
    figure, places = _places(len(panels), columns, 9.6 / columns, 3.2, span)
    for axes, (panel, names) in zip(places, panels.items(), strict=True):
        drawn = {name: metrics[name] for name in names if name in metrics}
        if panel.stacked:
            _stack(axes, drawn)
        else:
            for name, series in drawn.items():
                _line(axes, series, name, names.index(name))  # the same colour whatever else is there
            if panel.log and all(np.all(series.values[np.isfinite(series.values)] > 0) for series in drawn.values()):
                axes.set_yscale("log")
        if panel.share:
            axes.set_ylim(0, 1 if panel.stacked else None)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel(panel.label)
        if len(drawn) > 1:
            axes.legend(frameon=panel.stacked, fontsize=8, markerscale=0, ncols=1 + len(drawn) // 8)
    return png(figure)


def _small_plots(metrics: Mapping[str, Series], span: tuple[float, float]) -> bytes:
    figure, places = _places(len(metrics), 3, 3.2, 2.1, span)
    for axes, (name, series) in zip(places, metrics.items(), strict=True):
        _line(axes, series, name, position=2)
        axes.set_title(_label(name), fontsize=9)
    return png(figure)


def _places(
    count: int, columns: int, width: float, height: float, span: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` plots, each of this width and height in inches."""
    from matplotlib.ticker import MaxNLocator

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = blank(columns * width, rows * height, layout=None)  # finding a layout takes as long as drawing
    left, right, bottom, top = _MARGINS
    figure.subplots_adjust(
        left=left / (columns * width),
        right=1 - right / (columns * width),
        bottom=bottom / (rows * height),
        top=1 - top / (rows * height),
        wspace=(left + right) / (width - left - right),
        hspace=(bottom + top) / (height - bottom - top),
    )
    places = [figure.add_subplot(rows, columns, position + 1) for position in range(count)]
    for axes in places:
        grid(axes)
        axes.set_xlabel("step")
        margin = 0.03 * (span[1] - span[0]) or 0.7
        axes.set_xlim(span[0] - margin, span[1] + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure, places


def _line(axes: Axes, series: Series, name: str, position: int) -> None:
    """Plots a curve with its gaps; points without neighbours, and all points of short curves, are marked."""
    finite = np.isfinite(series.values)
    before, after = np.append(False, finite[:-1]), np.append(finite[1:], False)
    marked = finite if len(finite) <= _MARKED else finite & ~before & ~after
    colour, style = COLOURS[position % len(COLOURS)], ("-", "--", ":")[position // len(COLOURS) % 3]
    [line] = axes.plot(*series, label=_label(name), color=colour, linestyle=style, linewidth=1.3)
    line.set(marker=".", markevery=np.flatnonzero(marked).tolist())


def _stack(axes: Axes, parts: Mapping[str, Series]) -> None:
    """Plots each part's share of the sum of all; a step is a gap where a part is null or the sum is 0."""
    steps = np.unique(np.concatenate([series.steps for series in parts.values()]))
    heights = np.zeros((len(parts), len(steps)))
    for row, series in zip(heights, parts.values(), strict=True):
        row[np.searchsorted(steps, series.steps)] = series.values
    total = heights.sum(axis=0)
    tops = np.cumsum(heights / np.where(total > 0, total, np.nan), axis=0)
    middles = (steps[1:] + steps[:-1]) / 2
    half = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
    edges = np.concatenate([steps[:1] - half, middles, steps[-1:] + half])
    for position, (name, top) in enumerate(zip(parts, tops, strict=True)):
        bottom = tops[position - 1] if position else np.zeros(len(steps))
        colour = COLOURS[(position + 1) % len(COLOURS)]
        axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, label=_label(name))


def _label(name: str) -> str:
    """A label for matplotlib: short, not hidden for a leading "_", and with "$" taken literally."""
    name = _text(name)
    name = name if len(name) <= 40 else f"{name[:18]}...{name[-19:]}"
    return f"{' ' * name.startswith('_')}{name}".replace("$", r"\$")
