"""Kernels prove themselves where they run, before they serve.

The first time that an operation of some shape class is traced for the GPU or TPU present, its kernel is run once on
small arrays of that class beside what XLA would do: it must compile, agree, and take no longer, forwards and, where the
operation has them, with gradients. The verdict is kept in a file by device, JAX and package (its version and the source
of its kernels). A kernel that does not pass is one warning with the reason, and XLA serves.

A trial runs in a thread of its own, whatever is being traced meanwhile. While it does, the file says so: a kernel that
takes the process down with it is found there by the next run, and is not tried again.

The environment variable PUZZLE_KERNELS chooses: `auto` is this; `off` leaves all kernels out; the name of a kernel has
that one serve unchecked wherever it accepts its arguments, and no other. So does that of a library, never by itself.

Programs that are only lowered (`platform.lowering_for`) have no device to try a kernel on: there kernels serve. Where
XLA partitions a program by itself they never do: it cannot cut them, so that every device would do all of the work.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.environment import KERNELS, LIBRARIES, chosen_kernels
from puzzle_jax.errors import PuzzleWarning
from puzzle_jax.kernels.platform import lowered_for, target_platform
from puzzle_jax.kernels.shapes import Array

if TYPE_CHECKING:
    from collections.abc import Iterator

TOLERANCE, TIMES_XLA = 2.0**-5, 2.0
"""Largest difference of a number from what float32 gives, relative to the largest of its row: so much, or so many times
that of XLA in the dtypes given."""

SLOWER = 1.05
"""A kernel may take as many times XLA's seconds, which is what measuring again can show for the same program."""

ROUNDS, ROUND_SECONDS = 7, 0.01

Result = TypeVar("Result")


@dataclass(frozen=True)
class Trial:
    """An operation on small arrays of a shape class.

    Attributes:
      shape_class: names the class: dtypes, and the sizes that a kernel's program depends on.
      arrays: makes the arguments.
      run: of arguments, with the keyword `implementation`; its result is one array.
      differentiable: the arguments whose gradients must agree.
    """

    shape_class: str
    arrays: Callable[[], tuple[Any, ...]]
    run: Callable[..., Array]
    differentiable: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What a trial found.

    Attributes:
      reason: why the kernel does not serve; empty where it does.
      error, xla_error: largest difference from what XLA gives in float32, relative to the largest number of a row, of
        results and gradients.
      seconds, xla_seconds: median of a call, by what was run ("forwards", "with gradients").
      trying: host and process of a trial that has not ended.
    """

    reason: str = ""
    error: float | None = None
    xla_error: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    xla_seconds: Mapping[str, float] = field(default_factory=dict)
    trying: str = ""


class _Refused(Exception):
    """A reason for which a kernel does not serve."""


# Which kernels may serve ----------------------------------------------------------------------------------------------

_off: ContextVar[bool] = ContextVar("off", default=False)


@contextmanager
def without_kernels() -> Iterator[None]:
    """A context in which no kernel serves unless it is asked for by name."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def mode() -> str:
    """PUZZLE_KERNELS, or "auto" where it is not set. Raises ConfigError for what it may not be."""
    return chosen_kernels((*KERNELS, *LIBRARIES))


def may_serve() -> bool:
    """Returns whether kernels are chosen at all for the platform in force."""
    return target_platform() in KERNELS.values() and mode() != "off" and not _off.get()


def admit(operation: str, name: str, trial: Callable[[], Trial] | None) -> None:
    """Returns where the kernel `name` may serve; the first time for a shape class it is tried.

    Raises NotImplementedError with the reason where it may not, ConfigError for a PUZZLE_KERNELS that cannot be.
    """
    if KERNELS.get(name, target_platform()) != target_platform():
        raise NotImplementedError(f"for a {KERNELS[name].upper()}, but this is a {target_platform().upper()}")
    chosen = mode()
    if name in LIBRARIES and chosen != name:
        raise NotImplementedError("it serves by name only")
    if _off.get() or chosen not in ("auto", name):
        raise NotImplementedError(f"PUZZLE_KERNELS is {chosen}" if chosen != "auto" else "kernels are left out here")
    if trial is None:
        raise NotImplementedError("there is nothing to check it by")
    if _cut_by_xla():
        raise NotImplementedError("XLA cannot cut a kernel over devices")
    if chosen == name or lowered_for() is not None:
        return
    found = verdict(operation, name, trial())
    if found.reason:
        raise NotImplementedError(found.reason)


