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
    """Settings of the sampling of answers.

    Attributes:
      group: number of answers to each prompt.
      max_tokens: token limit of an answer by effort, or one number for all; the defaults suit the embedded parent.
      slots: number of answers that are generated together.
      resample: how many times, at most, further prompts are asked in place of those whose answers all earn the same.
      replay: whether training routes tokens to the experts that the sampler chose.
      cache: format of the sampler's KV cache, one of `model.cache_format.CACHE_DTYPES`; float8 needs scales in the
        checkpoint.
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
    """Settings of rewards.

    Attributes:
      function: "path/to/file.py:name" or "package.module:name", called with an answer and its task's score
        (`tasks.rewards.workers`); None uses the task's own score.
      time_limit: seconds that the reward of one answer may take.
      workers: number of processes that run the function.
      pass_threshold: lowest reward that passes, for pass rates; None passes answers that have their task's full score
        or, where the function does not ask for that score, a reward of at least 1.
      environment: names of the environment variables that the function sees; None means all.
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
    """Settings of the updates that a step makes from its answers.

    Attributes:
      row_length: positions of a row, into which answers are packed with their prompts; prompts that may not fit are
        not asked.
      rows: number of rows per micro-batch.
      share_prompts: whether an update runs a prompt once for many of its answers (`shared_rows`). Rows then have other
        lengths, and micro-batches about as many positions. Worthwhile where answers are short compared with the group
        size times the prompt; attention logits of a row's answers against its prompt must fit in memory, and
        mesh.sequence must be 1.
      updates: optimiser updates per step; with more than one, log-probabilities before the first are computed, and
        ratios differ from 1.
      reference: whether the policy is compared with the initial one at every step, for the metric "kl", even where the
        loss does not need it.
      token_chunk, vocab_chunk: tokens and vocabulary entries whose logits are in memory at a time.
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
    """Settings of evaluation, transcripts and the detection of collapse during training.

    Attributes:
      problems: number of problems of each task, unseen in training, that are answered greedily at every effort when the
        policy is evaluated (`loop.evaluate_every`).
      transcripts: steps between files of sample answers; 0 writes none.
      transcript_groups: number of prompts whose answers such a file shows.
      collapse: fraction of the best running reward below which the run fails; 0 means never. Mastered problems are no
        longer asked, so the reward of those that are asked may halve without harm.
      collapse_steps: number of steps that the running reward averages over.
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
      export: which policy is written at the end: that of the last step, or the one with the best evaluation.
      prompts, rollout, reward, update, loss, monitoring: sections with settings of their own.
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
        """Largest token limit of an answer at any effort."""
        return max(self.rollout.limit(effort) for effort in self.prompts.efforts)

    @property
    def strip(self) -> int:
        """Positions of a strip of answers that share a prompt; 0 where answers do not."""
        return strip_of(self.answer_limit) if self.update.share_prompts else 0

    @property
    def shared_shapes(self) -> tuple[RowShape, ...]:
        """The shapes of micro-batches whose answers share prompts; empty where answers do not."""
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
