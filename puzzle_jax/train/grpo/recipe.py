"""The settings of reinforcement learning, as recipes and the command line give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Literal

from puzzle_jax.errors import (
    MOST_PROCESSES,
    MOST_TIMES,
    MOST_TOGETHER,
    MOST_TOKENS,
    ConfigError,
    check_range,
)
from puzzle_jax.evaluate.settings import BY_EFFORT, MAX_TOKENS
from puzzle_jax.model.cache_format import CACHE_DTYPES
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.tasks import check_effort
from puzzle_jax.tasks.rewards.workers import TIME_LIMIT
from puzzle_jax.train.distill.recipe import check_run
from puzzle_jax.train.grpo.prompts import PromptSettings
from puzzle_jax.train.loop import LoopSettings
from puzzle_jax.train.losses.policy_settings import PolicySettings
from puzzle_jax.train.optimizer import OptimizerSettings


@dataclass(frozen=True)
class RolloutSettings:
    """How prompts are answered.

    Attributes:
      group: answers to each prompt.
      max_tokens: limit of an answer by effort, or one number for all; the defaults suit the embedded parent.
      slots: answers that are generated together.
      resample: times that further prompts are asked in place of those whose answers all earn the same, at most.
      replay: whether training goes through the experts that the sampler chose.
      cache: how the sampler keeps keys and values, one of `model.cache_format.CACHE_DTYPES`; float8 needs scales in
        the checkpoint.
    """

    group: int = 8
    max_tokens: Mapping[str, int] = field(default_factory=lambda: dict(MAX_TOKENS), metadata=BY_EFFORT)
    slots: int = 64
    resample: int = 0
    replay: bool = True
    cache: str = "compute"

    def __post_init__(self) -> None:
        check_range("rollout.group", self.group, 2, MOST_TOGETHER)  # answers that are compared
        check_range("rollout.slots", self.slots, 1, MOST_TOGETHER)
        check_range("rollout.resample", self.resample, 0, MOST_TOGETHER)
        for effort, limit in self.max_tokens.items():
            check_effort(effort)
            check_range(f"rollout.max_tokens.{effort}", limit, 1, MOST_TOKENS)
        if self.cache not in CACHE_DTYPES:
            raise ConfigError(f"rollout.cache is {self.cache!r}, but must be one of {', '.join(CACHE_DTYPES)}")

    def limit(self, effort: str) -> int:
        return {**MAX_TOKENS, **self.max_tokens}[effort]


@dataclass(frozen=True)
class RewardSettings:
    """How answers are judged.

    Attributes:
      function: "path/to/file.py:name" or "package.module:name", called with an answer and its task's score
        (`tasks.rewards.workers`); None: the task's own score.
      time_limit: seconds that one answer's judgement may take.
      judges: processes that judge.
      right: reward from which an answer counts as right, for pass rates; None: an answer is right that its task gives a
        full score, or, where the function does not ask for that score, whose reward is at least 1.
      environment: names of the variables that the function sees; None: all.
    """

    function: str | None = None
    time_limit: float = TIME_LIMIT
    judges: int = 1
    right: float | None = None
    environment: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.time_limit < float("inf"):
            raise ConfigError(f"reward.time_limit is {self.time_limit}, but must be a finite number of seconds above 0")
        check_range("reward.judges", self.judges, 1, MOST_PROCESSES)
        if self.right is not None and not isfinite(self.right):
            raise ConfigError(f"reward.right is {self.right}, but must be a finite number")
        for name in self.environment or ():
            if not name or "=" in name or "\0" in name:
                raise ConfigError(f"reward.environment has {name!r}, but must hold names of environment variables")


@dataclass(frozen=True)
class UpdateSettings:
    """How a step learns from its answers.

    Attributes:
      row_length: positions of a row, into which answers are packed with their prompts; longer ones are not asked.
      rows: per micro-batch.
      updates: optimiser steps per step's answers; with more than one, log-probabilities before the first are
        computed, and ratios leave 1.
      reference: whether the policy is compared with the first one at every step, for the metric "kl", where the loss
        does not need it.
      token_chunk, vocab_chunk: tokens and vocabulary entries whose logits are there at a time.
    """

    row_length: int = 512
    rows: int = 4
    updates: int = 1
    reference: bool = True
    token_chunk: int = 2048
    vocab_chunk: int = 4096

    def __post_init__(self) -> None:
        for name in ("row_length", "token_chunk", "vocab_chunk"):
            check_range(f"update.{name}", getattr(self, name), 1, MOST_TOKENS)
        for name in ("rows", "updates"):
            check_range(f"update.{name}", getattr(self, name), 1, MOST_TOGETHER)


@dataclass(frozen=True)
class WatchSettings:
    """What is looked at while training goes on.

    Attributes:
      problems: of each task, asked greedily at every effort when the policy is evaluated (`loop.evaluate_every`), on
        problems that training does not see.
      transcripts: steps between files of sample answers; 0 writes none.
      transcript_groups: prompts whose answers such a file shows.
      collapse: share of the best running reward below which the run is ended; 0 lets it go on. What is mastered is no
        longer asked, so that the reward of what is asked may halve without harm.
      collapse_steps: steps that the running reward looks back.
    """

    problems: int = 100
    transcripts: int = 20
    transcript_groups: int = 4
    collapse: float = 0.25
    collapse_steps: int = 10

    def __post_init__(self) -> None:
        for name, least in (("problems", 1), ("transcripts", 0), ("transcript_groups", 1), ("collapse_steps", 1)):
            check_range(f"watch.{name}", getattr(self, name), least, MOST_TIMES)
        if not 0 <= self.collapse < 1:
            raise ConfigError(f"watch.collapse is {self.collapse}, but must be at least 0 and below 1")


@dataclass(frozen=True)
class GrpoRecipe:
    """One run of reinforcement learning.

    Attributes:
      model: checkpoint directory of the policy to begin with, as `distill` writes one.
      out: directory of the run: its checkpoints, metrics.jsonl, report.html, transcripts, and the policy in child/.
      train: of "router" and "experts", what is freed besides attention, norms, embedding and head.
      export: which policy is written at the end: after the last step, or the one that did best when it was evaluated.
      remat: recomputes layers in the backward pass in place of keeping their insides.
      packed: whether experts stay packed as checkpoints hold them; None: wherever they run on no CPU.
      prompts, rollout, reward, update, loss, optimizer, loop, watch, mesh: see there.
      seed: of sampling and of the run.
    """

    model: Path
    out: Path
    train: tuple[str, ...] = ()
    export: Literal["last", "best"] = "last"
    remat: bool = True
    packed: bool | None = None
    prompts: PromptSettings = field(default_factory=PromptSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    update: UpdateSettings = field(default_factory=UpdateSettings)
    loss: PolicySettings = field(default_factory=PolicySettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        check_run(self.train, self.seed)
        if self.optimizer.warmup_steps > self.loop.steps * self.update.updates:
            raise ConfigError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, but must be at most the "
                f"{self.loop.steps * self.update.updates} updates of the run"
            )
        if self.update.updates > self.prompts.prompts:
            raise ConfigError(
                f"update.updates is {self.update.updates}, but must be at most prompts.prompts ({self.prompts.prompts})"
            )
        self.mesh.check_spanned("update", self.update.rows, self.update.row_length)
        for effort in self.prompts.efforts:
            if self.rollout.limit(effort) >= self.update.row_length:
                raise ConfigError(
                    f"rollout.max_tokens.{effort} is {self.rollout.limit(effort)}, but must be below update.row_length "
                    f"({self.update.row_length}), which holds the prompt, too"
                )
        if self.export == "best" and not self.loop.keep_best:
            raise ConfigError("export is 'best' and loop.keep_best 0, but the best policy must be kept to be written")
