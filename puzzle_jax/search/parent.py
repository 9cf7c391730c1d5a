"""The parent of a search: a checkpoint that all processes of the search have opened, with the same content."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from puzzle_jax.convert_hf.tensors.fingerprint import fingerprint_of
from puzzle_jax.errors import ConfigError
from puzzle_jax.evaluate.models import Model
from puzzle_jax.model.sharding import make_mesh
from puzzle_jax.processes.distributed import agree, on_all
from puzzle_jax.search.recipe import Recipe


def read_parent(directory: Path, weights: str = "auto") -> Model:
    """Reads configuration, headers and chat files; weights are loaded when a stage first needs them.

    Raises CheckpointError for a damaged checkpoint and ConfigError for a parent whose layers differ in their number of
    experts.
    """
    parent = Model.open("parent", directory, weights=weights)
    counts = {block.num_experts for block in parent.config.blocks}
    if len(counts) > 1:
        raise ConfigError(f"{directory} has layers of {sorted(counts)} experts, but a parent needs equal ones")
    return parent


def open_parent(recipe: Recipe) -> Model:
    """The parent, on a mesh of this process's devices where the recipe asks for more than one.

    Raises PuzzleError, in all processes of a search, where one of them cannot open its parent, or has a parent or
    recipe that differs from the primary one's.
    """

    def opened() -> tuple[Model, dict[str, object]]:
        parent = read_parent(recipe.parent, recipe.weights)
        return parent, search_identity(recipe, parent) if recipe.mesh.processes > 1 else {}

    parent, identity = on_all("open the parent", opened)
    agree("the search", identity)
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.model) if recipe.mesh.devices != 1 else None
    return parent if mesh is None else replace(parent, mesh=mesh)


def search_identity(recipe: Recipe, parent: Model) -> dict[str, object]:
    """Values that all processes of a search must share, by name; the parent's directory may differ between hosts."""
    settings = asdict(recipe)
    del settings["run"], settings["parent"]  # only the primary process has a run; parents are compared by content
    return {"recipe": settings, "parent": {"content": parent.fingerprint}}


def run_identity(parent: Model) -> dict[str, str]:
    """The identity of a search's run directory: the content of the parent's weights."""
    return {"kind": "search", "parent": fingerprint_of(parent.description)}
