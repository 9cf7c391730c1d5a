"""RCO's search for experts to prune, as published (arXiv 2605.00649), for `refinement.py` to compare with.

Every expert has a logit for being kept. A step draws logistic noise in antithetic pairs, keeps the experts with the
largest noisy logits, and multiplies the gates of the parent's own choices by this mask. The gradient of the KL by the
mask is passed on as if the mask were the sigmoid of the noisy logits at the step's temperature, projected onto the
tangent of the expected number of experts kept, and taken by Adam; logits are then shifted back to the budget.

Different here: the KL is over all tokens, not the parent's 20 likeliest; samples of a step are of similar length, so
that little is padding; and every layer keeps at least `experts_per_token` experts, without which it is no child.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from puzzle_jax.config import ModelConfig
from puzzle_jax.evaluate.divergence import divergence
from puzzle_jax.generate.traces import Trace
from puzzle_jax.kernels.expert_mlp import expert_mlp
from puzzle_jax.kernels.route import Routing
from puzzle_jax.model.network import attention_block, embed, hidden_states, rms_norm, route_tokens
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.spec import Params, layer_experts

STEPS, SAMPLES, ROWS = 300, 4, 4
"""Steps, noise samples of a step and traces of a sample."""

WORK = STEPS * SAMPLES * ROWS * 3
"""Forward passes of one trace in all; a backward pass counts as two."""

Keep = Bool[np.ndarray, "layers experts"]


def rco(params: Params, config: ModelConfig, calibration: Sequence[Trace], budget: int, seed: int) -> Keep:
    """The final mask with `budget` experts kept, from uniform logits."""
    random = np.random.default_rng(seed)
    layers, experts, k = config.num_layers, config.blocks[0].num_experts, config.experts_per_token
    logits = retracted(np.zeros((layers, experts)), budget)
    first, second = np.zeros((2, layers, experts))
    lengths, rate = _by_length(calibration), 2 * 0.1  # twice, for a difference of two logits
    share = np.array([len(traces) for _, traces in lengths], float) / len(calibration)
    for step in range(STEPS):
        temperature = 0.05 ** (step / (STEPS - 1))
        longest, traces = lengths[random.choice(len(lengths), p=share)]
        keep, slope, drawn = [], [], []
        for _ in range(SAMPLES // 2):
            noise = random.logistic(size=logits.shape)
            for sign in (1, -1):
                noisy = (logits + sign * noise) / temperature
                keep += [best(noisy, budget, k)] * ROWS
                slope += [sigmoid(noisy) * sigmoid(-noisy) / temperature] * ROWS
                drawn += [traces[number] for number in random.integers(len(traces), size=ROWS)]
        tokens, weight = _padded(drawn, longest)
        gradient = mask_gradient(params, config, tokens, weight, jnp.asarray(np.stack(keep), jnp.float32))
        normal = sigmoid(logits) * sigmoid(-logits)
        down = tangent((np.asarray(gradient) * np.stack(slope)).sum(axis=0), normal)
        first, second = 0.9 * first + 0.1 * down, 0.999 * second + 0.001 * down**2
        move = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
        logits = retracted(logits - rate * move, budget)
        first = tangent(first, sigmoid(logits) * sigmoid(-logits))
    return best(logits, budget, k)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def tangent(vector: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """A vector without its part along the gradient of the expected budget."""
    return vector - normal * (vector * normal).sum() / (normal * normal).sum()


def retracted(logits: np.ndarray, budget: int) -> np.ndarray:
    """Logits shifted by one number, so that the expected number of kept experts is the budget."""
    low, high = -100.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(logits + middle).sum() < budget else (low, middle)
    return logits + (low + high) / 2


def best(logits: np.ndarray, budget: int, k: int) -> Keep:
    """The `budget` experts with the largest logits, of which every layer has at least its `k` best."""
    keep = np.zeros(logits.shape, bool)
    np.put_along_axis(keep, np.argsort(-logits, axis=1)[:, :k], True, axis=1)
    rest = np.argsort(-np.where(keep, -np.inf, logits), axis=None)[: budget - int(keep.sum())]
    keep.reshape(-1)[rest] = True
    return keep


@partial(jax.jit, static_argnames="config")
def mask_gradient(
    params: Params, config: ModelConfig, tokens: Array, weight: Array, keep: Float[Array, "rows layers experts"]
) -> Float[Array, "rows layers experts"]:
    """Gradient of the KL by masks that multiply the gates of the parent's own choices, which are then renormalised."""
    parent, _ = hidden_states(params, config, tokens)

    def kl(keep: Array) -> Array:
        x, table = embed(params, tokens), rope_table(config.rope, config.head_dim, jnp.arange(tokens.shape[1])[None])
        for index, layer in enumerate(params["layers"]):
            x, _ = attention_block(layer["attention"], config, x, table, window=config.blocks[index].window)
            y = rms_norm(x, layer["moe"]["norm"], config.rms_norm_eps)
            ids, gates = route_tokens(layer["moe"], config, y).routing
            gates = gates * jnp.take_along_axis(jnp.repeat(keep[:, index], tokens.shape[1], axis=0), ids, axis=1)
            gates = gates / jnp.maximum(gates.sum(axis=1, keepdims=True), 1e-9)
            x = x + expert_mlp(y, Routing(ids, gates), layer_experts(layer["moe"]), limit=config.swiglu_limit)
        head = {name: params[name] for name in ("final_norm", "head")}
        return jnp.sum(divergence(head, config, parent, x).kl * weight)

    return jax.grad(kl)(keep)


def _by_length(traces: Sequence[Trace]) -> list[tuple[int, list[Trace]]]:
    """Traces in groups of similar length: all samples of a step are from one, so that little is padding."""
    groups: dict[int, list[Trace]] = {}
    for trace in traces:
        tokens = len(trace.prompt) + len(trace.completion)
        groups.setdefault(max(64, 1 << (tokens - 1).bit_length()), []).append(trace)
    return sorted(groups.items())


def _padded(traces: Sequence[Trace], longest: int) -> tuple[Array, Array]:
    """Tokens, and weights that make the sum of weighted KLs the mean over samples of the mean per token."""
    tokens, weight = np.zeros((len(traces), longest), np.int32), np.zeros((len(traces), longest), np.float32)
    for row, trace in enumerate(traces):
        ids = (*trace.prompt, *trace.completion)
        tokens[row, : len(ids)] = ids
        weight[row, len(trace.prompt) - 1 : len(ids) - 1] = 1.0
    of_sample = weight.reshape(SAMPLES, -1).sum(axis=1).repeat(ROWS)[:, None]
    return jnp.asarray(tokens), jnp.asarray(weight / of_sample / SAMPLES)
