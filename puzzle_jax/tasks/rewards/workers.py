"""Rewards from separate processes: whatever a reward function does costs one sample, never the run.

A reward is the score of the problem's own task, or the result of a user's function, `path/to/file.py:name` or
`package.module:name`, which is called for every answer, truncated or not:

    def reward(answer: Answer, score: Callable[[], float]) -> float:
        return score() - 0.0001 * answer.tokens

`score()` is the task's own score, and 0 for a truncated answer. Any number up to `LARGEST_REWARD` is a reward. A reward
is lost when the function raises, takes longer than the time limit, returns anything else, or ends its process. If a
task's own score is lost, the answer's text is to blame and the reward is 0; if a user's function fails, the answer has
no reward.

The workers are fresh interpreters (`worker_program`) with the parent's `sys.path`, restarted after every hang or death:
they do not import JAX, and the user's main program needs no `__main__` guard. Their hash seed and JAX platform (cpu)
are fixed; a user's function sees the rest of the environment as well, unless the variables that it may see are named,
and a task's own scorer, which reads text from a model, sees `OWN_ENVIRONMENT` alone and gets 4 GiB of memory. What is
printed goes to stderr. The workers end with the parent, however it ends, and with them everything that they started
(`puzzle_jax.processes.supervise`). A file is read once, so that editing it does not change the function of a run.
Left out: limits on memory, files or network for a user's own code, rewards of a whole group.
"""

from __future__ import annotations

import math
import os
import selectors
import socket
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from puzzle_jax.errors import ConfigError, PuzzleError, check_range
from puzzle_jax.processes.supervise import kill_descendants
from puzzle_jax.tasks.channel import receive, send, start
from puzzle_jax.tasks.rewards.answers import Answer, Reward
from puzzle_jax.tasks.rewards.source import reward_source

TIME_LIMIT = 10.0
"""Default limit in seconds for scoring one answer."""

OWN_ENVIRONMENT = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "TMP", "TEMP", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
)  # fmt: skip
"""Environment variables that workers without a user's function see."""

# How long loading a user's function or a task may take, and how often in a row a new worker may fail to start.
_START_SECONDS, _STARTS = 300.0, 3
_SEND_SECONDS, _REAP_SECONDS, _DEATH_SECONDS = 60.0, 10.0, 2.0
_LONGEST_WAIT_SECONDS = 60.0  # longest single wait on the selector
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from puzzle_jax.processes.supervise import supervise; supervisor = supervise(int(sys.argv[2])); "
    "from puzzle_jax.tasks.rewards.worker_program import work; work(supervisor)"
)


@dataclass(frozen=True)
class Setup:
    """The first message to a worker.

    Attributes:
      function, source: name of the user's function, and content of its file (None for a module); without a function,
        the problem's task scores.
      time_limit: seconds for one answer.
    """

    function: str | None
    source: bytes | None
    time_limit: float


