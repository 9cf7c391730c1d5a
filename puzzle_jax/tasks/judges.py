"""Judging of answers in processes of their own: whatever a reward function does costs its one sample, never the run.

A reward is the score of the problem's own task, or a function of the user's, `path/to/file.py:name` or
`package.module:name`, which is called for every answer, cut off or not:

    def reward(answer: Answer, score: Callable[[], float]) -> float:
        return score() - 0.0001 * answer.tokens

`score()` is the task's own score, and 0 for an answer that was cut off. Any finite number is a reward. An answer is
lost when the function raises, takes longer than the time limit, returns anything else, or ends its process.

The processes are fresh interpreters (`judge_worker`) with the parent's `sys.path`, started anew after every hang and
death: they import no JAX and need no guard around the user's main program. Hash seed and JAX platform (cpu) are fixed
in them. What is printed goes to stderr. They end with the parent, however it ends; where a C function holds the
interpreter, soon after the time limit. A file is read once, so that a run has one reward function though it is edited.
Left out: limits on memory, files or network (the function is the user's own code), rewards of a whole group.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.tasks.base import Problem

# Loading a user's function, or a task, may take this long; and so often in a row a new process may fail to start.
_START_SECONDS, _STARTS = 300.0, 3
_SEND_SECONDS, _REAP_SECONDS = 60.0, 10.0
_LONGEST_WAIT_SECONDS = 60.0  # that a selector is asked for at once
_SIZE = struct.Struct("!Q")
# sys.path is given as text: PYTHONPATH would also reach programs, maybe of another Python, that a function starts.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from puzzle_jax.tasks.judge_worker import work; work(int(sys.argv[2]))"
)


@dataclass(frozen=True)
class Answer:
    """What is judged.

    Attributes:
      problem: what was asked.
      effort: reasoning effort that was asked for.
      analysis: text of the analysis channel.
      final: text of the final channel.
      tokens: number of the completion's.
      truncated: whether the completion was cut off at its limit.
    """

    problem: Problem
    effort: str
    analysis: str
    final: str
    tokens: int
    truncated: bool


class Judgement(NamedTuple):
    """What an answer is worth.

    Attributes:
      reward: the finite number, or None where it was lost.
      reason: why it was lost, as one short clause ("raised ValueError: no number", "took longer than 10 s",
        "returned nan", "ended its process with exit code 3"); None where it was not.
    """

    reward: float | None
    reason: str | None


@dataclass(frozen=True)
class Setup:
    """What a worker is told first.

    Attributes:
      function: the user's, as it was given; None asks the problem's task.
      source: of the function's file; None for a module.
      time_limit: of one answer, in seconds.
    """

    function: str | None
    source: bytes | None
    time_limit: float


class Judges:
    """Processes that judge answers, until `close`, or the end of a `with` block.

    Attributes:
      lost: how many answers were lost since the start, by kind: "raised", "time", "value" or "died".
    """

    def __init__(self, *, function: str | None = None, time_limit: float = 10.0, processes: int = 1) -> None:
        """Loads the function, in a first process.

        Args:
          function: the user's; None: the problem's own task scores, and an answer that was cut off is worth 0.
          time_limit: of one answer, in seconds, without what loading its task takes.
          processes: at most that many judge at the same time; a function of the answer alone gives the same rewards
            with any number.

        Raises:
          ConfigError: a number is out of range, or there is no such function; the message names the setting
            `reward`, `time_limit` or `judges`.
        """
        if not math.isfinite(time_limit) or time_limit <= 0:
            raise ConfigError(f"time_limit is {time_limit:g}, but must be a finite number of seconds above 0")
        if processes < 1:
            raise ConfigError(f"judges is {processes}, but must be at least 1")
        self.lost: Counter[str] = Counter()
        self._setup = Setup(function, _source(function), time_limit)
        self._processes = processes
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._closed = False
        self._starts_left = 1
        try:
            self._start()
            while not self._workers[0].ready:
                for _ in self._news():
                    pass
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """The judgement of every answer, in the same order.

        Raises:
          PuzzleError: the function can no longer be loaded in a new process.
        """
        if self._closed:
            raise RuntimeError("the judges were closed")
        found: dict[int, Judgement] = {}
        if self._setup.function is None:
            found = {index: Judgement(0.0, None) for index, answer in enumerate(answers) if answer.truncated}
        waiting = deque(index for index in range(len(answers)) if index not in found)
        try:
            while len(found) < len(answers):
                self._employ(answers, waiting)
                found.update(self._news())
        except BaseException:
            # Nothing of this call may be taken for a result of the next one.
            self._end(*self._workers)
            raise
        return [found[index] for index in range(len(answers))]

    def close(self) -> None:
        """Ends all processes; may be called again."""
        self._closed = True
        self._end(*self._workers)
        self._selector.close()

    def _employ(self, answers: Sequence[Answer], waiting: deque[int]) -> None:
        """Gives the next waiting answers to idle workers; starts workers that are needed."""
        for worker in list(self._workers):
            if worker.idle and waiting:
                try:
                    send(worker.channel, answers[waiting[0]])
                except OSError:
                    self._end(worker)  # It died while idle, which is not this answer's fault.
                else:
                    worker.index = waiting.popleft()
                    worker.allow(_START_SECONDS)
        starting = sum(not worker.ready for worker in self._workers)
        for _ in range(min(len(waiting) - starting, self._processes - len(self._workers))):
            self._start()

    def _news(self) -> Iterator[tuple[int, Judgement]]:
        """Waits until a worker says something or has used up its time; index and judgement of what is now decided."""
        left = min(worker.deadline for worker in self._workers) - time.monotonic()
        for key, _ in self._selector.select(min(max(left, 0.0), _LONGEST_WAIT_SECONDS)):
            yield from self._hear(key.data)
        late = [worker for worker in self._workers if worker.deadline < time.monotonic()]
        # Who has spoken by now, perhaps in time, is heard in the next round.
        speaking = [key.data for key, _ in self._selector.select(0)] if late else []
        for worker in late:
            if worker not in speaking:
                yield from self._give_up(worker, "time")

    def _hear(self, worker: _Worker) -> Iterator[tuple[int, Judgement]]:
        try:
            said, what = receive(worker.channel)
        except (EOFError, OSError):
            yield from self._give_up(worker, "time" if worker.deadline < time.monotonic() else "died")
            return
        if said == "ready":
            self._starts_left = _STARTS
            worker.ready = True
            worker.rest()
        elif said == "refused":
            self._end(worker)
            self._not_started(what)
        elif said == "begun":
            worker.allow(self._setup.time_limit)
        else:
            reward, kind, reason = what
            if reward is None:
                self.lost[kind] += 1
            index = worker.rest()
            assert index is not None
            yield index, Judgement(reward, reason)

    def _give_up(self, worker: _Worker, kind: str) -> Iterator[tuple[int, Judgement]]:
        """Ends a worker that hangs or died: its answer is lost, unless it had none."""
        self._end(worker)
        reason = f"took longer than {worker.allowed:g} s" if kind == "time" else _ended(worker.process.returncode)
        if worker.index is not None:
            self.lost[kind] += 1
            yield worker.index, Judgement(None, reason)
        elif not worker.ready:
            function = self._setup.function
            if function is None:
                self._not_started(f"a process that judges answers {reason} before it was ready")
            else:
                self._not_started(f"reward is {function!r}, but loading {function.rpartition(':')[0]} {reason}")

    def _not_started(self, message: str) -> None:
        self._starts_left -= 1
        if self._starts_left <= 0:
            raise PuzzleError(message) if self._setup.function is None else ConfigError(message)

    def _start(self) -> None:
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                # -P and -u: nothing is imported from the working directory; what is printed before a hang is seen.
                [sys.executable, "-P", "-u", "-c", _PROGRAM, json.dumps(path), str(os.getpid())],
                env={**os.environ, "PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"},
                stdin=theirs.fileno(),
                stdout=2,
                start_new_session=True,  # An interrupt from the terminal is the parent's affair.
            )
        worker = _Worker(process, ours)
        worker.allow(_START_SECONDS)
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        ours.settimeout(_SEND_SECONDS)
        with suppress(OSError):  # Where it is dead already, the next look at it says so.
            send(ours, self._setup)

    def _end(self, *workers: _Worker) -> None:
        for worker in workers:
            self._workers.remove(worker)
            self._selector.unregister(worker.channel)
            worker.channel.close()
            with suppress(ProcessLookupError, PermissionError):  # The group holds what the function started, too.
                os.killpg(worker.process.pid, signal.SIGKILL)
        for worker in workers:
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(_REAP_SECONDS)


@dataclass(eq=False)
class _Worker:
    """A process, the answer it has, and until when it must say something."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    ready: bool = False
    index: int | None = None
    allowed: float = math.inf
    deadline: float = math.inf

    @property
    def idle(self) -> bool:
        return self.ready and self.index is None

    def allow(self, seconds: float) -> None:
        self.allowed, self.deadline = seconds, time.monotonic() + seconds

    def rest(self) -> int | None:
        """Nothing is awaited any more; the index of the answer it had."""
        index, self.index, self.deadline = self.index, None, math.inf
        return index


