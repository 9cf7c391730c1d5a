"""Kernels must pass a trial on the device at hand before they are used.

The first time that an operation of some shape class is traced for the GPU or TPU present, its kernel is run once on
small arrays of that class next to what XLA would do: it must compile, agree, and take no longer, forwards and, if the
operation has gradients, with them. The verdict is kept in a file by device, JAX and package (its version and the source
of its kernels). If a kernel does not pass, XLA is used; one that fails, rather than is slower, gives one warning.

A trial runs in a thread of its own, whatever is being traced meanwhile. While it runs, the file says so: if a kernel
takes the process down with it, the next run finds that in the file and does not try the kernel again.

The environment variable PUZZLE_KERNELS selects: `auto` is the above; `off` leaves all kernels out; with the name of a
kernel, that one is used unchecked wherever it accepts its arguments, and no other. Libraries are used only by name.

Programs that are only lowered (`platform.lowering_for`) have no device to try a kernel on; they use kernels untried.
Where XLA partitions a program by itself, none is used: XLA cannot shard kernels, so every device would do all the work.
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
"""Largest error allowed, as the difference from float32 results relative to the largest number of a row: TOLERANCE, or
TIMES_XLA times the error of XLA in the dtypes given, if that is more."""

SLOWER = 1.05
"""A kernel may take up to this many times as long as XLA: repeated timings of one program differ by as much."""

ROUNDS, ROUND_SECONDS = 7, 0.01

Result = TypeVar("Result")


@dataclass(frozen=True)
class Trial:
    """An operation on small arrays of a shape class.

    Attributes:
      shape_class: name of the class: dtypes, and the sizes that a kernel's program depends on.
      arrays: makes the arguments.
      run: takes the arguments and the keyword `implementation`, and returns one array.
      differentiable: positions of the arguments whose gradients must agree.
    """

    shape_class: str
    arrays: Callable[[], tuple[Any, ...]]
    run: Callable[..., Array]
    differentiable: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The outcome of a trial.

    Attributes:
      reason: why the kernel is not used; empty if it is.
      error, xla_error: largest difference of the kernel's, or XLA's, results and gradients from those of XLA in
        float32, relative to the largest number of a row.
      seconds, xla_seconds: median time of a call, by what was run ("forwards", "with gradients").
      trying: host and process id of a trial that has not ended.
    """

    reason: str = ""
    error: float | None = None
    xla_error: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    xla_seconds: Mapping[str, float] = field(default_factory=dict)
    trying: str = ""


class _Refused(Exception):
    """Raised with the reason why a kernel is not used."""


# Which kernels may serve ----------------------------------------------------------------------------------------------

_off: ContextVar[bool] = ContextVar("off", default=False)


@contextmanager
def without_kernels() -> Iterator[None]:
    """A context in which no kernel is used unless it is requested by name."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def mode() -> str:
    """PUZZLE_KERNELS, or "auto" if it is not set. Raises ConfigError for an invalid value."""
    return chosen_kernels((*KERNELS, *LIBRARIES))


def may_serve() -> bool:
    """Returns whether kernels may be used at all on the target platform."""
    return target_platform() in KERNELS.values() and mode() != "off" and not _off.get()


def admit(operation: str, name: str, trial: Callable[[], Trial] | None) -> None:
    """Returns if the kernel `name` may be used; the first time for a shape class, it is tried.

    Raises NotImplementedError with the reason if it may not, ConfigError for an invalid PUZZLE_KERNELS.
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
    """Returns whether XLA partitions what is being traced: on a mesh of several devices, outside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True) if not mesh.empty else ()
    return any(size > 1 and kind != jax.sharding.AxisType.Manual for size, kind in axes)


# Verdicts -------------------------------------------------------------------------------------------------------------

_verdicts: dict[str, Verdict] = {}


def verdict(operation: str, name: str, trial: Trial) -> Verdict:
    """The kernel's verdict, from a trial now or an earlier one. A new verdict is kept, and a failure gives one warning.

    With several processes, timings are ignored, since all must make the same choice.
    """
    key = f"{operation} {name} {trial.shape_class}"
    found = _verdicts.get(key)
    if found is None:  # no lock is held during a trial: what it runs may consist of operations with trials of their own
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
        if "RESOURCE_EXHAUSTED" in str(error):  # says nothing about the kernel: another run may have the memory
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
    """Returns whether the device still computes: after some kernel errors, no program of the process runs any more."""
    try:
        return float(jax.device_get(jnp.arange(3.0) * 2).sum()) == 6.0
    except jax.errors.JaxRuntimeError:
        return False


def _warn(key: str, reason: str) -> None:
    warnings.warn(f"kernel left out, XLA serves in its place: {key}: {reason}", PuzzleWarning, stacklevel=2)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _in_thread(run: Callable[[], Result]) -> Result:
    """Runs a function in a new thread, where nothing is being traced."""
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
    """Compares a kernel's errors and times to XLA's. Raises what the kernel raises, `_Refused` if it disagrees."""
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
    if that is larger. Raises `_Refused` if the kernel's error is too large or a number is not finite."""
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
    """Median seconds per call of each of `runs`, which take turns at several calls in a row."""
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
    """The file that keeps verdicts: $PUZZLE_KERNEL_VERDICTS, or ~/.cache/puzzle_jax/kernels.json."""
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
    """The key under which verdicts are kept: device, JAX and package."""
    try:
        version = metadata.version("puzzle-jax")
    except metadata.PackageNotFoundError:  # kernels that were copied into another project
        version = "?"
    return f"{device()} | jax {jax.__version__} | puzzle_jax {version} {_sources()}"


def read_verdicts() -> dict[str, Verdict]:
    """Verdicts of earlier trials with this device, JAX and package; none if the file cannot be read."""
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
    """Adds a verdict to the file, or removes it. If the file cannot be written, the next run repeats the trial."""
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
    """Returns whether the process of a trial may still be running: it is on this host, or the host is another one."""
    host, _, process = trying.rpartition(" ")
    if host != socket.gethostname():
        return True
    with suppress(ValueError, PermissionError):
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return False
    return True
