"""The settings of a distillation, as recipes and the command line give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from puzzle_jax.errors import MOST_SEED, MOST_TOGETHER, ConfigError, check_range
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.train.distill.objectives import LossSettings
from puzzle_jax.train.loop import LoopSettings
from puzzle_jax.train.optimizer import OptimizerSettings
from puzzle_jax.train.student import TRAINABLE
from puzzle_jax.train.traces.settings import DataSettings


def check_run(train: Sequence[str], seed: int) -> None:
    """Raises ConfigError for what no run can free, or begin from."""
    for name in train:
        if name not in TRAINABLE:
            raise ConfigError(f"train has {name!r}, but must be of {', '.join(TRAINABLE)}")
    check_range("seed", seed, 0, MOST_SEED)


@dataclass(frozen=True)
class DistillRecipe:
    """One distillation.

    Attributes:
      parent: checkpoint directory of the teacher.
      child: checkpoint directory that was cut from it, as the search writes; also one that was distilled before.
      traces: file of the parent's answers, or directory of such files, or a list of both.
      out: directory of the run: its checkpoints, metrics.jsonl, and the trained child in child/.
      train: of "router" and "experts", what is trained besides attention, norms, embedding and head.
      teacher_cache: directory of the teacher's top-k logits; made when it is not there. None asks the teacher itself.
      top_k: tokens per position that the cache keeps.
      remat: recomputes layers in the backward pass in place of keeping their insides.
      packed: whether experts stay packed as checkpoints hold them; None: wherever they run on no CPU.
      data, loss, optimizer, loop, mesh: see there.
      seed: of the run.
    """

    parent: Path
    child: Path
    traces: Path | tuple[Path, ...]
    out: Path
    train: tuple[str, ...] = ()
    teacher_cache: Path | None = None
    top_k: int = 64
    remat: bool = True
    packed: bool | None = None
    data: DataSettings = field(default_factory=DataSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        check_run(self.train, self.seed)
        check_range("top_k", self.top_k, 1, MOST_TOGETHER)
        if not self.trace_paths:
            raise ConfigError("traces is empty, but must name a file or directory")
        if self.optimizer.warmup_steps > self.loop.steps:
            raise ConfigError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, but must be at most loop.steps "
                f"({self.loop.steps})"
            )
        self.mesh.check_spanned("data", self.data.rows, self.data.row_length)
        if (self.loss.top_k_kl > 0) != (self.teacher_cache is not None):
            raise ConfigError(
                f"loss.top_k_kl is {self.loss.top_k_kl} and teacher_cache is {self.teacher_cache}, "
                "but the one needs the other"
            )

    @property
    def trace_paths(self) -> tuple[Path, ...]:
        return (self.traces,) if isinstance(self.traces, Path) else self.traces
