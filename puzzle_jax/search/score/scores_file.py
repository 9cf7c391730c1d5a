"""scores.json: a space, and the score of every alternative that is not the parent's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from puzzle_jax.errors import PuzzleError
from puzzle_jax.search.score.space_scorer import ScoredSpace
from puzzle_jax.search.solve.problem import Scores


def scores_to_json(scored: ScoredSpace) -> list[dict[str, object]]:
    """The space with the score of each alternative that is not the parent's own."""
    indexed, table, layers = scored.indexed, scored.table, []
    estimates, of_groups = table.estimates(), scored.group_estimates
    for layer, entry in enumerate(scored.space.to_json()):
        window = scored.space.parent.blocks[layer].window

        def score(number: int | None, window: int | None = window) -> dict[str, object] | None:
            if number is None:
                return None
            found: dict[str, object] = {**asdict(table.score(number, window)), "estimate": float(estimates[number])}
            if of_groups:
                found["groups"] = {name: float(values[number]) for name, values in of_groups.items()}
            return found

        experts = zip(entry["experts"], indexed.experts[layer], strict=True)
        layers.append(
            {
                **entry,
                "experts": [{**choice, "score": score(number)} for choice, number in experts],
                "window_scores": [score(number) for number in indexed.attention[layer]],
            }
        )
    return layers


def scores_from_json(layers: Sequence[Mapping[str, Any]], groups: Sequence[str] = ()) -> Scores:
    """Reads the scores that the integer program minimises, and those of limited groups.

    Raises `PuzzleError` if the file has no scores of a group.
    """
    of_groups = {name: _scores(layers, lambda score, name=name: _of_group(score, name)) for name in groups}
    return replace(_scores(layers, lambda score: score["estimate"]), groups=of_groups)


def _scores(layers: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> Scores:
    def of(score: Mapping[str, Any] | None) -> float:
        return 0.0 if score is None else value(score)

    return Scores(
        experts=tuple(tuple(of(choice.get("score")) for choice in layer["experts"]) for layer in layers),
        attention=tuple(tuple(of(score) for score in layer["window_scores"]) for layer in layers),
    )


def _of_group(score: Mapping[str, Any], name: str) -> float:
    found = score.get("groups", {}).get(name)
    if found is None:
        raise PuzzleError(
            f"target.max_kl limits {name}, but scores.json has no scores of it; run the stage score again"
        )
    return found
