"""The settings of a pretraining run, from a YAML file: model, data, optimiser, seed.

Left out: task difficulty, which belongs to `puzzle_jax.tasks`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import MOST_SEED, MOST_TIMES, ConfigError, check_range, shown
from puzzle_jax.tasks import PRETRAINING_TASKS, check_effort
from puzzle_jax.train.pretrain.data import Bucket


def read_model(value: Any, where: str) -> Any:
    """A model whose layers all have as many experts: `num_experts`, and `windows`, one per layer, null being full.

    Raises `ConfigError` where one of them is missing or something else.
    """
    if not isinstance(value, Mapping) or "blocks" in value:
        return value
    model = dict(value)
    windows, num_experts = model.pop("windows", None), model.pop("num_experts", None)
    if not isinstance(windows, list):
        raise ConfigError(f"{where}.windows is {shown(windows)}, but must list each layer's window (null is full)")
    if not isinstance(num_experts, int):
        raise ConfigError(f"{where}.num_experts is {shown(num_experts)}, but must be a whole number")
    return {**model, "blocks": [{"num_experts": num_experts, "window": window} for window in windows]}


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that decides a pretraining run.

    Attributes:
      seed: of weights and data.
      model: the network to train; `num_experts` and a list `windows` stand for its blocks.
      tasks: weight of each task in the data.
      efforts: weight of each effort in the data.
      buckets: shapes of batches.
      steps: optimiser steps.
      learning_rate: reached after `warmup_steps` and kept until `final_steps` before the end, then falling evenly
        to a twentieth: what comes before the final phase does not depend on how long the run is.
      final_steps: length of the final phase, in which experts are rounded to MXFP4 in every forward pass.
      adam_b2, weight_decay, clip_norm: of AdamW.
      balance: weight of the load-balancing loss; too much of it makes all experts equally used, which leaves a
        search nothing to choose.
      embedding_scale: standard deviation of the embedding at the start.
      residual_scale: factor on the projections that write to the residual stream at the start.
      save_every: steps between saves of the resumable state.
      held_out: problems per task and effort that accuracy is measured on at the end.
    """

    seed: int
    model: ModelConfig = field(metadata={"read": read_model})
    tasks: Mapping[str, float]
    efforts: Mapping[str, float]
    buckets: tuple[Bucket, ...]
    steps: int
    learning_rate: float
    final_steps: int
    warmup_steps: int = 100
    adam_b2: float = 0.98
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    balance: float = 0.002
    embedding_scale: float = 0.7
    residual_scale: float = 0.3
    save_every: int = 250
    held_out: int = 128

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in PRETRAINING_TASKS:
                known = ", ".join(PRETRAINING_TASKS)
                raise ConfigError(f"task is {task!r}, but must be one of {known}, which have worked traces")
        for effort in self.efforts:
            check_effort(effort)
        for name in ("tasks", "efforts"):
            weights = getattr(self, name)
            if not weights or not all(0 < weight < math.inf for weight in weights.values()):
                raise ConfigError(f"{name} is {dict(weights)}, but needs weights above 0")
        for name in ("steps", "final_steps", "warmup_steps", "save_every", "held_out"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {shown(value)}, but must be a whole number of at least 1")
            check_range(name, value, 1, MOST_TIMES)
        check_range("seed", self.seed, 0, MOST_SEED)
        if self.warmup_steps + self.final_steps > self.steps:
            raise ConfigError(
                f"warmup_steps and final_steps are {self.warmup_steps} and {self.final_steps}, "
                f"but must fit into steps ({self.steps})"
            )
        for name in ("learning_rate", "clip_norm", "embedding_scale", "residual_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be above 0")
        if not 0 <= self.adam_b2 < 1:
            raise ConfigError(f"adam_b2 is {self.adam_b2}, but must be in [0, 1)")
        for name in ("weight_decay", "balance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 0")
        longest = max((bucket.length for bucket in self.buckets), default=0)
        if longest > self.model.max_position:
            raise ConfigError(f"a bucket is {longest} tokens long, but model max_position is {self.model.max_position}")
