"""Checks that a prompt fits a model's context together with its longest answer."""

from __future__ import annotations

from collections.abc import Mapping

from puzzle_jax.errors import ConfigError
from puzzle_jax.tasks.base import Problem
from puzzle_jax.tasks.chat.chat import Chat


def most_positions(chat: Chat, problem: Problem, effort: str, max_tokens: Mapping[str, int]) -> int:
    """The positions that a problem takes at an effort with its longest answer."""
    return len(chat.prompt_tokens(problem.prompt, effort)) + max_tokens[effort]


def check_fits(where: str, prompt: int, answer: int, context: int, whose: str = "the model", at: str = "") -> int:
    """The positions that a prompt takes with its longest answer.

    Args:
      where: what is asked, with which a message begins.
      prompt, answer: tokens of both.
      context: positions that the model reads.
      whose: context it is, for the message.
      at: what the answer's limit depends on, for the message (" at effort low").

    Raises ConfigError where they are more than `context`.
    """
    if prompt + answer > context:
        raise ConfigError(
            f"{where}: the prompt takes {prompt} tokens and the answer up to {answer}{at}, but the context of {whose} "
            f"is {context} tokens"
        )
    return prompt + answer
