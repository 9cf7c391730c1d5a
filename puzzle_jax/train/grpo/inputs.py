"""The inputs of reinforcement learning: a checkpoint, its chat format, and problems with verifiable answers.

Everything that a user can fix is refused here, before weights are read and anything is written.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import PROVENANCE, Origin
from puzzle_jax.convert_hf.load import cache_scales
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.evaluate.accuracy import QuestionSet, check_context
from puzzle_jax.evaluate.models import Model
from puzzle_jax.files import read_bytes, read_object
from puzzle_jax.model.cache_format import FLOAT8, CacheFormat
from puzzle_jax.model.child import identity_child
from puzzle_jax.tasks.context import most_positions
from puzzle_jax.tasks.rewards.source import reward_file
from puzzle_jax.train.grpo.prompts import Prompt, Prompts
from puzzle_jax.train.grpo.recipe import GrpoRecipe
from puzzle_jax.train.losses.policy_settings import ResolvedPolicy
from puzzle_jax.train.run import RunInputs, day_of
from puzzle_jax.train.student import Student

EVALUATED_SPLIT = "validation"


@dataclass(frozen=True)
class GrpoInputs(RunInputs[GrpoRecipe]):
    """A recipe's inputs, read and checked, except for the weights."""

    recipe: GrpoRecipe
    model: Model

    @staticmethod
    def open(recipe: GrpoRecipe, today: datetime.datetime | None = None) -> GrpoInputs:
        """Reads and checks the inputs.

        Args:
          today: the date that the chat template sees; None means the day on which the run was begun.

        Raises PuzzleError for any invalid input.
        """
        if recipe.out.resolve() == recipe.model.resolve():
            raise ConfigError(f"out is {recipe.out}, which is the model itself; name another directory")
        inputs = GrpoInputs(recipe, Model.open("policy", recipe.model, today or day_of(recipe.out), recipe.weights))
        recipe.check_context(inputs.config.max_position)
        if recipe.rollout.cache == FLOAT8 and cache_scales(inputs.model.description) is None:
            raise ConfigError(f"rollout.cache is {FLOAT8}, but {recipe.model} carries no scales for such a cache")
        _ = inputs.origin
        next(inputs.prompts())
        inputs.check_questions()
        return inputs

    @cached_property
    def student(self) -> Student:
        """The model as a view on itself."""
        packed = self.model.description.form == "mxfp4"
        return Student(identity_child(self.config), self.recipe.train, self.recipe.remat, packed=packed)

    @cached_property
    def loss(self) -> ResolvedPolicy:
        """The settings of the loss, with those that are not given taken from the named loss."""
        return self.recipe.loss.resolved

    @property
    def cache(self) -> CacheFormat:
        """Format of the sampler's KV cache."""
        return self.model.cache_format(self.recipe.rollout.cache)

    @property
    def limits(self) -> dict[str, int]:
        """Token limit of an answer by effort."""
        return {effort: self.recipe.rollout.limit(effort) for effort in self.recipe.prompts.efforts}

    def prompts(self) -> Prompts:
        """The stream of prompts, from its beginning; it passes over those that do not fit a row with an answer."""
        length = self.recipe.update.row_length
        return Prompts(self.recipe.prompts, lambda prompt: self.most_positions(prompt) <= length)

    def most_positions(self, prompt: Prompt) -> int:
        """Number of positions that a prompt takes with its longest answer."""
        return most_positions(self.model.chat, *prompt, self.limits)

    def check_questions(self) -> None:
        """Raises ConfigError where no question of some effort of the evaluation fits the model's context.

        Single questions that do not fit are passed over (`too_long`).
        """
        questions, whose = self.questions.questions(), "the model, which is evaluated on them,"
        for effort in self.questions.efforts:
            asked = [index for index, (_, of) in enumerate(questions) if of == effort]
            if self.too_long.issuperset(asked):
                chosen = [questions[index] for index in asked]
                check_context(chosen, self.model.chat, self.config, self.limits, whose)

    @cached_property
    def too_long(self) -> frozenset[int]:
        """Indices of the evaluation's questions that do not fit the model's context."""
        questions = enumerate(self.questions.questions())
        context = self.config.max_position
        return frozenset(index for index, asked in questions if self.most_positions(Prompt(*asked)) > context)

    @cached_property
    def questions(self) -> QuestionSet:
        """The questions that the policy is evaluated on."""
        prompts, problems = self.recipe.prompts, self.recipe.monitoring.problems
        return QuestionSet(tuple(prompts.task_weights), tuple(prompts.efforts), problems, EVALUATED_SPLIT)

    @cached_property
    def identity(self) -> dict[str, object]:
        recipe, reward = self.recipe, self.recipe.reward
        return {
            "kind": "grpo",
            "model": self.model.fingerprint,
            "prompts": asdict(recipe.prompts) | {"judged_by": self.questions.task_identities},
            "rollout": asdict(recipe.rollout) | {"max_tokens": self.limits},
            "reward": {
                "function": reward.function,
                "file": self._reward_hash(),
                "pass_threshold": reward.pass_threshold,
                "environment": reward.environment,
            },
            "update": asdict(recipe.update),
            "loss": asdict(self.loss),
            "collapse": [recipe.monitoring.collapse, recipe.monitoring.collapse_steps],
            **self.common_identity(),
        }

    def _reward_hash(self) -> str | None:
        """Hash of the file that defines the reward function; None where there is none."""
        function = self.recipe.reward.function
        file = None if function is None else reward_file(function)
        return None if file is None else hashlib.sha256(read_bytes(file, ConfigError)).hexdigest()

    @cached_property
    def earlier(self) -> Mapping[str, Any]:
        record = self.recipe.model / PROVENANCE
        return read_object(record) if record.is_file() else {}

    @cached_property
    def origin(self) -> Origin | None:
        """The origin of the model according to its record; None where it has no record.

        Raises PuzzleError where the record is damaged.
        """
        return recorded_origin(self.recipe.model, self.earlier, self.config)


def recorded_origin(directory: Path, provenance: Mapping[str, Any], config: ModelConfig) -> Origin | None:
    """A checkpoint's origin, its first parent, according to its record; None where there is no record.

    Where the parent's directory is gone, its configuration is assumed to be the checkpoint's own.
    """
    if not provenance:
        return None
    kept, trained = provenance.get("kept_experts"), provenance.get("trained", [])
    if not isinstance(kept, list) or len(kept) != config.num_layers or not isinstance(trained, list):
        raise PuzzleError(f"{directory / PROVENANCE} does not list the kept_experts of {config.num_layers} layers")
    try:
        parent = describe_checkpoint(Path(str(provenance.get("parent", "")))).config
    except PuzzleError:
        parent = config
    return Origin(parent if parent.num_layers == config.num_layers else config, kept, trained)
