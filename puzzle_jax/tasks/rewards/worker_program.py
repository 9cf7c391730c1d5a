"""The reward worker, which rewards one answer after another; `workers` starts it and describes what it does.

It sends "ready" once its function is loaded, or "refused" with a sentence; then, for every answer, "begun" when its
task is loaded, and "done" with the reward, the kind and reason of a loss, and the task's own score if it was computed.
The function runs in the main thread, so that it may set alarms.
"""

from __future__ import annotations

import faulthandler
import importlib
import inspect
import math
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import SupportsFloat, SupportsIndex

from puzzle_jax.errors import ConfigError, shown
from puzzle_jax.tasks import Task, get_task
from puzzle_jax.tasks.channel import receive, receive_bytes, send
from puzzle_jax.tasks.chat.render_worker import limit_memory, one_line
from puzzle_jax.tasks.rewards.answers import LARGEST_REWARD, Answer
from puzzle_jax.tasks.rewards.workers import Setup

RewardFunction = Callable[[Answer, Callable[[], float]], object]

_LOOK_SECONDS = 0.5
# A worker ends by itself this long after the limit at the latest; a parent that is alive ends it at the limit.
_GRACE_SECONDS, _LONGEST_SECONDS = 3.0, 1e9
_LONGEST_MESSAGE = 200
_OWN_MEMORY_BYTES = 4 << 30


def work(parent: int) -> None:
    """Rewards the answers that arrive over stdin, a socket, until it is closed or the parent process `parent` ends."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, lambda *_: None)
    # The function's own reads and prints, and those of programs that it starts, must not touch the channel.
    channel = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    try:
        setup: Setup = receive(channel)
        try:
            if setup.function is None:
                limit_memory("RLIMIT_DATA", _OWN_MEMORY_BYTES)  # a scorer is refused memory before the machine runs out
            reward = _own_score if setup.function is None else load(setup.function, setup.source)
        except ConfigError as error:
            send(channel, ("refused", str(error)))
            return
        send(channel, ("ready", None))
        tasks: dict[str, Task] = {}
        while True:
            message = receive_bytes(channel)
            send(channel, ("done", _rewarded(channel, nothing, reward, setup.time_limit, tasks, message)))
    except (EOFError, OSError):
        os._exit(0)  # The parent is gone; threads of the function might keep the process alive.


def load(function: str, source: bytes | None) -> RewardFunction:
    """Loads the user's function from its file's source, or by importing its module.

    Modules beside the file can be imported, unless another module has the same name.

    Raises:
      ConfigError: loading fails, or there is no function of two arguments by this name.
    """
    where, _, name = function.rpartition(":")
    try:
        module = importlib.import_module(where) if source is None else _run(where, source)
    except BaseException as error:
        raise ConfigError(f"reward is {function!r}, but loading {where} {_raised(error)}") from None
    reward = getattr(module, name, None)
    if reward is None:
        raise ConfigError(f"reward is {function!r}, but {where} has no function {name}")
    if not callable(reward):
        raise ConfigError(f"reward is {function!r}, but {name} of {where} is no function, but of type {_type(reward)}")
    try:
        taken = inspect.signature(reward)
    except (TypeError, ValueError):  # Functions in C need not have a signature.
        return reward
    try:
        taken.bind(None, None)
    except TypeError:
        raise ConfigError(
            f"reward is {function!r}, but {name} of {where} takes {taken}, and must take (answer, score)"
        ) from None
    return reward


def _run(path: str, source: bytes) -> ModuleType:
    path = os.path.abspath(path)
    module = ModuleType("puzzle_reward")
    module.__file__ = path
    sys.modules[module.__name__] = module  # Dataclasses and pickle look modules up by name.
    sys.path.append(os.path.dirname(path))
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def _rewarded(
    channel: socket.socket,
    nothing: int,
    reward: RewardFunction,
    time_limit: float,
    tasks: dict[str, Task],
    message: bytes,
) -> tuple[float | None, str | None, str | None, float | None]:
    """The reward, or the kind and reason of its loss; and the task's own score, if it was computed."""
    process = os.getpid()
    score = None
    try:
        answer, own = pickle.loads(message)
        score = _Score(answer, tasks)
        # A thread in C, which ends the process even when no other thread gets to run.
        faulthandler.dump_traceback_later(min(time_limit + _GRACE_SECONDS, _LONGEST_SECONDS), exit=True, file=nothing)
        send(channel, ("begun", None))
        value = (_own_score if own else reward)(answer, score)
    except BaseException as error:
        return None, "raised", _raised(error), score and score.given
    finally:
        if os.getpid() != process:
            os._exit(1)  # A child that the function forked has returned here.
        faulthandler.cancel_dump_traceback_later()
    return *_number(value), score.given


def _own_score(answer: Answer, score: Callable[[], float]) -> float:
    return score()


class _Score:
    """Computes the task's score of an answer when called; a task that cannot be loaded raises only then.

    Attributes:
      given: the score of the last call; None before.
    """

    def __init__(self, answer: Answer, tasks: dict[str, Task]) -> None:
        self.given: float | None = None
        self._answer, self._tasks = answer, tasks
        self._missing: Exception | None = None
        name = answer.problem.task
        if name not in tasks:
            try:
                tasks[name] = get_task(name)
            except Exception as error:
                self._missing = error

    def __call__(self) -> float:
        if self._missing is not None:
            raise self._missing
        answer = self._answer
        task = self._tasks[answer.problem.task]
        self.given = 0.0 if answer.truncated else task.score(answer.problem, answer.final)
        return self.given


def _number(value: object) -> tuple[float | None, str | None, str | None]:
    try:
        # Everything that converts to float, arrays of one element too; text does not count, though float() parses it.
        number = float(value) if isinstance(value, SupportsFloat | SupportsIndex) else math.nan
    except Exception:
        number = math.nan
    if abs(number) <= LARGEST_REWARD:
        return number, None, None
    returned = shown(value) if value is None or isinstance(value, str | int | float) else f"a {_type(value)}"
    beyond = f", beyond {LARGEST_REWARD:g}" if math.isfinite(number) else ""
    return None, "value", f"returned {returned}{beyond}"


def _raised(error: BaseException) -> str:
    """`raised ValueError: message` on one printable line."""
    message = one_line(error, _LONGEST_MESSAGE)
    return f"raised {_type(error)}{': ' if message else ''}{message}"


def _type(value: object) -> str:
    return type(value).__name__


def _end_with(parent: int) -> None:
    """Ends this process and its group soon after the parent ends, where the system does not do so at once."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)
