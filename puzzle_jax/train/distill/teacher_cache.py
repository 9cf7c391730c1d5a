"""A teacher's most likely tokens, computed once and kept, so that training need not run the teacher.

    DIR/ids.npy        int32 [positions, k]     most likely tokens, the likeliest first
    DIR/logits.npy     float16 [positions, k]   their logits, minus the largest
    DIR/log_total.npy  float32 [positions]      log sum exp over the vocabulary of (logit - largest) / temperature
    DIR/cache.json     what the cache was made from; written last

Positions are those that the loss counts: the one before each token of an answer, example after example. With k = 64 a
position takes 388 bytes. Files are read through the page cache, so memory does not grow with them. A cache serves one
temperature, since a log total is valid for no other (`losses.definitions.TopK`).

Left out: hidden states, so losses on them need the teacher itself; several processes writing together.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console

from puzzle_jax.errors import PuzzleError, shown
from puzzle_jax.files import PARTIAL, read_object, write_beside
from puzzle_jax.model.network import head_logits
from puzzle_jax.model.sharding import on_mesh
from puzzle_jax.model.spec import Params
from puzzle_jax.progress import progress
from puzzle_jax.train.losses.head_chunks import gather, split
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.rows import Example, Packed, packed
from puzzle_jax.train.student import Student

CACHE_FILE = "cache.json"
_FILES = {"ids": "int32", "logits": "float16", "log_total": "float32"}
_GROUP = 256  # tokens whose logits over the whole vocabulary are held at a time


class TeacherCache(NamedTuple):
    """A complete cache that matches the examples at hand.

    Attributes:
      ids, logits, log_total: arrays of the files, over all positions.
      starts: first position of every example, and the end of the last.
      prompt_lengths, lengths: tokens of every example's prompt, and of the whole example.
    """

    ids: Int[np.ndarray, "positions k"]
    logits: Float[np.ndarray, "positions k"]
    log_total: Float[np.ndarray, "positions"]
    starts: Int[np.ndarray, "examples_and_one"]
    prompt_lengths: Int[np.ndarray, "examples"]
    lengths: Int[np.ndarray, "examples"]

    def extras(self, index: int) -> dict[str, np.ndarray]:
        """The input of `top_k_kl` for one example, [tokens, ...]; 0 at positions that the loss does not count."""
        own = slice(int(self.starts[index]), int(self.starts[index + 1]))
        first = int(self.prompt_lengths[index]) - 1
        places = slice(first, int(self.lengths[index]) - 1)
        found = {}
        for name, values in zip(_FILES, self[:3], strict=True):
            rows = np.zeros((int(self.lengths[index]), *values.shape[1:]), values.dtype)
            rows[places] = values[own]
            found[f"teacher_{name}"] = rows
        return found


def open_cache(directory: Path, examples: Sequence[Example], identity: Mapping[str, object]) -> TeacherCache:
    """Opens an existing cache.

    Args:
      examples: the examples, in the order in which the cache was made.
      identity: identifies teacher, temperature and k, as JSON values.

    Raises PuzzleError where the cache is of other examples or another teacher, or is damaged.
    """
    held, wanted = read_object(directory / CACHE_FILE), _record(examples, identity)
    for name, value in wanted.items():
        if held.get(name) != value:
            raise PuzzleError(
                f"{directory} holds the cache of another run ({name} is {shown(held.get(name))}, but here it is "
                f"{shown(value)}); name another directory"
            )
    starts, prompts, lengths = _places(examples)
    arrays = {name: _read(directory / f"{name}.npy", dtype) for name, dtype in _FILES.items()}
    for name, shape in _shapes(int(starts[-1]), arrays["ids"].shape[-1]).items():
        if arrays[name].shape != shape:
            found = arrays[name].shape
            raise PuzzleError(f"{directory / name}.npy is damaged: it has shape {found} in place of {shape}")
    return TeacherCache(**arrays, starts=starts, prompt_lengths=prompts, lengths=lengths)


def _shapes(positions: int, k: int) -> dict[str, tuple[int, ...]]:
    return {"ids": (positions, k), "logits": (positions, k), "log_total": (positions,)}


def _read(path: Path, dtype: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise PuzzleError(f"{path} cannot be read: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or not array.ndim:
        raise PuzzleError(f"{path} is damaged: it holds no rows of {dtype}")
    return array


def make_cache(
    directory: Path,
    examples: Sequence[Example],
    student: Student,
    base: Params,
    placement: Placement,
    console: Console,
    *,
    k: int,
    temperature: float,
    rows: int,
    length: int,
    pad_id: int,
    identity: Mapping[str, object],
) -> TeacherCache:
    """Runs the teacher on every example and writes the cache; a run that fails leaves none.

    Args:
      directory: must not exist yet, or be empty.
      base: weights of the student's teacher, placed on their devices.
      k: tokens per position, at most the vocabulary.
      temperature: temperature of the loss that will read the cache.
      rows, length: shape of the batches that the teacher runs on; no example may be longer than `length`.
      identity: as for `open_cache`.

    Raises `PuzzleError` where there is no example, or one is longer than `length`.
    """
    if not examples:
        raise PuzzleError("there is no trace to ask the teacher about")
    starts, prompts, lengths = _places(examples)
    partial_directory = directory.with_name(f".{directory.name}{PARTIAL}{os.getpid()}")
    try:
        partial_directory.mkdir(parents=True)
        files = [
            np.lib.format.open_memmap(partial_directory / f"{name}.npy", "w+", np.dtype(_FILES[name]), shape)
            for name, shape in _shapes(int(starts[-1]), k).items()
        ]

        def number(index: int) -> dict[str, np.ndarray]:
            return {"example": np.full(int(lengths[index]), index, np.int64)}

        numbered = packed(examples, rows=rows, length=length, pad_id=pad_id, extras=number)
        ask = jax.jit(partial(top_k, student, k=k, temperature=temperature))
        with progress(console, "asking the teacher", len(examples)) as advance, on_mesh(placement.mesh):
            for batch in numbered:
                found = ask(base, placement.rows(batch._replace(extras={})))
                live = batch.weights > 0
                example, position = batch.extras["example"][live], batch.positions[live]
                place = starts[example] + position - (prompts[example] - 1)
                for file, values in zip(files, found, strict=True):
                    file[place] = np.asarray(values)[live]
                advance(len(np.unique(example)))
        for file in files:
            file.flush()
        write_beside(partial_directory / CACHE_FILE, (json.dumps(_record(examples, identity)) + "\n").encode())
        partial_directory.rename(directory)
    except BaseException:
        shutil.rmtree(partial_directory, ignore_errors=True)
        raise
    return open_cache(directory, examples, identity)


def top_k(student: Student, base: Params, batch: Packed, *, k: int, temperature: float) -> tuple[Array, Array, Array]:
    """The content of the files for every position [rows, length]: ids, logits and log total."""
    x = student.teacher_hidden(base, batch).x
    flat = x.reshape(-1, x.shape[-1])

    def of_group(x: Array) -> tuple[Array, Array, Array]:
        logits = head_logits(base, student.child.parent, x)
        largest, ids = jax.lax.top_k(logits, k)
        top = largest[:, :1]
        return ids, (largest - top).astype(jnp.float16), jax.nn.logsumexp((logits - top) / temperature, axis=-1)

    with jax.named_scope("top_k"):
        found = jax.lax.map(of_group, split(flat, -(-len(flat) // _GROUP)))
        return jax.tree.map(lambda leaf: gather(leaf, len(flat)).reshape(*x.shape[:2], *leaf.shape[2:]), found)


def _places(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where examples start among the counted positions, and the lengths of their prompts and of the examples."""
    prompts = np.array([example.prompt_length for example in examples], np.int64)
    lengths = np.array([len(example.tokens) for example in examples], np.int64)
    return np.concatenate([[0], np.cumsum(lengths - prompts)]), prompts, lengths


def _record(examples: Sequence[Example], identity: Mapping[str, object]) -> dict[str, object]:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.prompt_length} ".encode() + np.asarray(example.tokens, "<i4").tobytes())
    return {**json.loads(json.dumps(identity)), "examples": digest.hexdigest()[:16]}
