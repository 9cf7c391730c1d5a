"""The settings that distillation and reinforcement learning share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from puzzle_jax.errors import MOST_SEED, check_range
from puzzle_jax.model.weights import check_weights
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.train.loop import LoopSettings
from puzzle_jax.train.optimizer import OptimizerSettings, make_schedule
from puzzle_jax.train.student import check_trainable


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """Settings of one training run.

    Attributes:
      out: directory of the run: its checkpoints, metrics.jsonl, report.html, and the trained model in child/.
      train: which of "router" and "experts" are trained besides attention, norms, embedding and head.
      remat: whether the backward pass recomputes layers instead of keeping their activations.
      weights: how the frozen weights are held: packed, dense, or auto (see `model.weights`); auto means packed on
        accelerators, whose memory must also hold gradients and the optimiser's state.
      optimizer, loop, mesh: sections with settings of their own.
      seed: random seed of the run.
    """

    out: Path
    train: tuple[str, ...] = ()
    remat: bool = True
    weights: str = "auto"
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        check_trainable(self.train)
        check_weights(self.weights)
        check_range("seed", self.seed, 0, MOST_SEED)
        make_schedule(self.optimizer, self.optimizer_steps)  # checks the warmup

    @property
    def optimizer_steps(self) -> int:
        """Updates of the optimiser in the whole run."""
        return self.loop.steps
