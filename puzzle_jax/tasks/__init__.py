"""Problems with verifiable answers, and their rendering as a chat.

`TASKS` holds the embedded families; `get_task` looks up one of them, a family of reasoning-gym, or a file of prompts
with answers. `Chat` renders prompts with a checkpoint's own tokenizer and template and splits answers into channels.
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
    Slip,
    Task,
    Work,
    WorkedTask,
    check_effort,
    is_held_out,
    no_slip,
    problems,
)
from puzzle_jax.tasks.chat.chat import Chat, Completion
from puzzle_jax.tasks.gym import PREFIX, gym_families, gym_task
from puzzle_jax.tasks.gym_worked import WORKED_GYM, WorkedGymTask
from puzzle_jax.tasks.jsonl import JsonlTask
from puzzle_jax.tasks.ledger import Ledger
from puzzle_jax.tasks.recall import DISTANCE_BUCKETS, Recall

_FAMILIES: tuple[WorkedTask, ...] = (Chain(), Add(), Recall())

TASKS: Mapping[str, WorkedTask] = MappingProxyType({task.name: task for task in _FAMILIES})
"""The embedded parent's families by name, with the settings that it is trained and evaluated with."""

_OTHERS: Mapping[str, WorkedTask] = MappingProxyType({Ledger().name: Ledger()})


def worked_task(name: str) -> WorkedTask:
    """The task of this name, which has worked solutions.

    Raises:
      ConfigError: there is no such task, or it has no worked solutions.
    """
    task = get_task(name)
    if not isinstance(task, WorkedTask):
        known = ", ".join((*TASKS, *_OTHERS, *(PREFIX + family for family in WORKED_GYM)))
        raise ConfigError(f"task {name} has no worked solutions; these have: {known}")
    return task


def get_task(name: str) -> Task:
    """The task of this name.

    Args:
      name: an embedded family (one of `TASKS`, or `ledger`); `reasoning-gym:<family>`; or the path of a `.jsonl` file
        of prompts with answers.

    Raises:
      ConfigError: there is no such task, the extra `reasoning-gym` is needed but not installed, or the file does
        not have the form that `puzzle_jax.tasks.jsonl` describes.
    """
    own = {**TASKS, **_OTHERS}
    if name in own:
        return own[name]
    if name.startswith(PREFIX):
        task = gym_task(name.removeprefix(PREFIX))
        return WorkedGymTask(task.family) if task.family in WORKED_GYM else task
    if name.endswith(".jsonl"):
        return JsonlTask.load(name)
    raise ConfigError(
        f"task is {name!r}, but must be one of {', '.join(own)}, {PREFIX}<family>, or the path of a .jsonl file"
    )


__all__ = [
    "DISTANCE_BUCKETS", "EFFORTS", "TASKS", "Chat", "Completion", "FiniteTask", "JsonlTask", "Problem", "Slip", "Task",
    "Work", "WorkedTask", "check_effort", "get_task", "gym_families", "is_held_out", "no_slip", "problems",
    "worked_task",
]  # fmt: skip