def _cut_by_xla() -> bool:
    """Returns whether what is traced is partitioned by XLA: on a mesh of several devices, outside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True) if not mesh.empty else ()
    return any(size > 1 and kind != jax.sharding.AxisType.Manual for size, kind in axes)


# Verdicts -------------------------------------------------------------------------------------------------------------

_verdicts: dict[str, Verdict] = {}


def verdict(operation: str, name: str, trial: Trial) -> Verdict:
    """What the kernel's trial found, now or before. Warns once where it does not serve, and writes it down.

    With several processes seconds do not count, since all must choose alike.
    """
    key = f"{operation} {name} {trial.shape_class}"
    found = _verdicts.get(key)
    if found is None:  # no lock is held meanwhile: what a trial runs may be made of operations with trials of their own
        found = _verdicts.setdefault(key, _judged(key, name, trial))
    if found.seconds and jax.process_count() == 1 and not found.reason:
        slow = [what for what, took in found.seconds.items() if took > SLOWER * found.xla_seconds[what]]
        if slow:
            ratio = found.seconds[slow[0]] / found.xla_seconds[slow[0]]
            return Verdict(f"{slow[0]} it takes {ratio:.2f} times XLA's time on {device()}")
    return found


def _judged(key: str, name: str, trial: Trial) -> Verdict:
    before = read_verdicts().get(key)
    if before is not None and not before.trying:
        return before
    if before is not None and not _alive(before.trying):
        found = Verdict("a process ended while it was tried")
        _write(key, found)
        _warn(key, found.reason)
        return found
    _write(key, Verdict(trying=f"{socket.gethostname()} {os.getpid()}"))
    try:
        found = _in_thread(partial(tried, name, trial))
    except NotImplementedError as refusal:
        found = Verdict(str(refusal.__cause__ or refusal))
    except _Refused as refusal:
        found = Verdict(str(refusal))
        _warn(key, found.reason)
    except jax.errors.JaxRuntimeError as error:
        found = Verdict(f"it does not run here: {_line(error)}")
        if "RESOURCE_EXHAUSTED" in str(error):  # says nothing of the kernel: another run may have the room
            _warn(key, found.reason)
            _write(key, None)
            return found
        if not _in_thread(_answers):
            _write(key, Verdict(f"the device no longer answered once it was tried: {_line(error)}"))
            raise RuntimeError(
                f"the device no longer answers since {key} was tried; run the same command again, which leaves it out"
            ) from error
        _warn(key, found.reason)
    except Exception as error:
        found = Verdict(f"it does not compile here: {type(error).__name__}: {_line(error)}")
        _warn(key, found.reason)
    except BaseException:
        _write(key, None)
        raise
    _write(key, found)
    return found


def _answers() -> bool:
    """Returns whether the device still computes, which no program of a process does after some errors of one kernel."""
    try:
        return float(jax.device_get(jnp.arange(3.0) * 2).sum()) == 6.0
    except jax.errors.JaxRuntimeError:
        return False


def _warn(key: str, reason: str) -> None:
    warnings.warn(f"kernel left out, XLA serves in its place: {key}: {reason}", PuzzleWarning, stacklevel=2)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _in_thread(run: Callable[[], Result]) -> Result:
    """Runs where nothing is being traced."""
    result: Future[Result] = Future()

    def work() -> None:
        try:
            result.set_result(run())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=work, name="kernel trial", daemon=True)
    thread.start()
    return result.result()


# A trial --------------------------------------------------------------------------------------------------------------


def tried(name: str, trial: Trial) -> Verdict:
    """Runs a kernel beside XLA for errors and seconds. Raises what the kernel raises, `_Refused` where it disagrees."""
    arrays = trial.arrays()
    programs = {"forwards": _results}
    if trial.differentiable:
        programs["with gradients"] = _gradients
    exact = jax.tree.map(_as_float32, arrays)
    errors, seconds, xla_seconds = [(0.0, 0.0)], {}, {}
    for what, program in programs.items():
        runs = [jax.jit(partial(program, trial, which)) for which in (name, None)]
        found, of_xla = (jax.block_until_ready(run(*arrays)) for run in runs)
        with jax.default_matmul_precision("highest"):
            expected = jax.jit(partial(program, trial, None))(*exact)
        for index, results in enumerate(zip(found, of_xla, expected, strict=True)):
            errors.append(_compared(*results, f"result {index} {what}"))
        seconds[what], xla_seconds[what] = _timed(runs, arrays)
    error, xla_error = map(max, zip(*errors, strict=True))
    return Verdict("", error, xla_error, seconds, xla_seconds)


def _as_float32(array: Array) -> Array:
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _results(trial: Trial, name: str | None, *arrays: Any) -> tuple[Array, ...]:
    if name is None:
        with without_kernels():
            return (trial.run(*arrays, implementation=None),)
    return (trial.run(*arrays, implementation=name),)


def _gradients(trial: Trial, name: str | None, *arrays: Any) -> tuple[Array, ...]:
    def total(*arrays: Any) -> Array:
        (out,) = _results(trial, name, *arrays)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out.astype(jnp.float32) * weights)

    return jax.grad(total, trial.differentiable)(*arrays)


def _compared(found: Array, of_xla: Array, expected: Array, what: str) -> tuple[float, float]:
    """Errors of a kernel and of XLA, relative to the largest number of a row, or to the root mean square of all numbers
    where that is more. Raises `_Refused` where the kernel's is too large, and for numbers that are none."""
    own, other, right = (np.asarray(each, np.float64) for each in (found, of_xla, expected))
    if not np.isfinite(own).all():
        raise _Refused(f"{what} has {np.count_nonzero(~np.isfinite(own))} numbers that are not finite")
    least = float(np.sqrt(np.mean(right**2))) or 1.0
    peaks = np.maximum(np.abs(right).max(axis=-1, keepdims=True), least)
    error, xla_error = (float((np.abs(each - right) / peaks).max(initial=0.0)) for each in (own, other))
    if error > max(TOLERANCE, TIMES_XLA * xla_error):
        raise _Refused(f"{what} has errors of {error:.2g} of a row's largest number, where XLA has {xla_error:.2g}")
    return error, xla_error


