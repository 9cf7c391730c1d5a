"""The settings of a pretraining run, from a YAML file: model, data, optimiser, seed.

Left out: task difficulty, which belongs to `puzzle_jax.tasks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.table import Form, smallest_form
from puzzle_jax.errors import MOST_SEED, MOST_TIMES, MOST_TOKENS, ConfigError, check_choice, check_range, shown
from puzzle_jax.evaluate.settings import BY_EFFORT, MAX_TOKENS
from puzzle_jax.tasks import check_effort, worked_task
from puzzle_jax.tasks.chat.embedded import EMBEDDED
from puzzle_jax.train.loop import LoopSettings
from puzzle_jax.train.optimizer import OptimizerSettings, decay_steps, make_schedule
from puzzle_jax.train.pretrain.data import Bucket
from puzzle_jax.train.pretrain.habits import Habits


def read_model(value: object, where: str) -> object:
    """Expands `num_experts`, the same for all layers, and `windows`, one per layer (null is full), to a model's blocks.

    Raises `ConfigError` where one of them is missing or of another type.
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
      model: the network to train; `num_experts` and a list `windows` stand for its blocks. The examples are in the chat
        format of `variant.family`.
      tasks: weight of each task in the data.
      efforts: weight of each effort in the data.
      buckets: shapes of batches.
      out: directory of the run: its checkpoints, metrics.jsonl, report.html, and the parent in parent/.
      habits: how the examples are written.
      balance: weight of the load-balancing loss; with too much of it all experts are used equally, which leaves a
        search nothing to choose.
      embedding_scale: standard deviation of the embedding at the start.
      residual_scale: factor on the projections that write to the residual stream at the start.
      held_out: number of problems per task and effort on which accuracy is measured at the end.
      max_tokens: longest answer measured at each effort; efforts that are missing have the embedded parent's limit.
      optimizer, loop: settings of the optimiser and of the training loop. With the schedule "wsd", training does not
        depend on the length of the run until the rate falls; while it falls (with other schedules: after the warmup),
        experts that are exported as MXFP4 are rounded to it in every forward pass.
      seed: seed of weights and data.
    """

    model: ModelConfig = field(metadata={"read": read_model})
    tasks: Mapping[str, float]
    efforts: Mapping[str, float]
    buckets: tuple[Bucket, ...]
    out: Path
    habits: Habits = field(default_factory=Habits)
    balance: float = 0.002
    embedding_scale: float = 0.7
    residual_scale: float = 0.3
    held_out: int = 128
    max_tokens: Mapping[str, int] = field(default_factory=lambda: dict(MAX_TOKENS), metadata=BY_EFFORT)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("model.variant.family", self.model.variant.family, EMBEDDED)  # which have an embedded chat
        for task in self.tasks:
            worked_task(task)
        for effort in self.efforts:
            check_effort(effort)
        for name in ("tasks", "efforts"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty, but must hold a weight above 0")
            for kind, weight in getattr(self, name).items():
                check_range(f"{name}.{kind}", weight, 0, above=True)
        check_range("held_out", self.held_out, 1, MOST_TIMES)
        for effort, limit in self.max_tokens.items():
            check_range(f"max_tokens.{check_effort(effort)}", limit, 1, MOST_TOKENS)
        object.__setattr__(self, "max_tokens", {**MAX_TOKENS, **self.max_tokens})
        check_range("seed", self.seed, 0, MOST_SEED)
        check_range("balance", self.balance, 0)
        for name in ("embedding_scale", "residual_scale"):
            check_range(name, getattr(self, name), 0, above=True)
        make_schedule(self.optimizer, self.loop.steps)  # checks the warmup
        longest = max((bucket.length for bucket in self.buckets), default=0)
        if longest > self.model.max_position:
            raise ConfigError(f"a bucket is {longest} tokens long, but model max_position is {self.model.max_position}")

    @property
    def rounded_steps(self) -> int:
        """Number of last steps, in which the experts are rounded to MXFP4; 0 for a family that is not stored so."""
        return decay_steps(self.optimizer, self.loop.steps) if self.form == "mxfp4" else 0

    @property
    def form(self) -> Form:
        """The form in which the parent is exported."""
        return "mxfp4" if smallest_form(self.model) == "mxfp4" else "bf16"

    @property
    def identity(self) -> dict[str, object]:
        """Everything that the result depends on, as JSON values."""
        own = {name: value for name, value in asdict(self).items() if name not in ("out", "loop")}
        return {"kind": "pretrain", "recipe": own | {"steps": self.loop.steps}}
