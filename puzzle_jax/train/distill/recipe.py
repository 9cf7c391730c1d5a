"""The settings of a distillation, as recipes and the command line give them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from puzzle_jax.errors import MOST_TOGETHER, ConfigError, check_range
from puzzle_jax.train.distill.objectives import LossSettings
from puzzle_jax.train.recipe import RunRecipe
from puzzle_jax.train.student import check_trainable
from puzzle_jax.train.traces.settings import DataSettings


@dataclass(frozen=True, kw_only=True)
class DistillRecipe(RunRecipe):
    """Settings of one distillation.

    Attributes:
      parent: checkpoint directory of the teacher.
      child: checkpoint directory of a child of the parent, as the search writes it or an earlier distillation did.
      traces: file of the parent's answers, or directory of such files, or a list of both.
      dense: whether attention, norms, embedding and head are trained; without them only what `train` names is, such as
        the routers alone (Router KD, arXiv 2603.02217).
      teacher_cache: directory of the teacher's top-k logits, made if it does not exist. None runs the teacher instead.
      top_k: tokens per position that the cache keeps.
      data, loss: settings of the examples and of the loss.
    """

    parent: Path
    child: Path
    traces: Path | tuple[Path, ...]
    dense: bool = True
    teacher_cache: Path | None = None
    top_k: int = 64
    data: DataSettings = field(default_factory=DataSettings)
    loss: LossSettings = field(default_factory=LossSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trainable(self.train, self.dense)
        check_range("top_k", self.top_k, 1, MOST_TOGETHER)
        if not self.trace_paths:
            raise ConfigError("traces is empty, but must name a file or directory")
        self.mesh.check_spanned("data", self.data.rows, self.data.row_length)
        if (self.loss.top_k_kl > 0) != (self.teacher_cache is not None):
            raise ConfigError(
                f"loss.top_k_kl is {self.loss.top_k_kl} and teacher_cache is {self.teacher_cache}, "
                "but the one needs the other"
            )

    @property
    def trace_paths(self) -> tuple[Path, ...]:
        return (self.traces,) if isinstance(self.traces, Path) else self.traces
