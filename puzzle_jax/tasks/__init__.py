"""Problems with verifiable answers, and their rendering as a chat.

`TASKS` are the embedded families; `get_task` finds one of them, a family of reasoning-gym, or a file of prompts with
answers by name. `Chat` renders prompts with a checkpoint's own tokenizer and template and reads the channels back.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from puzzle_jax.errors import ConfigError
from puzzle_jax.tasks.arithmetic import Add, Chain
from puzzle_jax.tasks.base import (
    EFFORTS,
    FiniteTask,
    Problem,
    Task,
    WorkedTask,
    check_effort,
    is_held_out,
    problems,
)
from puzzle_jax.tasks.chat.chat import Chat, Completion
from puzzle_jax.tasks.gym import PREFIX, gym_families, gym_task
from puzzle_jax.tasks.jsonl import JsonlTask
from puzzle_jax.tasks.recall import DISTANCE_BUCKETS, Recall


def _by_name(*tasks: WorkedTask) -> Mapping[str, WorkedTask]:
    return MappingProxyType({task.name: task for task in tasks})


PRETRAINING_TASKS = _by_name(Chain(), Add(), Recall())
"""The families at the difficulty that the embedded parent was trained on."""

TASKS = _by_name(Chain(max_steps=14, skew=2.0), Add(max_digits=8, skew=2.0), Recall(max_asked=8, skew=2.0))
"""The embedded families by name, at the difficulty of evaluations: longer than the problems that the parent was trained
on, so that even high effort can still improve."""


def get_task(name: str) -> Task:
    """The task of this name.

    Args:
      name: an embedded family (one of `TASKS`); `reasoning-gym:<family>`; or the path of a `.jsonl` file of prompts
        with answers.

    Raises:
      ConfigError: there is no such task, the extra `reasoning-gym` is needed but not installed, or the file is not
        of the form that `puzzle_jax.tasks.jsonl` describes.
    """
    if name in TASKS:
        return TASKS[name]
    if name.startswith(PREFIX):
        return gym_task(name.removeprefix(PREFIX))
    if name.endswith(".jsonl"):
        return JsonlTask.load(name)
    raise ConfigError(
        f"task is {name!r}, but must be one of {', '.join(TASKS)}, {PREFIX}<family>, or the path of a .jsonl file"
    )


__all__ = [
    "DISTANCE_BUCKETS", "EFFORTS", "PRETRAINING_TASKS", "TASKS", "Chat", "Completion", "FiniteTask", "JsonlTask",
    "Problem", "Task", "WorkedTask", "check_effort", "get_task", "gym_families", "is_held_out", "problems",
]  # fmt: skip
