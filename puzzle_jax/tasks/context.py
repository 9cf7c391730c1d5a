"""Checks that a prompt fits a model's context together with its longest answer."""

from __future__ import annotations

from collections.abc import Mapping

from puzzle_jax.errors import ConfigError
from puzzle_jax.tasks.base import Problem
from puzzle_jax.tasks.chat.chat import Chat


def most_positions(chat: Chat, problem: Problem, effort: str, max_tokens: Mapping[str, int]) -> int:
    """The positions that a problem and its longest answer take at an effort."""
    return len(chat.prompt_tokens(problem.prompt, effort)) + max_tokens[effort]


def check_fits(where: str, prompt: int, answer: int, context: int, whose: str = "the model", at: str = "") -> int:
    """Returns the positions that a prompt and its longest answer take together.

    Args:
      where: what the prompt belongs to; the message begins with it.
      prompt, answer: numbers of tokens.
      context: number of positions in the model's context.
      whose: owner of the context, for the message.
      at: what the answer's limit depends on, for the message (" at effort low").

    Raises ConfigError if they are more than `context`.
    """
    if prompt + answer > context:
        raise ConfigError(
            f"{where}: the prompt takes {prompt} tokens and the answer up to {answer}{at}, but the context of {whose} "
            f"is {context} tokens"
        )
    return prompt + answer
