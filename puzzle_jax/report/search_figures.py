"""Figures of a search, as PNG bytes: what alternatives cost in quality, what was chosen, and how predictions held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from puzzle_jax.config import window_name
from puzzle_jax.files import Json
from puzzle_jax.report.figures import COLOURS, canvas, grid, legend, png


def score_map(layers: Sequence[Mapping[str, Json]]) -> bytes:
    """KL of each layer's best set of every expert count, and of each window, on a logarithmic scale (scores.json)."""
    counts = sorted({choice["count"] for layer in layers for choice in layer["experts"]}, reverse=True)
    windows = sorted({w for layer in layers for w in layer["windows"][1:]}, reverse=True)
    values = np.full((len(counts) + len(windows), len(layers)), np.nan)
    for column, layer in enumerate(layers):
        for choice in layer["experts"]:
            row, kl = counts.index(choice["count"]), choice["score"]["kl"] if choice["score"] else 0.0
            values[row, column] = np.nanmin([values[row, column], kl])
        for window, score in zip(layer["windows"][1:], layer["window_scores"][1:], strict=True):
            values[len(counts) + windows.index(window), column] = score["kl"]
    figure, axes = canvas(max(6.0, 1.5 + 0.35 * len(layers)), 1.2 + 0.35 * len(values))
    shown = axes.imshow(np.log10(np.maximum(values, 1e-6)), aspect="auto", cmap="viridis_r", vmin=-4, vmax=1)
    axes.set_yticks(range(len(values)), [*(f"{count} experts" for count in counts), *(f"window {w}" for w in windows)])
    axes.set_xticks(range(len(layers)))
    axes.set_xlabel("layer")
    if len(layers) <= 12:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if value > 0.05 else "black"
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(shown, ax=axes)
    bar.set_label("KL alone in its layer, nats per token (log10)")
    return png(figure)


def architecture(parent: Sequence[Mapping[str, Json]], child: Sequence[Mapping[str, Json]]) -> bytes:
    """Experts kept per layer beside the parent's, and the attention window of each layer above."""
    layers = range(len(child))
    figure, axes = canvas(max(6.0, 1.5 + 0.35 * len(child)), 3.4)
    axes.bar(layers, [layer["num_local_experts"] for layer in parent], color="0.88", label="parent")
    axes.bar(layers, [layer["num_local_experts"] for layer in child], color=COLOURS[2], label="child")
    for index, (old, new) in enumerate(zip(parent, child, strict=True)):
        changed = old["sliding_window"] != new["sliding_window"]
        colour, weight = (COLOURS[1], "bold") if changed else ("0.4", "normal")
        name, place = window_name(new["sliding_window"]), (index, old["num_local_experts"])
        axes.annotate(
            name, place, (0, 4), textcoords="offset points", ha="center", fontsize=8, color=colour, fontweight=weight
        )
    axes.set_xticks(layers)
    axes.set_xlabel("layer (above: its window, coloured where narrowed)")
    axes.set_ylabel("experts")
    axes.margins(y=0.12)
    legend(axes)
    return png(figure)


def frontier(solutions: Mapping[str, Json], child: Mapping[str, float]) -> bytes:
    """Predicted KL against predicted speed-up, from solutions.json: the integer program's solution at every speed,
    uniform pruning, and the child ("speedup" and "score")."""
    figure, axes = canvas(6.5, 4.0)
    for part, label, style, colour in (
        ("frontier", "program", "o-", COLOURS[2]),
        ("uniform", "uniform", "x", COLOURS[1]),
    ):
        speedups, scores = ([point[name] for point in solutions[part]] for name in ("speedup", "score"))
        axes.plot(speedups, scores, style, color=colour, label=label, markersize=4)
    axes.plot(child["speedup"], child["score"], "*", color=COLOURS[0], markersize=13, label="child")
    axes.set_xlabel("predicted tokens per second over the parent's")
    axes.set_ylabel("predicted KL, nats per token")
    grid(axes)
    legend(axes)
    return png(figure)


def predicted_and_real(pool: Sequence[Mapping[str, Json]]) -> bytes:
    """The pool's predicted KL against that of the whole model on fresh traces, with standard errors."""
    figure, axes = canvas(4.6, 4.2)
    predicted, real = [entry["score"] for entry in pool], [entry["validation"]["kl"] for entry in pool]
    errors = [entry["validation"]["kl_se"] for entry in pool]
    axes.errorbar(predicted, real, yerr=errors, fmt="o", color=COLOURS[2], capsize=2, elinewidth=0.8)
    low, high = min(predicted + real), max(predicted + real)
    axes.plot([low, high], [low, high], "--", color="0.5", linewidth=1, label="as predicted")
    axes.set_xlabel("predicted KL")
    axes.set_ylabel("KL of the whole model, validation traces")
    grid(axes)
    legend(axes)
    return png(figure)


def costs_by_part(seconds: Mapping[str, Mapping[str, float]]) -> bytes:
    """Stacked seconds of one request's share of its batch, by model and part."""
    parts = list(dict.fromkeys(part for of_model in seconds.values() for part in of_model))
    figure, axes = canvas(6.5, 1.5 + 0.5 * len(seconds))
    left = np.zeros(len(seconds))
    for position, part in enumerate(parts):
        values = np.array([of_model.get(part, 0.0) for of_model in seconds.values()])
        axes.barh(range(len(seconds)), values, left=left, color=COLOURS[(position + 1) % len(COLOURS)], label=part)
        left += values
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.invert_yaxis()
    axes.set_xlabel("predicted seconds per request")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return png(figure)
