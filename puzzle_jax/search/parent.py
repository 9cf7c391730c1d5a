"""The parent of a search: its checkpoint, opened when a stage first needs weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.describe import Description, describe_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.tensors.fingerprint import fingerprint_of
from puzzle_jax.convert_hf.token_ids import check_tokenizer
from puzzle_jax.errors import ConfigError
from puzzle_jax.model.network import compute_dtype, to_compute
from puzzle_jax.model.sharding import params_sharding
from puzzle_jax.model.spec import Params
from puzzle_jax.tasks import Chat


@dataclass(frozen=True)
class Parent:
    """A checkpoint directory; `open` checks it, weights come later.

    Attributes:
      directory: of the checkpoint.
      description: configuration and checked headers.
      mesh: where weights go; None is the first device.
    """

    directory: Path
    description: Description
    mesh: Mesh | None = None

    @staticmethod
    def open(directory: Path, mesh: Mesh | None = None) -> Parent:
        """Reads configuration, headers and chat files.

        Raises CheckpointError for a damaged checkpoint and ConfigError for a parent whose layers differ in their
        number of experts.
        """
        parent = Parent(directory, describe_checkpoint(directory), mesh)
        counts = {block.num_experts for block in parent.config.blocks}
        if len(counts) > 1:
            raise ConfigError(f"{directory} has layers of {sorted(counts)} experts, but a parent needs equal ones")
        check_tokenizer(directory, parent.chat.tokenizer, parent.config.vocab_size)
        return parent

    @property
    def config(self) -> ModelConfig:
        return self.description.config

    @cached_property
    def chat(self) -> Chat:
        return Chat.load(self.directory)

    @cached_property
    def params(self) -> Params:
        """Dense weights, over the mesh where there is one: float32 on CPU, bfloat16 elsewhere."""
        loaded = load_checkpoint(self.directory, mesh=self.mesh).params
        return dense_in_place(self.config, self.mesh)(loaded, compute_dtype())

    @cached_property
    def fingerprint(self) -> str:
        """Tells parents apart by their content."""
        return fingerprint_of(self.description)


def dense_in_place(config: ModelConfig, mesh: Mesh | None) -> Any:
    """The program by which loaded parameters become dense ones of a dtype, each where it belongs."""
    where = None if mesh is None else params_sharding(config, mesh)
    return jax.jit(to_compute, static_argnums=1, out_shardings=where)
