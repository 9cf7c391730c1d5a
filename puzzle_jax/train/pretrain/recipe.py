"""The settings of a pretraining run, from a YAML file: model, data, optimiser, seed.

Every field of the file is a field of `PretrainRecipe`; unknown, missing and impossible values are refused in one
sentence before any work starts. Left out: task difficulty, which belongs to `puzzle_jax.tasks`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle_jax.config import BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.errors import MOST_SEED, MOST_TIMES, ConfigError, check_range, shown
from puzzle_jax.files import parse_yaml, read_text
from puzzle_jax.tasks import PRETRAINING_TASKS, check_effort
from puzzle_jax.train.pretrain.data import Bucket


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that decides a pretraining run.

    Attributes:
      seed: of weights and data.
      model: the network to train.
      tasks: task -> relative weight in the data.
      efforts: effort -> relative weight in the data.
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
    model: ModelConfig
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


def load_recipe(path: str | Path) -> PretrainRecipe:
    """Reads a recipe.

    Raises:
      ConfigError: the file is missing, is no YAML, or a field is unknown, missing or impossible.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"recipe {path} does not exist")
    content = parse_yaml(read_text(path, ConfigError), f"recipe {path}", ConfigError)
    try:
        return recipe_from(content)
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from None


def recipe_from(content: Any) -> PretrainRecipe:
    """The recipe that a file's content describes; raises `ConfigError`."""
    content = dict(_mapping("recipe", content))
    if "model" in content:
        model = dict(_mapping("model", content["model"]))
        if "rope" in model:
            model["rope"] = _build(RopeConfig, "model.rope", model["rope"])
        windows = model.pop("windows", None)
        num_experts = model.pop("num_experts", None)
        if not isinstance(windows, list):
            raise ConfigError(f"model.windows is {windows!r}, but must list each layer's window (null is full)")
        num_experts = _number("model.num_experts", "int", num_experts)
        model["blocks"] = tuple(BlockConfig(num_experts, window) for window in windows)
        content["model"] = _build(ModelConfig, "model", model)
    if "buckets" in content:
        if not isinstance(content["buckets"], list):
            raise ConfigError(f"buckets is {content['buckets']!r}, but must be a list")
        content["buckets"] = tuple(_build(Bucket, "buckets", bucket) for bucket in content["buckets"])
    for name in ("tasks", "efforts"):
        if name in content:
            weights = _mapping(name, content[name])
            content[name] = {key: _number(f"{name}.{key}", "float", value) for key, value in weights.items()}
    return _build(PretrainRecipe, "recipe", content)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}, but must be a mapping of names to values")
    return value


def _build(kind: type, name: str, content: Any) -> Any:
    """`kind(**content)` with unknown and missing fields named; numbers may be written without a point."""
    content = _mapping(name, content)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(content) - set(fields))
    if unknown:
        raise ConfigError(f"{name} has the unknown field {unknown[0]}; known: {', '.join(fields)}")
    missing = [
        field.name
        for field in fields.values()
        if field.name not in content
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{name} lacks the field {missing[0]}")
    return kind(**{key: _number(f"{name}.{key}", fields[key].type, value) for key, value in content.items()})


def _number(name: str, kind: Any, value: Any) -> Any:
    """`value`, as a float where one is declared; raises `ConfigError` when a declared number is none."""
    if kind not in ("int", "float"):
        return value
    if isinstance(value, bool) or not isinstance(value, int if kind == "int" else int | float):
        raise ConfigError(f"{name} is {value!r}, but must be a {'whole ' if kind == 'int' else ''}number")
    return float(value) if kind == "float" else value
