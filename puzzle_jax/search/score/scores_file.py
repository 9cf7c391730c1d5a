"""scores.json: a space, and the score of every alternative that is not the parent's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from puzzle_jax.search.score.space_scorer import ScoredSpace
from puzzle_jax.search.solve.problem import Scores


def scores_to_json(scored: ScoredSpace) -> list[dict[str, object]]:
    """The space with the score of each alternative that is not the parent's own."""
    indexed, table, layers = scored.indexed, scored.table, []
    estimates = table.estimates()
    for layer, entry in enumerate(scored.space.to_json()):
        window = scored.space.parent.blocks[layer].window

        def score(number: int | None, window: int | None = window) -> dict[str, object] | None:
            if number is None:
                return None
            return {**asdict(table.score(number, window)), "estimate": float(estimates[number])}

        experts = zip(entry["experts"], indexed.experts[layer], strict=True)
        layers.append(
            {
                **entry,
                "experts": [{**choice, "score": score(number)} for choice, number in experts],
                "window_scores": [score(number) for number in indexed.attention[layer]],
            }
        )
    return layers


def scores_from_json(layers: Sequence[Mapping[str, Any]]) -> Scores:
    """Reads the scores that the integer program minimises."""
    return Scores(
        experts=tuple(tuple(_estimate(choice.get("score")) for choice in layer["experts"]) for layer in layers),
        attention=tuple(tuple(_estimate(score) for score in layer["window_scores"]) for layer in layers),
    )


def _estimate(score: dict[str, Any] | None) -> float:
    return 0.0 if score is None else score["estimate"]
