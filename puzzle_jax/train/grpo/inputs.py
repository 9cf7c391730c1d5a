"""What reinforcement learning starts from: a checkpoint, its chat, and problems with verifiable answers.

Everything that a user can mend is refused here, before weights are read and anything is written.
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
from puzzle_jax.convert_hf.describe import Description, describe_checkpoint
from puzzle_jax.convert_hf.export import PROVENANCE, Origin
from puzzle_jax.convert_hf.load import cache_scales
from puzzle_jax.convert_hf.token_ids import check_tokenizer
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.evaluate.accuracy import QuestionSet, check_context
from puzzle_jax.evaluate.models import Model
from puzzle_jax.files import read_bytes, read_object
from puzzle_jax.model.cache_format import FLOAT8, CacheFormat
from puzzle_jax.model.child import identity_child
from puzzle_jax.runs import begun_on
from puzzle_jax.tasks import Chat, get_task
from puzzle_jax.tasks.rewards.source import reward_file
from puzzle_jax.train.grpo.prompts import Prompt, Prompts
from puzzle_jax.train.grpo.recipe import GrpoRecipe
from puzzle_jax.train.losses.policy_settings import ResolvedPolicy
from puzzle_jax.train.run import RunInputs
from puzzle_jax.train.student import Student

EVALUATED_SPLIT = "validation"


@dataclass(frozen=True)
class GrpoInputs(RunInputs):
    """What a recipe names, read and checked; all but the weights.

    Attributes:
      recipe: all settings.
      description: of the checkpoint.
      chat: of the model; its template sees the date on which the run was begun.
      earlier: the checkpoint's record; empty where it has none.
      fingerprint: of the checkpoint.
    """

    recipe: GrpoRecipe
    description: Description
    chat: Chat
    earlier: Mapping[str, Any]
    fingerprint: str

    @staticmethod
    def open(recipe: GrpoRecipe, today: datetime.datetime | None = None) -> GrpoInputs:
        """Reads and checks them.

        Args:
          today: the date that the chat template sees; None is the day on which the run was begun.

        Raises PuzzleError for whatever is wrong.
        """
        if recipe.out.resolve() == recipe.model.resolve():
            raise ConfigError(f"out is {recipe.out}, which is the model itself; name another directory")
        description = describe_checkpoint(recipe.model)
        chat = Chat.load(recipe.model, today or begun_on(recipe.out))
        check_tokenizer(recipe.model, chat.tokenizer, description.config.vocab_size)
        record = recipe.model / PROVENANCE
        provenance = read_object(record) if record.is_file() else {}
        inputs = GrpoInputs(recipe, description, chat, provenance, Model("model", description, chat).fingerprint)
        if recipe.update.row_length > inputs.config.max_position:
            raise ConfigError(
                f"update.row_length is {recipe.update.row_length}, but the model's context is "
                f"{inputs.config.max_position}"
            )
        if recipe.rollout.cache == FLOAT8 and cache_scales(description) is None:
            raise ConfigError(f"rollout.cache is {FLOAT8}, but {recipe.model} carries no scales for such a cache")
        _ = inputs.origin
        next(inputs.prompts())
        inputs.check_questions()
        return inputs

    @cached_property
    def base(self) -> Path:
        return self.recipe.model

    @cached_property
    def updates(self) -> int:
        return self.recipe.loop.steps * self.recipe.update.updates

    @property
    def config(self) -> ModelConfig:
        return self.description.config

    @cached_property
    def student(self) -> Student:
        """The model as a view on itself."""
        return Student(identity_child(self.config), self.recipe.train, self.recipe.remat)

    @cached_property
    def loss(self) -> ResolvedPolicy:
        """With what the named loss leaves open."""
        return self.recipe.loss.resolved

    @property
    def cache(self) -> CacheFormat:
        """How the sampler keeps keys and values."""
        dtype = self.recipe.rollout.cache
        return CacheFormat(dtype, cache_scales(self.description) if dtype == FLOAT8 else None)

    @property
    def limits(self) -> dict[str, int]:
        """Tokens of an answer by effort."""
        return {effort: self.recipe.rollout.limit(effort) for effort in self.recipe.prompts.efforts}

    def prompts(self) -> Prompts:
        """The stream of prompts, from its beginning."""
        return Prompts(self.recipe.prompts, self.fits)

    def fits(self, prompt: Prompt) -> bool:
        """Whether a row holds the prompt with the longest answer."""
        return self.most_tokens(prompt) <= self.recipe.update.row_length

    def check_questions(self) -> None:
        """Raises ConfigError where the model's context holds no question of an effort that the policy is evaluated at.

        Single ones that it does not hold are passed over (`too_long`).
        """
        questions = self.questions.questions()
        for effort in self.questions.efforts:
            asked = {index for index, (_, of) in enumerate(questions) if of == effort}
            if asked <= self.too_long:
                chosen = [questions[index] for index in sorted(asked)]
                check_context(chosen, self.chat, self.config, self.limits, "the model, which is evaluated on them,")

    @cached_property
    def too_long(self) -> frozenset[int]:
        """Questions of the evaluation, by their number, that the model's context does not hold."""
        return frozenset(
            index
            for index, (problem, effort) in enumerate(self.questions.questions())
            if self.most_tokens(Prompt(problem, effort)) > self.config.max_position
        )

    def most_tokens(self, prompt: Prompt) -> int:
        """Of a prompt with its longest answer."""
        return len(self.chat.prompt_tokens(prompt.problem.prompt, prompt.effort)) + self.limits[prompt.effort]

    @cached_property
    def questions(self) -> QuestionSet:
        """What the policy is evaluated on."""
        prompts = self.recipe.prompts
        return QuestionSet(
            tuple(prompts.task_weights), tuple(prompts.efforts), self.recipe.watch.problems, EVALUATED_SPLIT
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the result depends on, as JSON values. Meshes, and how often something is saved, are left out."""
        recipe = self.recipe
        return {
            "kind": "grpo",
            "model": self.fingerprint,
            "prompts": asdict(recipe.prompts) | {"judged_by": self._judged_by()},
            "rollout": asdict(recipe.rollout) | {"max_tokens": self.limits},
            "reward": {
                "function": recipe.reward.function,
                "file": self._reward_hash(),
                "right": recipe.reward.right,
                "environment": recipe.reward.environment,
            },
            "update": asdict(recipe.update),
            "loss": asdict(self.loss),
            "optimizer": asdict(recipe.optimizer),
            "collapse": [recipe.watch.collapse, recipe.watch.collapse_steps],
            "train": sorted(set(recipe.train)),
            "steps": recipe.loop.steps,
            "seed": recipe.seed,
            "today": self.chat.today.date().isoformat(),
        }

    def _reward_hash(self) -> str | None:
        """Of the file that the reward function is in; None where there is none."""
        function = self.recipe.reward.function
        file = None if function is None else reward_file(function)
        return None if file is None else hashlib.sha256(read_bytes(file, ConfigError)).hexdigest()

    def _judged_by(self) -> dict[str, str]:
        """What problems and their scores depend on, by task."""
        return {name: get_task(name).identity for name in self.recipe.prompts.task_weights}

    @cached_property
    def origin(self) -> Origin | None:
        """Where the model comes from, by its record; None where it is no child.

        Raises PuzzleError where the record is damaged.
        """
        return recorded_origin(self.recipe.model, self.earlier, self.config)


def recorded_origin(directory: Path, provenance: Mapping[str, Any], config: ModelConfig) -> Origin | None:
    """What a checkpoint's record tells of its first parent; None where there is no record.

    Where the parent's directory is gone, its configuration is taken to be the checkpoint's own.
    """
    if not provenance:
        return None
    kept, trained = provenance.get("kept_experts"), provenance.get("trained", [])
    if not isinstance(kept, list) or len(kept) != config.num_layers or not isinstance(trained, list):
        raise PuzzleError(f"{directory / PROVENANCE} does not tell the kept_experts of {config.num_layers} layers")
    try:
        parent = describe_checkpoint(Path(str(provenance.get("parent", "")))).config
    except PuzzleError:
        parent = config
    return Origin(parent if parent.num_layers == config.num_layers else config, kept, trained)