def _timed(runs: list[Callable[..., object]], arrays: tuple[Any, ...]) -> list[float]:
    """Median seconds of a call of each, of several in a row, in turns."""
    calls, seconds = [], [[] for _ in runs]
    for run in runs:
        began = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        calls.append(int(np.clip(ROUND_SECONDS / (time.perf_counter() - began), 1, 100)))
    for _ in range(ROUNDS):
        for run, count, took in zip(runs, calls, seconds, strict=True):
            began = time.perf_counter()
            jax.block_until_ready([run(*arrays) for _ in range(count)])
            took.append((time.perf_counter() - began) / count)
    return [median(took) for took in seconds]


# The file of verdicts -------------------------------------------------------------------------------------------------


def verdicts_file() -> Path:
    """Where verdicts are kept: $PUZZLE_KERNEL_VERDICTS, or ~/.cache/puzzle_jax/kernels.json."""
    return Path(os.environ.get("PUZZLE_KERNEL_VERDICTS") or Path.home() / ".cache" / "puzzle_jax" / "kernels.json")


def device() -> str:
    """Name of the device present."""
    return jax.local_devices()[0].device_kind


@cache
def _sources() -> str:
    """Digest of the kernels' source."""
    found = sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".json"):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def setup() -> str:
    """What verdicts hold for: device, JAX and package."""
    try:
        version = metadata.version("puzzle-jax")
    except metadata.PackageNotFoundError:  # kernels that were taken elsewhere
        version = "?"
    return f"{device()} | jax {jax.__version__} | puzzle_jax {version} {_sources()}"


def read_verdicts() -> dict[str, Verdict]:
    """Verdicts of earlier trials with this device, JAX and package; none where the file cannot be read."""
    known = {each.name for each in fields(Verdict)}
    entries = _read().get(setup(), {})
    return {
        key: Verdict(**{name: value for name, value in entry.items() if name in known})
        for key, entry in entries.items()
        if isinstance(entry, dict)
    }


def _read() -> dict[str, dict[str, Any]]:
    try:
        data = json.loads(verdicts_file().read_text())
    except (OSError, ValueError):
        return {}
    return {name: each for name, each in data.items() if isinstance(each, dict)} if isinstance(data, dict) else {}


def _write(key: str, found: Verdict | None) -> None:
    """Adds a verdict to the file, or takes it out. Where it cannot be written, the next run tries again."""
    path = verdicts_file()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        data = _read()
        entries = data.setdefault(setup(), {})
        if found is None:
            entries.pop(key, None)
        else:
            entries[key] = {name: value for name, value in asdict(found).items() if value not in ("", None, {})}
        with NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(json.dumps(data, indent=1, sort_keys=True) + "\n")
        os.replace(file.name, path)


def _alive(trying: str) -> bool:
    """Returns whether the process of a trial may still run: it does on this host, or the host is another."""
    host, _, process = trying.rpartition(" ")
    if host != socket.gethostname():
        return True
    with suppress(ValueError, PermissionError):
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return False
    return True
