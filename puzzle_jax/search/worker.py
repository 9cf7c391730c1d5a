"""What every process of a search has, and what the workers do, which are all processes but the primary one."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from puzzle_jax.evaluate.models import Model
from puzzle_jax.model.sharding import make_mesh
from puzzle_jax.processes.distributed import agree, on_all
from puzzle_jax.search.parent import Parent
from puzzle_jax.search.processes import Team
from puzzle_jax.search.recipe import Recipe


def open_parent(recipe: Recipe) -> Parent:
    """The parent, on a mesh of this process's devices where the recipe asks for more than one.

    Raises, in all processes of a search, PuzzleError where one of them cannot open its parent, or has another parent or
    recipe than the primary one.
    """

    def opened() -> tuple[Parent, dict[str, Any]]:
        parent = Parent.open(recipe.parent)
        return parent, search_identity(recipe, parent) if recipe.mesh.processes > 1 else {}

    parent, identity = on_all("open the parent", opened)
    agree("the search", identity)
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.model) if recipe.mesh.devices != 1 else None
    return parent if mesh is None else replace(parent, mesh=mesh)


def search_identity(recipe: Recipe, parent: Parent) -> dict[str, Any]:
    """What all processes of a search work on, by name; a parent may lie in another place on each host."""
    settings = asdict(recipe)
    del settings["run"], settings["parent"]  # the one is the primary process's, the other told by its content
    content = Model("parent", parent.description, parent.chat).fingerprint
    return {"recipe": settings, "parent": {"content": content}}


def run_worker(recipe: Recipe, team: Team) -> None:
    """Takes part in what the primary process of a search broadcasts, until there is no more."""
    parent = open_parent(recipe)
    while (work := team.receive()) is not None:
        work.join(team, parent.params, parent.mesh)
