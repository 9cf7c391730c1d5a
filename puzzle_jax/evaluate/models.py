"""The models that are compared: checkpoint directories, opened before any work and loaded when first needed.

Left out: sharing in memory the weights that several models have in common.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jax.sharding import Mesh

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.describe import Description, describe_checkpoint
from puzzle_jax.convert_hf.load import cache_scales, load_weights
from puzzle_jax.convert_hf.tensors.fingerprint import fingerprint_of
from puzzle_jax.convert_hf.token_ids import check_tokenizer
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.cache_format import FLOAT8, CacheFormat
from puzzle_jax.model.network import compute_dtype
from puzzle_jax.model.spec import Params
from puzzle_jax.model.weights import check_stored, device_memory, stays_packed, weight_bytes
from puzzle_jax.tasks import Chat

CHAT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


_ROOM = 0.8
"""Share of a device's memory for weights and caches; the rest is left for what programs allocate."""


def fit_together(models: Iterable[Model], cache_bytes: int) -> bool:
    """Returns whether a device can hold the weights of all models and this many bytes of caches."""
    return sum(model.bytes for model in models) + cache_bytes <= _ROOM * device_memory()


@dataclass(frozen=True)
class Model:
    """A checkpoint to evaluate: its name in tables and messages, its configuration and checked headers, its own
    tokenizer and template, the mesh of its weights (None means the first device), and how the weights are held
    (`model.weights`).
    """

    name: str
    description: Description
    chat: Chat
    mesh: Mesh | None = None
    weights: str = "auto"

    @staticmethod
    def open(name: str, directory: Path, today: datetime.datetime | None = None, weights: str = "auto") -> Model:
        """Reads configuration, headers and chat files; the template sees the date `today`, by default now.

        Raises CheckpointError, naming the model and what is missing or damaged, and ConfigError where packed weights
        are requested from a checkpoint that has none.
        """
        try:
            model = Model(name, describe_checkpoint(directory), Chat.load(directory, today), weights=weights)
            check_stored(weights, model.description.form == "mxfp4")
            check_tokenizer(directory, model.chat.tokenizer, model.config.vocab_size)
            return model
        except PuzzleError as error:
            raise type(error)(f"model {name!r}: {error}") from None

    @property
    def config(self) -> ModelConfig:
        return self.description.config

    @property
    def directory(self) -> Path:
        return self.description.directory

    @property
    def packed(self) -> bool:
        """True if the experts stay packed (MXFP4) in memory."""
        stored = self.description.form == "mxfp4"
        return stays_packed(self.weights, self.config, stored, dtype=compute_dtype(), mesh=self.mesh)

    @cached_property
    def params(self) -> Params:
        """Weights for computing in `compute_dtype`, packed or dense, sharded over the mesh where there is one."""
        return load_weights(self.description, self.mesh, self.weights)

    @property
    def bytes(self) -> int:
        """Bytes of `params` on one device."""
        return weight_bytes(self.config, compute_dtype(), self.mesh, packed=self.packed)

    def release(self) -> None:
        """Drops the weights, which are loaded again when they are needed."""
        self.__dict__.pop("params", None)

    def cache_format(self, dtype: str) -> CacheFormat:
        """The format of a KV cache in this dtype; float8 uses the checkpoint's own scales where there are any."""
        return CacheFormat(dtype, cache_scales(self.description) if dtype == FLOAT8 else None)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the answers depend on: weights (`fingerprint_of`), configuration and chat files."""
        digest = hashlib.sha256(f"{fingerprint_of(self.description)}\n".encode())
        for file in CHAT_FILES:
            path = self.directory / file
            content = path.read_bytes() if path.is_file() else b""
            digest.update(f"{file} {len(content)}\n".encode() + content)
        return digest.hexdigest()[:16]
