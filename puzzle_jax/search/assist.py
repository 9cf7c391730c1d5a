"""What every process of a search has, and what those do that do not lead it."""

from __future__ import annotations

from puzzle_jax.model.sharding import make_mesh
from puzzle_jax.search.parent import Parent
from puzzle_jax.search.processes import Team
from puzzle_jax.search.recipe import Recipe


def open_parent(recipe: Recipe) -> Parent:
    """The parent, on a mesh of this process's devices where the recipe asks for more than one."""
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.model) if recipe.mesh.devices != 1 else None
    return Parent.open(recipe.parent, mesh)


def assist(recipe: Recipe, team: Team) -> None:
    """Takes part in what the first process of a search says, until there is no more."""
    parent = open_parent(recipe)
    while (work := team.hear()) is not None:
        work.join(team, parent.params, parent.mesh)
