"""Checkpoints of a training run: the whole state, written while training continues.

    DIR/<step>    an Orbax v1 tree {path of a leaf: array}; its custom metadata holds the `Record`

A checkpoint gets its name by a rename once it is complete, so one that was being written when the process died is never
mistaken for a complete one. Restoring gives exactly the bits that were saved, on whatever mesh is asked for. The newest
few checkpoints are kept, and those with the lowest metric.

Random keys are stored as their key data. Left out: checks of values beyond those that Orbax's compression makes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from puzzle_jax.errors import CheckpointError, PuzzleError
from puzzle_jax.runs import canonical, difference

try:
    from orbax.checkpoint import v1 as ocp  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # releases in which v1 is still experimental
    from orbax.checkpoint.experimental import v1 as ocp

Leaf = jax.Array | jax.ShapeDtypeStruct
_DELETED = ".deleted-"
_UNFINISHED = ".orbax-checkpoint-tmp"


class Record(NamedTuple):
    """The data that a checkpoint holds besides the state.

    Attributes:
      step: number of the step that the state follows.
      identity: identity of the run.
      data: state of the data iterator after this step, as JSON.
      metric: metric of an evaluation at this step, of which lower is better; None where there is none.
    """

    step: int
    identity: dict[str, object]
    data: object
    metric: float | None


class Restored(NamedTuple):
    """A state and its record; `passed_over` says, newest first, which later checkpoints could not be read and why."""

    state: PyTree
    record: Record
    passed_over: tuple[str, ...]


class Checkpoints:
    """The checkpoints in one directory; as a context manager, waits on exit until the last one is written.

    Every process of a mesh makes one and calls its methods at the same points; only process 0 deletes files.

    Raises PuzzleError where the directory holds another run's checkpoints, or cannot be written.
    """

    def __init__(
        self, directory: Path, *, identity: Mapping[str, object], keep_last: int = 2, keep_best: int = 1
    ) -> None:
        self.directory = Path(directory).resolve()
        self.identity: dict[str, object] = json.loads(canonical(identity))
        self.keep_last, self.keep_best = keep_last, keep_best
        self._saving: tuple[Record, Any] | None = None
        self._tidies = jax.process_index() == 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
        except OSError as error:
            raise PuzzleError(f"{self.directory} cannot be written: {error.strerror}") from error
        self._records: dict[int, Record] = {}
        self._unreadable: dict[int, str] = {}
        for step in sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal()):
            self._read_record(step)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.finish()
        except PuzzleError:
            if error is None:  # else the first error is the one to report
                raise

    @property
    def records(self) -> tuple[Record, ...]:
        """Records of all complete checkpoints and of the one being written, in order of step."""
        records = self._records if self._saving is None else {**self._records, self._saving[0].step: self._saving[0]}
        return tuple(records[step] for step in sorted(records))

    @property
    def best(self) -> Record | None:
        """The record with the lowest metric, the earliest if several share it; None where none has a metric."""
        return min((r for r in self.records if r.metric is not None), key=lambda r: (r.metric, r.step), default=None)

    @property
    def holds_any(self) -> bool:
        """True if there is a checkpoint, readable or not."""
        return bool(self._records or self._unreadable or self._saving)

    def save(self, step: int, state: PyTree, *, data: object, metric: float | None = None) -> None:
        """Starts writing a state, which may be donated afterwards; replaces a checkpoint of the same step.

        Raises PuzzleError when this checkpoint or the previous one cannot be written.
        """
        self.finish()
        record = Record(step, self.identity, json.loads(canonical(data)), metric)
        path = self.directory / str(step)
        if path.exists() and self._tidies:
            self._delete(step)
        self._records.pop(step, None)
        try:
            response = ocp.save_async(str(path), _flat(_plain(state)), custom_metadata=record._asdict())
        except Exception as error:  # Orbax raises whatever its storage raised
            raise PuzzleError(f"{path} cannot be written: {_reason(error)}") from error
        self._saving = (record, response)

    def finish(self) -> None:
        """Waits until all is written, then deletes superseded checkpoints; raises PuzzleError when writing failed."""
        if self._saving is None:
            return
        (record, response), self._saving = self._saving, None
        try:
            response.result()
        except Exception as error:
            raise PuzzleError(f"{self.directory / str(record.step)} cannot be written: {_reason(error)}") from error
        self._records[record.step] = record
        self._prune()

    def restore(self, abstract: PyTree, step: int | None = None) -> Restored | None:
        """Returns the newest readable state, or that of `step`; None when there is no checkpoint.

        `abstract` is the `abstract_state` of a state of this run.

        Raises:
          CheckpointError: there are checkpoints, but none can be read, or there is none of `step`.
          PuzzleError: names, shapes or dtypes of a checkpoint's arrays are not those of `abstract`.
        """
        self.finish()
        wanted = _flat(_plain(abstract))
        passed = dict(self._unreadable)
        for chosen in sorted(self._records, reverse=True) if step is None else [step] * (step in self._records):
            path = str(self.directory / str(chosen))
            try:
                held: Any = ocp.metadata(path).metadata
                _same_arrays(held, wanted, path)
                arrays: Any = ocp.load(path, {name: _target(leaf) for name, leaf in wanted.items()})
            except PuzzleError:
                raise
            except Exception as error:  # Orbax raises whatever its storage raised
                passed[chosen] = f"{path} cannot be read: {_reason(error)}"
                continue
            # Unreadable checkpoints do not count among the newest; the next save at the same step replaces them.
            for damaged in passed:
                self._records.pop(damaged, None)
            state = jax.tree.unflatten(jax.tree.structure(abstract), [jnp.asarray(arrays[name]) for name in wanted])
            return Restored(jax.tree.map(_keyed, abstract, state), self._records[chosen], _newest_first(passed, chosen))
        if step is not None and step not in passed:
            raise CheckpointError(f"{self.directory} holds no checkpoint of step {step}")
        if passed:
            raise CheckpointError(f"no checkpoint can be read: {'; '.join(_newest_first(passed, -1))}")
        return None

    def _read_record(self, step: int) -> None:
        path = self.directory / str(step)
        try:
            held: Any = ocp.metadata(str(path)).custom_metadata
            record = Record(**held)
        except Exception as error:
            self._unreadable[step] = f"{path} cannot be read: {_reason(error)}"
            return
        if record.identity != self.identity:
            raise PuzzleError(
                f"{path} is a checkpoint of another run ({difference(record.identity, self.identity)}); "
                "name another directory, or remove this one if it is no longer needed"
            )
        self._records[step] = record

    def _prune(self) -> None:
        ranked = sorted((r for r in self._records.values() if r.metric is not None), key=lambda r: (r.metric, r.step))
        kept = {r.step for r in ranked[: self.keep_best]} | set(sorted(self._records)[-self.keep_last :])
        for step in sorted(self._records.keys() - kept):
            del self._records[step]
            if self._tidies:
                self._delete(step)

    def _delete(self, step: int) -> None:
        """Renames the directory first, so that a half-deleted checkpoint is not mistaken for a complete one."""
        gone = self.directory / f"{_DELETED}{step}"
        shutil.rmtree(gone, ignore_errors=True)
        (self.directory / str(step)).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        for path in self.directory.iterdir() if self._tidies else ():
            if path.name.startswith(_DELETED) or _UNFINISHED in path.name:
                shutil.rmtree(path, ignore_errors=True)


def abstract_state(state: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a state's arrays, in the structure of the state.

    Arrays that were never committed to a device (mostly scalars) have no sharding, and are restored uncommitted.
    """
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None), state
    )


