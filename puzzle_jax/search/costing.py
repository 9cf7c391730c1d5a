"""The cost stages `cost` and `refine_costs`, and the check that the target can be reached at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from puzzle_jax.costs.compute import compute_costs
from puzzle_jax.costs.external import read_external
from puzzle_jax.costs.hardware import device_identity
from puzzle_jax.costs.measured import Measured
from puzzle_jax.costs.provider import Provider
from puzzle_jax.costs.roofline import Roofline
from puzzle_jax.costs.table import Costs
from puzzle_jax.costs.xla import Xla
from puzzle_jax.errors import PuzzleError
from puzzle_jax.progress import progress
from puzzle_jax.search.artifacts import COSTS, REFINED_COSTS, ROUTING
from puzzle_jax.search.context import Search
from puzzle_jax.search.solve.problem import Problem, Scores
from puzzle_jax.search.space import ExpertChoice, Space


def cost_inputs(search: Search) -> list[Path]:
    """The parent's configuration and any external costs file; raises PuzzleError if that file is missing."""
    external = search.recipe.external_costs
    if external is not None and not external.is_file():
        raise PuzzleError(f"costs is {external}, but there is no such file")
    return [search.parent.directory / "config.json", *([external] if external else [])]


def cost_settings(search: Search) -> dict[str, object]:
    source = search.recipe.costs
    return {
        "provider": "external" if search.recipe.external_costs else source,
        "device": device_identity() if source == "measured" else None,
        "scenarios": search.scenarios,
        "counts": search.counts,
        "windows": search.windows,
    }


def cost(search: Search, out: Path, kept: Path) -> None:
    """Writes the costs of every alternative, with evenly loaded experts."""
    external = search.recipe.external_costs
    if external:
        costs = read_external(external, search.offer, search.recipe.scenarios, search.parent.description.form)
    else:
        with progress(search.console, "timing blocks", None) as advance:
            costs = _computed(search, _provider(search.recipe.costs, lambda _, turns: advance(1, turns)))
    COSTS.write(out, costs)


def refine_costs(search: Search, out: Path, kept: Path) -> None:
    """Writes roofline costs with the expert loads that the traces showed; other costs are written as they are."""
    costs = COSTS.read(search.run)
    if costs.provider == "roofline" and search.recipe.external_costs is None:
        costs = _computed(search, Roofline(profile=ROUTING.read(search.run)))
    REFINED_COSTS.write(out, costs)


def check_target(search: Search) -> None:
    """Raises `InfeasibleError`, before long work, when no architecture can meet the target."""
    choices = tuple(
        tuple(ExpertChoice(count, tuple(range(count)), "any") for count in counts) for counts in search.counts
    )
    space = Space(search.parent.config, choices, search.evidenced_windows)
    zeros = Scores(
        experts=tuple(tuple(0.0 for _ in choices) for choices in space.expert_choices),
        attention=tuple(tuple(0.0 for _ in windows) for windows in space.windows),
    )
    Problem(space, zeros, COSTS.read(search.run), search.recipe.target).solve()


def _provider(source: str, advance: Callable[[int, int], None]) -> Provider:
    """The provider of seconds; `advance` is called with the numbers of finished turns and of all turns."""
    if source == "measured":
        return Measured(progress=advance)
    return Xla(progress=advance) if source == "xla" else Roofline()


def _computed(search: Search, provider: Provider) -> Costs:
    form = search.parent.description.form
    return compute_costs(search.offer, search.recipe.scenarios, form, provider, memory=Roofline())
