"""More weight for the tokens with which thinking ends, in the KLs by which children are chosen.

Pruned reasoning models are known for thinking that never ends, and few tokens decide it: the last ones of the analysis,
the change to the final text, and the one that ends the answer. In a mean over all tokens they count for little.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from jaxtyping import Int

from puzzle_jax.generate.batches import TokenWeights, alike
from puzzle_jax.generate.traces import Trace
from puzzle_jax.tasks import Chat


def ending_weights(chat: Chat, weight: int, tokens: int) -> TokenWeights:
    """Weights that count every token of a trace's ending `weight` times; its other tokens count once.

    Args:
      tokens: number of the analysis's last tokens that belong to its ending.
    """
    return alike if weight == 1 else partial(_weights, chat, weight, tokens)


def _weights(chat: Chat, weight: int, tokens: int, trace: Trace) -> Int[np.ndarray, "completion"]:
    weights = alike(trace)
    turn = chat.turn_to_final(trace.completion, trace.prompt)
    if turn is not None:
        first, last = turn
        weights[max(0, first - tokens) : last + 1] = weight
    if trace.completion[-1] in chat.stop_ids:
        weights[-1] = weight
    return weights