def _plain(state: PyTree) -> PyTree:
    """The state with random keys replaced by their data; works on arrays and on `jax.ShapeDtypeStruct`s."""

    def plain(x: Leaf) -> Leaf:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        if isinstance(x, jax.Array):
            return jax.random.key_data(x)
        data = jax.eval_shape(jax.random.key_data, x)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)

    return jax.tree.map(plain, state)


def _keyed(like: jax.ShapeDtypeStruct, x: jax.Array) -> jax.Array:
    """The inverse of `_plain` for one array."""
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return x
    impl: list[Any] = []  # `key_impl` takes only arrays and tracers
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(x, impl=impl[0])


def _flat(tree: PyTree) -> dict[str, Leaf]:
    """Leaves by path, since Orbax does not keep our structures; in messages, paths name the leaves that differ."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves have one path"
    return flat


def _target(leaf: Leaf) -> np.ndarray | Leaf:
    return np.empty(leaf.shape, leaf.dtype) if leaf.sharding is None else leaf


def _same_arrays(held: Mapping[str, Any], wanted: Mapping[str, Any], path: str) -> None:
    for name in sorted({*held, *wanted}):
        there, here = (_described(tree.get(name)) for tree in (held, wanted))
        if there != here:
            raise PuzzleError(f"{path} does not fit this run: {name} is {there} there, but {here} here")


def _described(leaf: Any) -> str:
    return "missing" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _newest_first(passed: Mapping[int, str], than: int) -> tuple[str, ...]:
    return tuple(passed[step] for step in sorted(passed, reverse=True) if step > than)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
