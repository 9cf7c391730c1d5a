"""Groups of answers to a step's prompts, sampled from the current policy on the devices and parameters of training.

The sampler uses the same arrays as training. Stacked layers are unstacked for it within one compiled program, so that
nothing passes through files or the host; that copy is released before the update.

Every answer comes with the log-probabilities with which the sampler drew it and, where experts are replayed, the
experts that every layer chose. Left out: asynchronous sampling by a policy older than the one that learns.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
from jax.sharding import Mesh

from puzzle_jax.generate import Generated, Request, generate
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.sharding import params_sharding
from puzzle_jax.model.spec import Params
from puzzle_jax.model.stacked import unstack_params
from puzzle_jax.tasks import Chat
from puzzle_jax.tasks.rewards.answers import Answer, Reward
from puzzle_jax.train.grpo.primary_rewards import PrimaryRewards
from puzzle_jax.train.grpo.prompts import Prompt
from puzzle_jax.train.student import Student


@dataclass(frozen=True)
class Rollout:
    """One answer.

    Attributes:
      tokens: token ids of the prompt as it was rendered.
      generated: the completion, with log-probabilities and, if asked for, experts.
      answer: the answer as the reward function saw it.
      outcome: its reward, or why there is none.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    generated: Generated
    answer: Answer
    outcome: Reward

    @property
    def length(self) -> int:
        """Tokens of the completion."""
        return len(self.generated.tokens)


@dataclass(frozen=True, eq=False)
class Sampler:
    """Answers prompts; `RolloutSettings` describes most attributes.

    Attributes:
      student: the policy, a view on itself; its windows and caches are those of the model.
      experts: whether chosen experts are kept.
      mesh: mesh of "data" and "model" (`model.sharding.generation_mesh`) over all devices of training.
    """

    student: Student
    chat: Chat
    rewards: PrimaryRewards
    group: int
    max_tokens: dict[str, int]
    slots: int = 64
    seed: int = 0
    experts: bool = True
    cache: CacheFormat | None = None
    mesh: Mesh | None = None

    def sample(self, params: Params, prompts: Sequence[Prompt], draw: str) -> list[list[tuple[Request, Generated]]]:
        """Groups of completions, in the order of the prompts; `draw` names the random noise, and is unique in a run."""
        requests = [
            Request(
                tuple(self.chat.prompt_tokens(prompt.problem.prompt, prompt.effort)),
                self.max_tokens[prompt.effort],
                self._noise(draw, index, member),
            )
            for index, prompt in enumerate(prompts)
            for member in range(self.group)
        ]
        found = generate(
            params,
            self.student.config,
            requests,
            stop_ids=sorted(self.chat.stop_ids),
            temperature=1.0,
            slots=self.slots,
            cache=self.cache,
            mesh=self.mesh,
            log_probs=True,
            experts=self.experts,
        )
        pairs = list(zip(requests, found, strict=True))
        return [pairs[start : start + self.group] for start in range(0, len(pairs), self.group)]

    def reward(
        self, prompts: Sequence[Prompt], groups: Sequence[Sequence[tuple[Request, Generated]]]
    ) -> list[list[Rollout]]:
        """The completions with their rewards."""
        answers = [
            self._answer(prompt, request, generated)
            for prompt, members in zip(prompts, groups, strict=True)
            for request, generated in members
        ]
        rewarded = iter(zip(answers, self.rewards.of(answers), strict=True))
        return [
            [Rollout(prompt, request.prompt, generated, *next(rewarded)) for request, generated in members]
            for prompt, members in zip(prompts, groups, strict=True)
        ]

    def _answer(self, prompt: Prompt, request: Request, generated: Generated) -> Answer:
        parsed = self.chat.parse(generated.tokens, request.prompt)
        return Answer(
            prompt.problem, prompt.effort, parsed.analysis, parsed.final, len(generated.tokens), generated.truncated
        )

    def _noise(self, draw: str, index: int, member: int) -> int:
        return zlib.crc32(f"{self.seed}:{draw}:{index}:{member}".encode()) & (2**31 - 1)

    @cached_property
    def params(self) -> Callable[[Params, Params], Params]:
        """Maps base and trained parameters to the policy's, unstacked into layers as generation reads them."""
        student = self.student
        where = None if self.mesh is None else params_sharding(student.config, self.mesh)

        def unstack(base: Params, trained: Params) -> Params:
            return unstack_params(student.params(base, trained), student.runs)

        return jax.jit(unstack, out_shardings=where)
