"""The settings of reinforcement learning, as recipes and the command line give them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from puzzle_jax import errors
from puzzle_jax.errors import ConfigError, check_choice, check_range
from puzzle_jax.evaluate.settings import BY_EFFORT, MAX_TOKENS
from puzzle_jax.model.cache_format import CACHE_DTYPES
from puzzle_jax.tasks import check_effort
from puzzle_jax.tasks.rewards.workers import TIME_LIMIT
from puzzle_jax.train.grpo.prompts import PromptSettings
from puzzle_jax.train.grpo.shared_rows import RowShape, row_shapes, strip_of
from puzzle_jax.train.losses.policy_settings import PolicySettings
from puzzle_jax.train.recipe import RunRecipe


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
        for name, least in (("group", 2), ("slots", 1), ("resample", 0)):  # answers of a group are compared
            check_range(f"rollout.{name}", getattr(self, name), least, errors.MOST_TOGETHER)
        for effort, limit in self.max_tokens.items():
            check_effort(effort)
            check_range(f"rollout.max_tokens.{effort}", limit, 1, errors.MOST_TOKENS)
        check_choice("rollout.cache", self.cache, CACHE_DTYPES)

    def limit(self, effort: str) -> int:
        return {**MAX_TOKENS, **self.max_tokens}[effort]


@dataclass(frozen=True)
class RewardSettings:
    """How answers are rewarded.

    Attributes:
      function: "path/to/file.py:name" or "package.module:name", called with an answer and its task's score
        (`tasks.rewards.workers`); None: the task's own score.
      time_limit: seconds that the reward of one answer may take.
      workers: processes that run the function.
      pass_threshold: reward from which an answer passes, for pass rates; None: an answer passes that its task gives a
        full score, or, where the function does not ask for that score, whose reward is at least 1.
      environment: names of the variables that the function sees; None: all.
    """

    function: str | None = None
    time_limit: float = TIME_LIMIT
    workers: int = 1
    pass_threshold: float | None = None
    environment: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_range("reward.time_limit", self.time_limit, 0, above=True)
        check_range("reward.workers", self.workers, 1, errors.MOST_PROCESSES)
        if self.pass_threshold is not None and not math.isfinite(self.pass_threshold):
            raise ConfigError(f"reward.pass_threshold is {self.pass_threshold}, but must be a finite number")
        for name in self.environment or ():
            if not name or "=" in name or "\0" in name:
                raise ConfigError(f"reward.environment has {name!r}, but must hold names of environment variables")


@dataclass(frozen=True)
class UpdateSettings:
    """How a step learns from its answers.

    Attributes:
      row_length: positions of a row, into which answers are packed with their prompts; longer ones are not asked.
      rows: per micro-batch.
      share_prompts: whether an update runs a prompt once for many of its answers (`shared_rows`), whose rows have other
        lengths then, and micro-batches about as many positions. Worth it for answers that are short beside their group
        times the prompt; logits of a row's answers against its prompt must fit in memory, and mesh.sequence be 1.
      updates: optimiser steps per step's answers; with more than one, log-probabilities before the first are
        computed, and ratios leave 1.
      reference: whether the policy is compared with the first one at every step, for the metric "kl", where the loss
        does not need it.
      token_chunk, vocab_chunk: tokens and vocabulary entries whose logits are there at a time.
    """

    row_length: int = 512
    rows: int = 4
    share_prompts: bool = False
    updates: int = 1
    reference: bool = True
    token_chunk: int = 2048
    vocab_chunk: int = 4096

    def __post_init__(self) -> None:
        for name in ("row_length", "token_chunk", "vocab_chunk"):
            check_range(f"update.{name}", getattr(self, name), 1, errors.MOST_TOKENS)
        for name in ("rows", "updates"):
            check_range(f"update.{name}", getattr(self, name), 1, errors.MOST_TOGETHER)


@dataclass(frozen=True)
class MonitoringSettings:
    """What is monitored while training goes on.

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
            check_range(f"monitoring.{name}", getattr(self, name), least, errors.MOST_TIMES)
        check_range("monitoring.collapse", self.collapse, 0, 1, below=True)


@dataclass(frozen=True, kw_only=True)
class GrpoRecipe(RunRecipe):
    """One run of reinforcement learning.

    Attributes:
      model: checkpoint directory of the policy to begin with, as `distill` writes one.
      export: which policy is written at the end: after the last step, or the one that did best when it was evaluated.
      prompts, rollout, reward, update, loss, monitoring: see there.
    """

    model: Path
    export: Literal["last", "best"] = "last"
    prompts: PromptSettings = field(default_factory=PromptSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    update: UpdateSettings = field(default_factory=UpdateSettings)
    loss: PolicySettings = field(default_factory=PolicySettings)
    monitoring: MonitoringSettings = field(default_factory=MonitoringSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.update.share_prompts and self.mesh.sequence > 1:
            raise ConfigError(
                f"update.share_prompts is true and mesh.sequence {self.mesh.sequence}, but rows of shared prompts are "
                "not cut along the sequence; leave one of them out"
            )
        if self.export == "best" and not self.loop.keep_best:
            raise ConfigError("export is 'best' and loop.keep_best 0, but the best policy must be kept to be written")

    @property
    def answer_limit(self) -> int:
        """Tokens of the longest answer at any effort."""
        return max(self.rollout.limit(effort) for effort in self.prompts.efforts)

    @property
    def strip(self) -> int:
        """Positions of a strip of answers that share a prompt; 0 where they do not."""
        return strip_of(self.answer_limit) if self.update.share_prompts else 0

    @property
    def shared_shapes(self) -> tuple[RowShape, ...]:
        """The shapes of micro-batches whose answers share prompts; none where they do not."""
        update = self.update
        if not update.share_prompts:
            return ()
        return row_shapes(update.row_length, self.answer_limit, update.rows * update.row_length, self.mesh.data)

    def check_context(self, context: int) -> None:
        """Raises ConfigError where rows are longer than the model's context."""
        if self.update.row_length > context:
            raise ConfigError(f"update.row_length is {self.update.row_length}, but the model's context is {context}")

    @property
    def optimizer_steps(self) -> int:
        return self.loop.steps * self.update.updates
