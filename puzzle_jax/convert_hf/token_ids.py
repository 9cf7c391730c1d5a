"""Checks token ids in a checkpoint's files against the model's vocabulary: an id beyond it has no embedding.

In JAX an array that is indexed beyond its end returns its last row, without an error, so such ids are refused where a
model and its chat files are first opened together. Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tokenizers

from puzzle_jax.convert_hf.tensors.files import read_json
from puzzle_jax.errors import CheckpointError, shown
from puzzle_jax.files import Json

GENERATION = "generation_config.json"
NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_ids(data: Mapping[str, Json], source: Path, vocab_size: int) -> None:
    """Raises `CheckpointError` where one of `NAMES` in a config.json or generation_config.json is no token's id.

    Args:
      data: the file's content; ids may be missing, null or lists.
      source: the file, for messages.
      vocab_size: size of the model's vocabulary.
    """
    for name in NAMES:
        value = data.get(name)
        for index in value if isinstance(value, list) else [value]:
            whole = isinstance(index, int) and not isinstance(index, bool)
            if index is not None and not (whole and 0 <= index < vocab_size):
                raise CheckpointError(
                    f"{source}: {name} is {shown(value)}, but the model's tokens are 0 to {vocab_size - 1}"
                )


def check_tokenizer(directory: Path, tokenizer: tokenizers.Tokenizer, vocab_size: int) -> None:
    """Raises `CheckpointError` where a checkpoint's tokenizer or generation_config.json has ids beyond its model's.

    Args:
      directory: the checkpoint.
      tokenizer: the checkpoint's tokenizer.
      vocab_size: size of the model's vocabulary.
    """
    generation = directory / GENERATION
    if generation.is_file():
        check_ids(read_json(generation), generation, vocab_size)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    token = max(vocabulary, key=vocabulary.__getitem__, default=None)
    if token is not None and vocabulary[token] >= vocab_size:
        beyond = sum(index >= vocab_size for index in vocabulary.values())
        raise CheckpointError(
            f"{directory / 'tokenizer.json'} has {beyond} tokens beyond the model's vocabulary of {vocab_size}, the "
            f"last {shown(token)} with id {vocabulary[token]}; save the model with embeddings for them, or take the "
            "tokenizer that it was trained with"
        )