def send(channel: socket.socket, value: Any) -> None:
    """Writes a value with its length before it; raises OSError when nobody reads."""
    data = pickle.dumps(value)
    channel.sendall(_SIZE.pack(len(data)) + data)


def receive(channel: socket.socket) -> Any:
    """The value that was sent next; raises EOFError where nothing more comes, OSError where it stops half-way."""
    return pickle.loads(receive_bytes(channel))


def receive_bytes(channel: socket.socket) -> bytes:
    """What `receive` unpickles."""
    return _exactly(channel, _SIZE.unpack(_exactly(channel, _SIZE.size))[0])


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = channel.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _source(function: str | None) -> bytes | None:
    """Of the function's file; None for a module."""
    if function is None:
        return None
    where, _, name = function.rpartition(":")
    is_file = where.endswith(".py")
    if not name.isidentifier() or not (is_file or all(part.isidentifier() for part in where.split("."))):
        raise ConfigError(f"reward is {function!r}, but must be path/to/file.py:name or package.module:name")
    if not is_file:
        return None
    try:
        return Path(where).read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"reward is {function!r}, but {where} cannot be read: {why}") from None


def _ended(code: int | None) -> str:
    if code is None:
        return "ended its process"
    return f"ended its process {f'with exit code {code}' if code >= 0 else f'by signal {-code}'}"
