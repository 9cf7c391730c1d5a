"""Seeded damage to user input: values, texts, bytes and files."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS: list[Any] = [
    0, -1, 1, 2, 10**9, 10**18, 10**400, -(2**63), 2**64, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"),
]  # fmt: skip
TEXTS = [
    "", " ", "null", "a", "../../etc/passwd", "/dev/null", "x" * 5000, "[/bold]x[bold]", "\x00", "a\nb", "\u202egnirts",
    "😀", "{{ 1/0 }}", "<|return|>", "%s", "1e999", "-", "--help", "[", "{", "&a", "*a", "!!python/name:os.system", "~",
]  # fmt: skip
VALUES: list[Any] = [None, True, False, [], {}, [None], {"a": 1}, [[[]]], *NUMBERS, *TEXTS]


def deep(levels: int, kind: str = "[") -> str:
    return kind * levels


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a JSON value, its own included."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def mutated(value: Any, rng: random.Random, times: int = 1) -> Any:
    """A copy of a JSON value in which some values are replaced, deleted, renamed or wrapped in a list."""
    value = copy.deepcopy(value)
    for _ in range(times):
        paths: list[tuple[Any, ...]] = places(value)[1:] or [()]
        path = rng.choice(paths)
        if not path:
            return rng.choice(VALUES)
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        action = rng.choice(("replace", "replace", "delete", "rename", "wrap"))
        if action == "delete":
            del owner[path[-1]]
        elif action == "rename" and isinstance(owner, dict):
            owner[str(path[-1])[:-1] or "x"] = owner.pop(path[-1])
        elif action == "wrap":
            owner[path[-1]] = [owner[path[-1]]]
        else:
            owner[path[-1]] = rng.choice(VALUES)
    return value


def dumped(value: Any) -> str:
    """The value as JSON; texts that are not valid Unicode are written as escapes, and any number is allowed."""
    return json.dumps(value)


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes that were cut, flipped, repeated, or replaced."""
    data = bytearray(content)
    actions: list[Callable[[], bytes]] = [
        lambda: bytes(data[: rng.randrange(len(data) + 1)]),
        lambda: bytes(byte ^ (rng.random() < 0.01) * rng.randrange(256) for byte in data),
        lambda: bytes(data) * 2,
        lambda: bytes(data) + b"\xff\xfe",
        lambda: b"\xef\xbb\xbf" + bytes(data),
        lambda: b"",
        lambda: b"[" * 100_000,
        lambda: b'{"a": 1' + b"0" * 5000 + b"}",
        lambda: b'"\\ud800"',
        lambda: bytes(data).replace(b":", b"", 1),
        lambda: bytes(rng.randrange(256) for _ in range(200)),
    ]
    return rng.choice(actions)()


def damage_file(path: Path, rng: random.Random, elsewhere: Path) -> None:
    """Damages a file, or puts something else in its place."""
    action = rng.choice(("bytes", "bytes", "json", "json", "json", "gone", "directory", "link", "dangling"))
    if action == "json":
        try:
            value = json.loads(path.read_bytes())
            path.write_text(dumped(mutated(value, rng, rng.choice((1, 1, 2, 4)))))
            return
        except (ValueError, OSError):
            action = "bytes"
    if action == "bytes":
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
        return
    path.unlink()
    if action == "directory":
        path.mkdir()
    elif action == "link":
        path.symlink_to(elsewhere)
    elif action == "dangling":
        path.symlink_to(path.with_name("nowhere"))
