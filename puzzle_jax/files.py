"""Small JSON and YAML files: read safely whatever they contain, and written so that there is never half a file.

Whatever such a file holds, reading it takes time and memory in proportion to its size: YAML aliases are counted before
they are expanded. Unusable content is refused in one sentence that names the file: invalid UTF-8, nesting that exhausts
the stack, numbers that Python does not convert, half a surrogate pair.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from puzzle_jax.errors import PuzzleError, shown

Json: TypeAlias = Any
"""A JSON or YAML value: a string, a number, a boolean, None, or a list or dictionary of such values."""

PARTIAL = ".partial-"
"""Part of the name of a file or directory that is still being written."""

MAX_YAML_NODES = 100_000
"""Most values that a YAML file may hold, each counted as often as aliases repeat it."""

_LINKED_BYTES = 1 << 20
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")
_SYSTEM_ERROR = re.compile(r"[(\[](?:os error|errno) (\d{1,3})[:)\]]", re.IGNORECASE)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def write_beside(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name in the same directory, then renames it."""
    beside = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")
    try:
        with naming(path):
            beside.write_bytes(content)
            beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error says what is wrong
            beside.unlink(missing_ok=True)
        raise


def linked_tree(source: Path, target: Path) -> None:
    """Copies the files of a directory into another; large ones become hard links where the system supports them."""

    def put(of: str, to: str) -> str:
        if os.path.getsize(of) >= _LINKED_BYTES:
            with contextlib.suppress(OSError):
                os.link(of, to)
                return to
        return shutil.copy2(of, to)

    shutil.copytree(source, target, symlinks=True, copy_function=put, dirs_exist_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of the file being written to system errors that name none, such as those of a full disk."""
    try:
        yield
    except Exception as error:
        found = system_error(error)
        if found is not None and found.errno is not None and found.filename is None:
            raise OSError(found.errno, os.strerror(found.errno), str(path)) from error
        raise


def system_error(error: BaseException) -> OSError | None:
    """The system error that an exception is, or that a file-writing library put into its message; None for others."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    text = str(error)
    if isinstance(error, OSError) and _CUT_SHORT.fullmatch(text):  # numpy's message for a full disk
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    found = _SYSTEM_ERROR.search(text)  # safetensors, tensorstore, pyarrow
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found is not None else None


def parse_json(text: str | bytes, where: str, error: type[PuzzleError] = PuzzleError, *, unique: bool = False) -> Any:
    """The value of a JSON text.

    Args:
      text: a string, or bytes in UTF-8.
      where: origin of the text, with which error messages begin ("answers.jsonl, line 3").
      error: exception to raise, with one sentence, where the text is not a JSON value in valid Unicode.
      unique: whether to refuse an object that has a name twice, of which Python would keep the last.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise error(f"{where} is nested too deeply to be read as JSON") from None
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not valid UTF-8: {problem.reason} at byte {problem.start}") from None
    except json.JSONDecodeError as problem:
        raise error(f"{where} cannot be read as JSON: {problem}") from None
    except _GivenTwice as problem:
        raise error(f"{where} gives {shown(problem.args[0])} twice") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise error(f"{where} holds a whole number of thousands of digits, which cannot be read") from None
    if _SURROGATE.search(text) and not is_unicode(value):
        raise error(f"{where} holds half a surrogate pair, but its texts must be valid Unicode")
    return value


class _GivenTwice(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _GivenTwice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def read_json(path: Path, error: type[PuzzleError] = PuzzleError) -> Any:
    """The value in a JSON file; raises `error`, with one sentence that names the file, where there is none."""
    return parse_json(read_bytes(path, error), str(path), error)


def read_object(path: Path, error: type[PuzzleError] = PuzzleError) -> dict[str, Any]:
    """The object in a JSON file; raises `error` when it cannot be read or holds something else."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error(f"{path} holds {type(value).__name__}, but must hold an object")
    return value


def read_text(path: Path, error: type[PuzzleError] = PuzzleError) -> str:
    """The UTF-8 text of a file; raises `error` where it cannot be read or decoded."""
    try:
        return read_bytes(path, error).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not valid UTF-8: {problem.reason} at byte {problem.start}") from None


def read_bytes(path: Path, error: type[PuzzleError] = PuzzleError) -> bytes:
    """The content of a file; raises `error` where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        raise error(f"{path!s} cannot be read: {getattr(problem, 'strerror', None) or problem}") from None


def is_unicode(value: Any) -> bool:
    """Returns whether all strings of a JSON value are valid Unicode, without half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _all_unicode(value: Any) -> bool:
    """Returns whether all strings of a YAML value, keys included, are valid Unicode."""
    if isinstance(value, str):
        return is_unicode(value)
    if isinstance(value, dict):
        return all(_all_unicode(part) for pair in value.items() for part in pair)
    return not isinstance(value, list | set) or all(map(_all_unicode, value))


def parse_yaml(text: str, where: str, error: type[PuzzleError] = PuzzleError) -> Any:
    """The value of a YAML text, with plain types only.

    Raises `error`, with one sentence that begins with `where`, for text that is not YAML, a mapping that has a key
    twice (PyYAML would keep the last), an alias of a node that contains it, and more than `MAX_YAML_NODES` values.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise error(f"{where} is nested too deeply to be read as YAML") from None
    except yaml.YAMLError as problem:
        raise error(f"{where} cannot be read as YAML: {' '.join(str(problem).split())}") from None
    except (ValueError, OverflowError) as problem:  # dates and numbers that Python cannot represent
        raise error(f"{where} holds a value that cannot be read: {str(problem).partition(';')[0]}") from None
    if _SURROGATE.search(text) and not _all_unicode(value):
        raise error(f"{where} holds half a surrogate pair, but its texts must be valid Unicode")
    return value


def read_yaml(path: Path, error: type[PuzzleError] = PuzzleError) -> Any:
    """The value in a YAML file; raises `error` as `parse_yaml` does, or where the file cannot be read."""
    return parse_yaml(read_text(path, error), str(path), error)


def _check_size(root: yaml.Node) -> None:
    """Raises `yaml.YAMLError` for a graph that has a cycle, or is larger than allowed when written as a tree."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) in open_nodes:
            raise yaml.YAMLError(f"the value in line {node.start_mark.line + 1} holds an alias of itself")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            pairs = isinstance(node, yaml.MappingNode)
            children = [child for pair in node.value for child in pair] if pairs else node.value
            sizes[id(node)] = 1 + sum(map(size, children))
            open_nodes.remove(id(node))
            if sizes[id(node)] > MAX_YAML_NODES:
                raise yaml.YAMLError(f"with its aliases it holds more than {MAX_YAML_NODES} values")
        return sizes[id(node)]

    size(root)


class _Loader(yaml.SafeLoader):
    """A loader that refuses a mapping that has a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"{key.value} is there twice, again in line {key.start_mark.line + 1}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)
