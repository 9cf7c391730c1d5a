"""The parent of a search: a checkpoint that all processes of the search open, checked to have the same content."""

from __future__ import annotations

import datetime
import warnings
from dataclasses import asdict, replace
from pathlib import Path

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.tensors.fingerprint import fingerprint_of
from puzzle_jax.errors import ConfigError, PuzzleWarning
from puzzle_jax.evaluate.models import Model
from puzzle_jax.model.sharding import make_mesh
from puzzle_jax.processes.distributed import agree, from_primary, on_all
from puzzle_jax.search.recipe import Recipe


def read_parent(directory: Path, today: datetime.datetime | None = None, weights: str = "auto") -> Model:
    """Reads configuration, headers and chat files; weights are loaded when a stage first needs them.

    `today` is the date that the chat template sees; by default the current one.

    Raises CheckpointError for a damaged checkpoint and ConfigError for a parent whose layers differ in their number of
    experts.
    """
    parent = Model.open("parent", directory, today, weights)
    counts = {block.num_experts for block in parent.config.blocks}
    if len(counts) > 1:
        raise ConfigError(f"{directory} has layers of {sorted(counts)} experts, but a parent needs equal ones")
    return parent


def open_parent(recipe: Recipe) -> Model:
    """The parent, on a mesh over all processes' devices where the recipe asks for more than one.

    Raises PuzzleError, in all processes of a search, where one of them cannot open its parent, or has a parent or
    recipe that differs from the primary one's, and where there are too few devices. Warns of experts and heads that
    the mesh does not divide.
    """
    mesh = recipe.mesh

    def opened() -> tuple[Model, dict[str, object]]:
        parent = read_parent(recipe.parent, datetime.datetime.fromisoformat(day), recipe.weights)
        return parent, search_identity(recipe, parent) if mesh.processes > 1 else {}

    # Taken from the primary process, since hosts may be in different time zones.
    day = from_primary("day", lambda: datetime.datetime.now().isoformat())
    parent, identity = on_all("open the parent", opened)
    agree("the search", identity)
    if mesh.devices == 1:
        return parent
    parent = replace(parent, mesh=on_all("find the devices", lambda: make_mesh(mesh.data, mesh.model)))
    warn_of_undivided(parent.config, mesh.model)
    # Taken from the primary process, since hosts may differ in their memory.
    return replace(parent, weights=from_primary("weights", lambda: "packed" if parent.packed else "dense"))


def warn_of_undivided(config: ModelConfig, model: int) -> None:
    """Warns if the model axis does not divide the experts or heads and so saves no memory for them."""
    counts = {"experts": config.blocks[0].num_experts, "key-value heads": config.num_kv_heads}
    for name, count in counts.items():
        if count % model:
            warnings.warn(
                f"mesh.model is {model}, which does not divide the parent's {count} {name}: every device holds and "
                "runs all of them",
                PuzzleWarning,
                stacklevel=2,
            )


def search_identity(recipe: Recipe, parent: Model) -> dict[str, object]:
    """Values that all processes of a search must share, by name; the parent's directory may differ between hosts."""
    settings = asdict(recipe)
    del settings["run"], settings["parent"]  # only the primary process has a run; parents are compared by content
    return {"recipe": settings, "parent": {"content": parent.fingerprint}}


def run_identity(parent: Model) -> dict[str, str]:
    """The identity of a search's run directory: the content of the parent's weights."""
    return {"kind": "search", "parent": fingerprint_of(parent.description)}
