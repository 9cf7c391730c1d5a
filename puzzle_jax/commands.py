"""The parts that all commands share: warnings, errors, and the cache of compiled programs.

An error that the user can fix ends as one sentence on stderr and exit code 2: a `PuzzleError`, a full or read-only
disk, too little memory. Anything else is a bug and keeps its traceback. Only `guarded` does this, so that each kind of
error is handled once for all verbs.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from puzzle_jax.errors import ConfigError, PuzzleError, PuzzleWarning, shown
from puzzle_jax.files import system_error

INTERRUPTED = 130
BROKEN_PIPE = 141

_MENDABLE = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ENOTEMPTY", "ELOOP",
        "ENAMETOOLONG", "EIO", "EMFILE", "ENFILE", "EFBIG", "EBUSY", "ENOMEM",
    )
    if hasattr(errno, name)
}  # fmt: skip
# Libraries that write files wrap system errors in exception types of their own, but keep the system's wording.
_WRAPPED = re.compile(
    r"(No space left on device|Disk quota exceeded|Read-only file system|Permission denied|File name too long|"
    r"Too many open files|Input/output error)"
)
_DEVICE_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory")


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the closest of the known names, or an empty string where none is close."""
    known = list(known)
    close = difflib.get_close_matches(text, known, n=1, cutoff=0.6)
    # A name without its section and a truncated name have too few letters in common with the full name.
    tail = text.lstrip("-").rpartition(".")[2]
    close += [name for name in known if tail and name.lstrip("-").rpartition(".")[2] in (tail,)]
    close += [name for name in known if len(text.strip("-")) > 2 and name.startswith(text)]
    names = list(dict.fromkeys(close))[:2]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def checked_path(path: Path | str, name: str) -> Path:
    """The path; raises `ConfigError`, naming the setting, where it contains a NUL."""
    if "\0" in str(path):
        raise ConfigError(f"{name} is {shown(str(path))}, but a path holds no NUL")
    return Path(path)


def guarded(program: str, run: Callable[[], None], interrupted: str = "finished stages are kept") -> int:
    """Runs a command and returns its exit code.

    Args:
      program: name of the command, which precedes every message.
      interrupted: what to tell a user who interrupts it.

    Returns:
      0; 2 after an error that the user can fix; 130 after an interrupt; 141 where the output's reader has gone.
    """
    told: set[str] = set()

    def tell(message: Warning | str, category: type[Warning], *more: Any, **options: Any) -> None:
        if not issubclass(category, PuzzleWarning):
            before(message, category, *more, **options)
        elif str(message) not in told:
            told.add(str(message))
            say(f"{program}: warning: {message}")

    with warnings.catch_warnings(), _any_text(sys.stdout):
        before = warnings.showwarning
        if _shows_warnings():
            warnings.simplefilter("always", PuzzleWarning)
            warnings.showwarning = tell  # type: ignore[assignment]
        try:
            run()
            sys.stdout.flush()
        except SystemExit as error:  # help was printed, or an option was refused
            return int(error.code or 0)
        except KeyboardInterrupt:
            say(f"{program}: interrupted; {interrupted}")
            return INTERRUPTED
        except BrokenPipeError:
            _close_output()
            return BROKEN_PIPE
        except Exception as error:
            sentence = mendable(error)
            if sentence is None:
                raise
            say(f"{program}: {sentence}")
            return 2
    return 0


def mendable(error: BaseException) -> str | None:
    """One sentence for an error that the user can fix; None for a bug."""
    if isinstance(error, PuzzleError):
        return str(error)
    of_system = system_error(error)
    if of_system is not None and of_system.errno is not None and of_system.errno in _MENDABLE:
        return f"{_of_file(of_system)}{os.strerror(of_system.errno)}"
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return _line(str(error))  # from a library that sets no errno
    if isinstance(error, UnicodeEncodeError) and "surrogates not allowed" in str(error):
        return f"{shown(error.object)} holds half a surrogate pair, but texts must be valid Unicode"
    if isinstance(error, RecursionError):
        return "what was given is nested too deeply"
    if isinstance(error, MemoryError):
        return "the machine's memory does not suffice; smaller batches or fewer processes take less"
    text = str(error)
    if type(error).__name__ == "JaxRuntimeError" and _DEVICE_MEMORY.search(text):
        return f"the device's memory does not suffice ({_line(text)}); smaller batches or more devices (mesh) take less"
    if isinstance(error, ValueError) and "embedded null" in text:
        return "a path holds a NUL, which is no part of any path"
    wrapped = _WRAPPED.search(text)
    if wrapped is not None and (type(error).__module__ != "builtins" or isinstance(error, OSError | ValueError)):
        return f"a file cannot be written or read: {wrapped[0]} ({_line(text)})"
    return None


def say(message: str) -> None:
    """Prints one line to stderr, escaping characters that it cannot show."""
    line = " ".join(message.splitlines())
    try:
        print(line, file=sys.stderr)
    except UnicodeEncodeError:
        print(line.encode("ascii", "backslashreplace").decode(), file=sys.stderr)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/puzzle_jax.

    Kept are those that took longer than 0.3 seconds, or $JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS, to compile.
    """
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "puzzle_jax"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@contextlib.contextmanager
def _any_text(stream: object) -> Iterator[None]:
    """A context in which characters that the stream's encoding lacks are printed as escapes."""
    if not isinstance(stream, io.TextIOWrapper) or stream.errors != "strict":
        yield
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # it was closed
            stream.reconfigure(errors="strict")


def _shows_warnings() -> bool:
    """Returns whether warnings are shown, and not recorded by a `catch_warnings` around this."""
    handler = getattr(warnings, "_showwarnmsg_impl", None)  # what `catch_warnings(record=True)` replaces
    return getattr(handler, "__name__", "") == "_showwarnmsg_impl"


def _of_file(error: OSError) -> str:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' to '.join(names)}: " if names else ""


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


def _close_output(stream: TextIO | None = None) -> None:
    """Redirects the output to the null device, so that Python does not fail to flush it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())
