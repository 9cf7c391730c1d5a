"""Problems with verifiable answers, and their rendering as a chat.

`TASKS` are the embedded families; `get_task` finds one by name. `Chat` renders prompts with a checkpoint's
own tokenizer and template and reads the channels back.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from puzzle_jax.errors import ConfigError
from puzzle_jax.tasks.arithmetic import Add, Chain
from puzzle_jax.tasks.base import EFFORTS, Problem, Task, check_effort, is_held_out, problems
from puzzle_jax.tasks.chat import Chat, Completion
from puzzle_jax.tasks.recall import DISTANCE_BUCKETS, Recall

PRETRAINING_TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in (Chain(), Add(), Recall())})
"""The families at the difficulty that the embedded parent was trained on."""

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Chain(max_steps=14, skew=2.0),
            Add(max_digits=8, skew=2.0),
            Recall(max_asked=8, skew=2.0),
        )
    }
)
"""The embedded families by name, at the difficulty that models are judged by: longer than what the parent saw in
training, so that even high effort has room above it."""


def get_task(name: str) -> Task:
    """The embedded family of this name; raises `ConfigError`, naming the known ones, when there is none."""
    if name not in TASKS:
        raise ConfigError(f"task is {name!r}, but must be one of {', '.join(TASKS)}")
    return TASKS[name]


__all__ = [
    "DISTANCE_BUCKETS",
    "EFFORTS",
    "PRETRAINING_TASKS",
    "TASKS",
    "Chat",
    "Completion",
    "Problem",
    "Task",
    "check_effort",
    "get_task",
    "is_held_out",
    "problems",
]