class RewardWorkers:
    """Worker processes that compute rewards, until `close` or the end of a `with` block.

    Attributes:
      lost: number of rewards lost since the start, by kind: "raised", "time", "value" or "died".
    """

    def __init__(
        self,
        *,
        function: str | None = None,
        time_limit: float = TIME_LIMIT,
        processes: int = 1,
        environment: Sequence[str] | None = None,
    ) -> None:
        """Loads the function in a first worker.

        Args:
          function: name of the user's function; None: the problem's own task scores, and a truncated answer gets 0.
          time_limit: seconds for one answer, excluding the loading of its task.
          processes: most workers at a time; a function that depends on the answer alone gives the same rewards with any
            number.
          environment: variables that the workers see; None: all with a function, `OWN_ENVIRONMENT` without.

        Raises `ConfigError`, naming the setting `reward`, `time_limit` or `workers`, for a number out of range or a
        function that does not exist.
        """
        check_range("time_limit", time_limit, 0, above=True)
        check_range("workers", processes, 1)
        self.lost: Counter[str] = Counter()
        self._setup = Setup(function, reward_source(function), time_limit)
        self._processes = processes
        self._environment = _environment(function, environment)
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._closed = False
        self._starts_left = 1
        self._tickets = count()
        self._waiting: deque[_Asked] = deque()
        self._found: dict[int, Reward] = {}
        try:
            self._start()
            while not self._workers[0].ready:
                self._listen(_LONGEST_WAIT_SECONDS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rewards(self, answers: Sequence[Answer], *, own_score: bool = False) -> list[Reward]:
        """The reward of every answer, in the same order; `own_score` uses the tasks' scores in place of the function.

        Raises `PuzzleError` when the function can no longer be loaded in a new worker.
        """
        tickets = [self.begin(answer, own_score=own_score) for answer in answers]
        self._work_until(lambda: all(ticket in self._found for ticket in tickets))
        return [self._found.pop(ticket) for ticket in tickets]

    def begin(self, answer: Answer, *, own_score: bool = False) -> int:
        """Queues an answer, whose reward is computed while the caller does something else; returns the ticket under
        which `finished` returns it."""
        self._check_open()
        ticket, own = next(self._tickets), own_score or self._setup.function is None
        if own and answer.truncated:
            self._found[ticket] = Reward(0.0, None, 0.0)
        else:
            self._waiting.append(_Asked(ticket, answer, own))
        return ticket

    def finished(self, *, wait: bool) -> list[tuple[int, Reward]]:
        """Tickets and rewards that have been found by now; with `wait`, waits for at least one if any is due.

        Also sends queued answers to workers that have become idle, so it should be called now and then. Raises
        `PuzzleError` as `rewards` does.
        """
        self._check_open()

        def any_or_none_due() -> bool:
            return bool(self._found) or not (self._waiting or any(worker.asked for worker in self._workers))

        self._work_until(any_or_none_due if wait else None)
        found, self._found = list(self._found.items()), {}
        return found

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the reward workers were closed")

    def close(self) -> None:
        """Ends all workers; may be called more than once."""
        self._closed = True
        self._end(*self._workers)
        self._selector.close()

    def _work_until(self, done: Callable[[], bool] | None) -> None:
        """Sends out answers and reads messages until `done` is true; with None, as long as there are messages."""
        try:
            self._employ()
            while not (done() if done else not self._listen(0.0)):
                if done:
                    self._listen(_LONGEST_WAIT_SECONDS)
                self._employ()
        except BaseException:
            # No result of these answers may be taken for one of later answers.
            self._waiting.clear()
            self._found.clear()
            self._end(*self._workers)
            raise

    def _employ(self) -> None:
        """Sends the next waiting answers to idle workers; starts workers that are needed."""
        for worker in list(self._workers):
            if worker.idle and worker.process.poll() is not None:
                self._end(worker)  # It died while idle, which is no answer's fault.
            elif worker.idle and self._waiting:
                try:
                    send(worker.channel, (self._waiting[0].answer, self._waiting[0].own))
                except OSError:
                    self._end(worker)
                else:
                    worker.asked = self._waiting.popleft()
                    worker.allow(_START_SECONDS)
        starting = sum(not worker.ready for worker in self._workers)
        for _ in range(min(len(self._waiting) - starting, self._processes - len(self._workers))):
            self._start()

    def _listen(self, patience: float) -> bool:
        """Waits until a worker sends a message, has used up its time, or `patience` seconds have passed; returns
        whether one of the first two happened."""
        if not self._workers:
            return False
        left = min(worker.deadline for worker in self._workers) - time.monotonic()
        arrived = self._selector.select(min(max(left, 0.0), patience))
        for key, _ in arrived:
            self._read(key.data)
        late = [worker for worker in self._workers if worker.deadline < time.monotonic()]
        # A message that has come by now, perhaps in time, is read in the next round.
        ready = [key.data for key, _ in self._selector.select(0)] if late else []
        for worker in late:
            if worker not in ready:
                self._give_up(worker, "time")
        return bool(arrived or late)

    def _read(self, worker: _Worker) -> None:
        try:
            kind, content = receive(worker.channel)
        except (EOFError, OSError):
            self._give_up(worker, "time" if worker.deadline < time.monotonic() else "died")
            return
        if kind == "ready":
            self._starts_left = _STARTS
            worker.ready = True
            worker.rest()
        elif kind == "refused":
            self._end(worker)
            self._not_started(content)
        elif kind == "begun":
            worker.allow(self._setup.time_limit)
        else:
            asked = worker.rest()
            assert asked is not None
            self._decide(asked, *content)

    def _decide(
        self, asked: _Asked, reward: float | None, kind: str | None, reason: str | None, score: float | None
    ) -> None:
        if kind is not None:
            self.lost[kind] += 1
        self._found[asked.ticket] = Reward(0.0 if reward is None and asked.own else reward, reason, score)

    def _give_up(self, worker: _Worker, kind: str) -> None:
        """Ends a worker that hangs or has died; the reward of its answer, if it had one, is lost."""
        if kind == "died":
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(_DEATH_SECONDS)  # so that its exit code is known
        self._end(worker)
        reason = f"took longer than {worker.allowed:g} s" if kind == "time" else _ended(worker.process.returncode)
        if worker.asked is not None:
            self._decide(worker.asked, None, kind, reason, None)
        elif not worker.ready:
            function = self._setup.function
            if function is None:
                self._not_started(f"a process that gives rewards {reason} before it was ready")
            else:
                self._not_started(f"reward is {function!r}, but loading {function.rpartition(':')[0]} {reason}")

    def _not_started(self, message: str) -> None:
        self._starts_left -= 1
        if self._starts_left <= 0:
            raise PuzzleError(message) if self._setup.function is None else ConfigError(message)

    def _start(self) -> None:
        environment = {**self._environment, "PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}
        # -P and -u: nothing is imported from the working directory; text that is printed before a hang is shown.
        process, channel = start(_PROGRAM, ("-P", "-u"), [str(os.getpid())], env=environment, stdout=2)
        worker = _Worker(process, channel)
        worker.allow(_START_SECONDS)
        self._workers.append(worker)
        self._selector.register(channel, selectors.EVENT_READ, worker)
        channel.settimeout(_SEND_SECONDS)
        with suppress(OSError):  # A process that is dead already is found when its channel is read.
            send(channel, self._setup)

    def _end(self, *workers: _Worker) -> None:
        for worker in workers:
            self._workers.remove(worker)
            self._selector.unregister(worker.channel)
            worker.channel.close()
            worker.process.terminate()  # The supervisor kills what the function started, too.
        for worker in workers:
            try:
                worker.process.wait(_REAP_SECONDS)
            except subprocess.TimeoutExpired:
                kill_descendants(worker.process.pid)
                worker.process.kill()
                worker.process.wait()


@dataclass(frozen=True)
class _Asked:
    """An answer with its ticket; if `own`, its task scores it rather than the function."""

    ticket: int
    answer: Answer
    own: bool


@dataclass(eq=False)
class _Worker:
    """A worker process, the answer that it works on, and the deadline for its next message."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    ready: bool = False
    asked: _Asked | None = None
    allowed: float = math.inf
    deadline: float = math.inf

    @property
    def idle(self) -> bool:
        return self.ready and self.asked is None

    def allow(self, seconds: float) -> None:
        self.allowed, self.deadline = seconds, time.monotonic() + seconds

    def rest(self) -> _Asked | None:
        """Clears the deadline and the current answer; returns that answer."""
        asked, self.asked, self.deadline = self.asked, None, math.inf
        return asked


def _environment(function: str | None, names: Sequence[str] | None) -> dict[str, str]:
    """The environment of the workers."""
    if names is None:
        names = tuple(os.environ) if function is not None else OWN_ENVIRONMENT
    return {name: os.environ[name] for name in names if name in os.environ}


def _ended(code: int | None) -> str:
    how = "" if code is None else f" with exit code {code}" if code >= 0 else f" by signal {-code}"
    return f"ended its process{how}"
