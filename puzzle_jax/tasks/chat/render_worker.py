"""The process in which chat templates are rendered; `rendering` starts it and says why.

It runs as a stand-alone file, so that it imports jinja2 and nothing of this package. Requests and answers are frames on
descriptor 0, a socket: a length of 8 bytes, then JSON in a request, and one letter with text in an answer. A rendering
that uses up its processor time is ended by a signal, even within a C function. Memory is limited where the system
supports it. The process ends with the one that started it.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes

SIZE = struct.Struct("!Q")
DONE, REFUSED, BROKEN = b"d", b"r", b"b"
"""First letter of an answer; the rendered text follows, or why there is none. After BROKEN the process ends."""

LONGEST_MESSAGE = 300
_LOOK_SECONDS = 2.0


class Refusal(jinja2.TemplateError):
    """Raised by a template itself, through `raise_exception`."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks text to train on; its body is rendered unchanged, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 - the form that jinja2 reads

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class MakeDict:
    """`dict` within a template: the function alone, not the type."""

    def __call__(self, *pairs: Any, **named: object) -> dict[Any, Any]:
        return dict(*pairs, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class Namespace(jinja2.utils.Namespace):
    """`namespace` within a template, without names that begin with an underscore."""

    def __init__(self, /, *pairs: Any, **named: object) -> None:
        attributes = dict(*pairs, **named)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def environment(today: datetime.datetime) -> jinja2.Environment:
    """The environment of templates: the options, functions and filters that transformers gives them."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda format: today.strftime(format)
    made.globals["dict"] = MakeDict()
    made.globals["namespace"] = Namespace
    return made


def one_line(error: BaseException, longest: int) -> str:
    """The message of an exception as one printable line of at most `longest` characters."""
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = ""
    message = message if message.isprintable() else ascii(message)[1:-1]
    return message if len(message) <= longest else message[: longest - 3] + "..."


def reason(error: BaseException) -> str:
    """The reason why a template gave no text, on one short and printable line."""
    message = one_line(error, LONGEST_MESSAGE)
    if isinstance(error, Refusal):
        return f"refused the conversation: {message}"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"is no valid Jinja: {message} (line {error.lineno})"
    if isinstance(error, RecursionError):
        return "cannot be rendered: it is nested too deeply, or calls itself without end"
    if isinstance(error, MemoryError):
        return "cannot be rendered: it takes more memory than a rendering may"
    if isinstance(error, UnicodeEncodeError):
        return "cannot be rendered: it writes half a surrogate pair, but its text must be valid Unicode"
    return f"cannot be rendered: {type(error).__name__}{': ' if message else ''}{message}"


def work(parent: int, seconds: float, memory: int, longest: int) -> None:
    """Renders the requests on descriptor 0 until it is closed or the process `parent` ends.

    Args:
      parent: id of the process that started this one.
      seconds: processor time that a rendering may take.
      memory: bytes of address space that this process may have.
      longest: most bytes of a rendered text.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent handles an interrupt from the terminal.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    limit_memory("RLIMIT_CORE", 0)
    limit_memory("RLIMIT_AS", memory)
    channel = socket.socket(fileno=0).makefile("rwb")
    templates: dict[str, jinja2.Template] = {}
    while (request := _received(channel, parent)) is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            kind, text = DONE, _rendered(json.loads(request), templates)
            if len(text) > longest:
                kind, text = REFUSED, f"renders more than {longest} bytes of text".encode()
        except MemoryError as error:
            kind, text = BROKEN, reason(error).encode()
        except Exception as error:
            kind, text = REFUSED, reason(error).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        channel.write(SIZE.pack(1 + len(text)) + kind + text)
        channel.flush()
        if kind == BROKEN:
            break


def _rendered(request: dict[str, Any], templates: dict[str, jinja2.Template]) -> bytes:
    key = request["key"]
    if "source" in request:
        today = datetime.datetime.fromisoformat(request["today"])
        templates[key] = environment(today).from_string(request["source"])
    return templates[key].render(**request["variables"]).encode()


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise Refusal(message)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace may have no attribute {name!r} with an underscore before it"
        )


def limit_memory(kind: str, most: int) -> None:
    """Limits a kind of memory of this process (RLIMIT_AS, RLIMIT_DATA, RLIMIT_CORE) where the system can."""
    with suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        limited = getattr(resource, kind)
        _, hardest = resource.getrlimit(limited)
        resource.setrlimit(limited, (most if hardest == resource.RLIM_INFINITY else min(most, hardest), hardest))


def _received(channel: io.BufferedRWPair, parent: int) -> bytes | None:
    """The content of the next frame; None when there will be no more."""
    while not select.select([0], [], [], _LOOK_SECONDS)[0]:
        if os.getppid() != parent:
            return None
    head = channel.read(SIZE.size)
    return channel.read(SIZE.unpack(head)[0]) if len(head) == SIZE.size else None


if __name__ == "__main__":
    with suppress(OSError):  # The parent is gone.
        work(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
