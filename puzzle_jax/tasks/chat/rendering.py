"""Rendering of chat templates in a separate process, which bounds the time and memory that a template can take.

A chat template is a program that comes with a checkpoint. Jinja's sandbox keeps it from files and from Python's
internals, but not from endless loops or unbounded texts, even within a single operation: only a separate process can be
held to limits of processor time and memory. One such process (`render_worker`) serves the whole program. It starts with
the first rendering, in a tenth of a second, and ends with the program; a rendering then takes about as long as in the
same process. A template that uses up its time or memory, or brings the process down, is refused in one sentence, and
the next rendering starts a new process.
Left out: a limit on memory where the operating system has none (RLIMIT_AS).
"""

from __future__ import annotations

import atexit
import datetime
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from puzzle_jax.errors import CheckpointError
from puzzle_jax.tasks.channel import receive_bytes, send_bytes, start
from puzzle_jax.tasks.chat import render_worker

EFFORT = "reasoning_effort"
"""The variable in which templates take the effort."""

RENDER_SECONDS = 5.0
"""Processor time that one rendering may take."""

RENDER_BYTES = 1 << 30
"""Limit of the address space of the process that renders."""

LONGEST_TEXT = 1 << 22
"""Most bytes of UTF-8 that a template may render: more than any context holds, and what a character tokenizer still
encodes in 2 GB."""

_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
# On an overloaded machine, processor time may come late, but not by this much.
_WAIT_SECONDS = 120.0
# The process must find the same jinja2; nothing else depends on its environment.
_PROGRAM = (
    "import runpy, sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); runpy.run_path({!r}, run_name='__main__')"
)


@dataclass(frozen=True)
class Template:
    """A checkpoint's chat template.

    Attributes:
      source, where: its Jinja text, and the file that messages name.
      today: the date that `strftime_now` formats.
      tokens: special tokens by their names in templates (`bos_token`).
    """

    source: str
    where: str
    today: datetime.datetime
    tokens: Mapping[str, str] = field(default_factory=dict, hash=False)

    def render(self, **variables: object) -> str:
        """Renders the template with these variables, which must be JSON values; they override tokens of the same name.

        Raises:
          CheckpointError: the template is no valid Jinja, raises any error, refuses the conversation, writes text that
            is not Unicode, or exceeds the limits of time, memory or text.
        """
        kind, text = _SERVICE.ask(self._key, self.source, self.today.isoformat(), {**self.tokens, **variables})
        if kind != render_worker.DONE:
            raise CheckpointError(f"the chat template {self.where} {text}")
        return text

    def uses(self, *texts: str) -> bool:
        """Returns whether one of the texts stands in the template, outside of its comments."""
        return any(text in self._code for text in texts)

    def render_prompt(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, object]) -> str:
        """Renders a conversation up to where the assistant begins, as `apply_chat_template` does; raises likewise."""
        return self.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **variables)

    @cached_property
    def _code(self) -> str:
        return _COMMENT.sub("", self.source)

    @cached_property
    def _key(self) -> str:
        return hashlib.sha256(f"{self.today.isoformat()} {self.source}".encode(errors="surrogatepass")).hexdigest()


class _Service:
    """The process that renders, and the templates that it holds. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._known: set[str] = set()
        self._owner = 0

    def ask(self, key: str, source: str, today: str, variables: Mapping[str, object]) -> tuple[bytes, str]:
        """The kind of answer, and the text or the reason why there is none."""
        with self._lock:
            if self._owner != os.getpid():  # A fork inherits its parent's process, which it must not use.
                self._process = self._channel = None
            for attempt in (1, 2):
                fresh = self._process is None
                if fresh:
                    self._start()
                request: dict[str, object] = {"key": key, "variables": variables}
                if key not in self._known:
                    request |= {"source": source, "today": today}
                try:
                    kind, text = self._exchange(json.dumps(request).encode())
                except TimeoutError:
                    self._end()
                    return render_worker.REFUSED, f"cannot be rendered: no answer came in {_WAIT_SECONDS:g} s"
                except (OSError, EOFError):
                    reason, by_time = self._end()
                    # An idle process may have been ended by anybody, which is not this template's fault.
                    if fresh or attempt == 2 or by_time:
                        return render_worker.REFUSED, reason
                except BaseException:  # An interrupt: the answer still to come must not be taken for the next one.
                    self._end()
                    raise
                else:
                    if kind == render_worker.DONE:
                        self._known.add(key)
                    elif kind == render_worker.BROKEN:
                        self._end()
                    return kind, text
            raise AssertionError("the second attempt returns")

    def close(self) -> None:
        """Ends the process, if it is this program's own."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._end()

    def _exchange(self, request: bytes) -> tuple[bytes, str]:
        assert self._channel is not None
        self._channel.settimeout(_WAIT_SECONDS)
        send_bytes(self._channel, request)
        answer = receive_bytes(self._channel, _WAIT_SECONDS)
        return answer[:1], answer[1:].decode()

    def _start(self) -> None:
        program = _PROGRAM.format(str(Path(render_worker.__file__)))
        # -I and -S: neither the working directory nor hooks of site-packages are used; the path is given.
        flags = ("-I", "-S")
        settings = [str(os.getpid()), str(RENDER_SECONDS), str(RENDER_BYTES), str(LONGEST_TEXT)]
        try:
            self._process, self._channel = start(
                program, flags, settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise CheckpointError(
                f"the process that renders chat templates cannot be started: {error.strerror or error}"
            ) from None
        self._known, self._owner = set(), os.getpid()

    def _end(self) -> tuple[str, bool]:
        """Ends the process; returns how it ended, as a reason, and whether its processor time was used up."""
        process, channel = self._process, self._channel
        self._process = self._channel = None
        assert process is not None and channel is not None
        channel.close()
        try:
            code = process.wait(1.0)  # It ends by itself once the channel is closed.
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code == -signal.SIGPROF:
            return f"cannot be rendered: it takes more than {RENDER_SECONDS:g} s of processor time", True
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"cannot be rendered: the process that renders it ended with {how}", False


_SERVICE = _Service()
atexit.register(_SERVICE.close)
