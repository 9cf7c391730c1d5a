"""Expert ranking: one streaming pass over the traces scores every expert of every layer by several methods.

    removal_error       mean over tokens of mean_d (y'_{t,e} - y_t)^2, where y' is the mixture's output with e removed
                        and the token routed again. With a top-k router the expert that enters is always the (k+1)-th,
                        so the top k+1 experts, evaluated once, give all k counterfactuals exactly.
    joint_greedy        the same, given all experts removed before (`search.rank.elimination`)
    reap                mean over the tokens routed to e of gate * |output of e| (arXiv 2510.13999)
    easy_ep             sum over tokens of gate * |output of e| * max(1 - cos(x before, x after the mixture), 0)
                        (arXiv 2504.06792)
    frequency           share of tokens routed to e
    weighted_frequency  the same, weighted by the gate
    ranked_choice       votes by router logits; those for removed experts are transferred (`search.rank.elimination`)

No method is best everywhere, so each proposes experts to keep and exact scores choose among them. Every valid token of
a trace counts, prompt included; every trace of a task has the same weight, however long it is, and so has every task,
however many traces it has. Experts that no token was routed to rank last under every method. Memory does not grow with
the number of traces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from puzzle_jax.config import ModelConfig
from puzzle_jax.evaluate.divergence import cosine
from puzzle_jax.files import write_beside
from puzzle_jax.generate.batches import MicroBatch
from puzzle_jax.kernels.expert_mlp import expert_outputs
from puzzle_jax.kernels.route import top_k_ids
from puzzle_jax.model.network import embed, rms_norm, traced_mesh
from puzzle_jax.model.sharding import beside, on_mesh, read, replicated, spread_rows
from puzzle_jax.model.spec import Params, layer_experts
from puzzle_jax.search.rank.elimination import (
    Sample,
    draw,
    empty_sample,
    gram_matrices,
    joint_greedy,
    merge,
    num_ranks,
    ranked_choice,
)
from puzzle_jax.search.score.replace_one import run_attention
from puzzle_jax.search.space import ExpertChoice, Space, Windows, distinct_choices

METHODS = ("removal_error", "joint_greedy", "reap", "easy_ep", "frequency", "weighted_frequency", "ranked_choice")

_SAVE_SECONDS = 5.0

SAMPLED_PER_LAYER, SAMPLED_PER_BATCH = 8192, 512
"""Most tokens sampled for the methods that remove one expert after the other."""


class Ranking(NamedTuple):
    """Scores [layers, experts] by method, where higher is better; and routed tokens per expert, by trace weight."""

    scores: Mapping[str, np.ndarray]
    routed: np.ndarray

    def keep(self, method: str, layer: int, count: int) -> tuple[int, ...]:
        """Ids of the `count` best experts of a layer, ascending; equal scores go to the one routed to more often."""
        order = np.lexsort((-self.routed[layer], -self.scores[method][layer]))
        return tuple(sorted(int(i) for i in order[:count]))

    def agreement(self, counts: Sequence[int]) -> dict[tuple[str, str], float]:
        """The share of kept experts that both methods of a pair keep, as the mean over layers and counts."""

        def shares(one: str, other: str) -> Iterator[float]:
            for layer in range(len(self.routed)):
                for count in counts:
                    yield len({*self.keep(one, layer, count)} & {*self.keep(other, layer, count)}) / count

        return {pair: float(np.mean(list(shares(*pair)))) for pair in combinations(self.scores, 2)}


def ranked_space(
    parent: ModelConfig,
    counts: Sequence[Sequence[int]],
    windows: Windows,
    ranking: Ranking,
) -> Space:
    """The keep-set of every method for every layer and count, equal ones merged; the parent's own set comes first if
    its count is offered."""
    layers = []
    for layer, (block, offered) in enumerate(zip(parent.blocks, counts, strict=True)):
        everything = ExpertChoice(block.num_experts, tuple(range(block.num_experts)), "parent")
        kept = [
            ExpertChoice(count, ranking.keep(method, layer, count), method)
            for count in offered
            if count < block.num_experts
            for method in METHODS
        ]
        layers.append((*([everything] if block.num_experts in offered else []), *distinct_choices(kept)))
    return Space(parent, tuple(layers), windows)


class RankSums(NamedTuple):
    """One layer's sums over the weighted tokens so far, by expert, and a sample of those tokens."""

    removal: Float[Array, "experts"]
    gated_norm: Float[Array, "experts"]
    turned_norm: Float[Array, "experts"]  # times how far the mixture turned the hidden state
    gates: Float[Array, "experts"]
    routed: Float[Array, "experts"]
    tokens: Float[Array, ""]
    sample: Sample


class KeptSums:
    """A file of the sums over the batches so far, saved as often as costs little; an unusable file is ignored."""

    def __init__(self, path: Path) -> None:
        self.path, self._next = path, 0.0

    def load(self, config: ModelConfig) -> tuple[int, list[RankSums]]:
        """The number of batches that are done, and their sums by layer."""
        empty = [no_sums(config) for _ in config.blocks]
        leaves, tree = jax.tree.flatten(empty)
        try:
            found = load_file(self.path)
            arrays = [found[str(number)] for number in range(len(leaves))]
            if all(a.shape == leaf.shape and a.dtype == leaf.dtype for a, leaf in zip(arrays, leaves, strict=True)):
                return int(found["batches"][0]), jax.tree.unflatten(tree, [jnp.asarray(a) for a in arrays])
        except (OSError, SafetensorError, KeyError, ValueError):
            pass
        return 0, empty

    def save(self, batches: int, sums: Sequence[RankSums]) -> None:
        """Saves the sums, unless the last save was less than 20 times its own duration, or less than 5 s, ago."""
        start = time.monotonic()
        if start < self._next:
            return
        arrays = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(list(sums)))}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(self.path, save({**arrays, "batches": np.array([batches])}))
        end = time.monotonic()
        self._next = end + max(20 * (end - start), _SAVE_SECONDS)


def rank_experts(
    params: Params,
    config: ModelConfig,
    batches: Iterable[MicroBatch],
    on_batch: Callable[[], None] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    kept: KeptSums | None = None,
) -> Ranking:
    """Streams batches through the parent, whose layers must have equally many experts.

    Args:
      seed: random seed of the sample.
      mesh: mesh that holds the parameters; experts run on the devices that hold them, and rows are sharded over the
        data axis if it divides them.
      kept: sums of a killed run, whose batches are not run again, and the file to save this run's sums to.
    """
    done, sums = kept.load(config) if kept is not None else (0, [no_sums(config) for _ in config.blocks])
    sums = replicated(beside(params, sums, mesh), mesh)
    for number, batch in enumerate(batches):
        if number < done:
            if on_batch is not None:
                on_batch()
            continue
        x = _embed(params, spread_rows(batch.tokens, mesh))
        random = jax.random.fold_in(jax.random.key(seed), number)
        with on_mesh(mesh):
            for index, layer in enumerate(params["layers"]):
                # Attention is separate, so that the larger program is compiled once for all windows.
                x = run_attention(layer["attention"], config, config.blocks[index].window, x)
                x, sums[index] = rank_mixture(layer["moe"], config, x, batch, sums[index], random)
        if kept is not None:
            kept.save(number + 1, sums)
        if on_batch is not None:
            on_batch()
    return _ranking(sums, config.experts_per_token, mesh)


def no_sums(config: ModelConfig) -> RankSums:
    """The sums of a layer before the first batch."""
    experts = config.blocks[0].num_experts
    sample = empty_sample(SAMPLED_PER_LAYER, experts, num_ranks(experts, config.experts_per_token))
    return RankSums(*(jnp.zeros(experts) for _ in range(5)), tokens=jnp.zeros(()), sample=sample)


def _ranking(sums: Sequence[RankSums], k: int, mesh: Mesh | None) -> Ranking:
    removal, gated_norm, turned_norm, gates, routed, tokens = (
        np.stack([np.asarray(of_layer[part], np.float64) for of_layer in sums]) for part in range(6)
    )
    tokens = tokens[:, None]

    def eliminated(by: Callable[[Sample, Array, int], Array]) -> np.ndarray:
        return np.stack([np.asarray(read(by(s.sample, s.routed, k), mesh), np.float64) for s in sums])

    scores = {
        "removal_error": removal / tokens,
        "joint_greedy": eliminated(joint_greedy),
        "reap": gated_norm / np.maximum(routed, 1e-30),
        "easy_ep": turned_norm / tokens,
        "frequency": routed / tokens,
        "weighted_frequency": gates / tokens,
        "ranked_choice": eliminated(ranked_choice),
    }
    return Ranking({name: np.where(routed == 0, -np.inf, scores[name]) for name in METHODS}, routed)


_embed = jax.jit(embed)


@partial(jax.jit, static_argnames="config", donate_argnames="sums")
def rank_mixture(
    moe: Params,
    config: ModelConfig,
    x: Float[Array, "rows seq hidden"],
    batch: MicroBatch,
    sums: RankSums,
    random: PRNGKeyArray,
) -> tuple[Float[Array, "rows seq hidden"], RankSums]:
    """One layer's mixture in the parent, after its attention, and the layer's sums with the batch added."""
    k, experts = config.experts_per_token, config.blocks[0].num_experts
    before = x.reshape(-1, x.shape[-1])
    y = rms_norm(before, moe["norm"], config.rms_norm_eps)
    logits = (y @ moe["router_weight"] + moe["router_bias"]).astype(jnp.float32)
    ids = top_k_ids(logits, min(k + 1, experts))
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    outputs = _outputs(moe, config, y, ids)
    gates = jax.nn.softmax(chosen[:, :k], axis=-1)
    out = jnp.einsum("tk,tkh->th", gates, outputs[:, :k])
    after = before + out.astype(x.dtype)
    norms = gates * jnp.linalg.norm(outputs[:, :k], axis=-1)
    turned = jnp.maximum(1.0 - cosine(before, after), 0.0)[:, None]
    removal = _removal_errors(chosen, outputs, out, k) if experts > k else jnp.zeros_like(gates)
    of_trace = batch.task_weight / jnp.maximum(batch.lengths, 1)
    weight = (batch.valid * of_trace[:, None]).reshape(-1)

    def by_expert(per_choice: Float[Array, "tokens k"]) -> Float[Array, "experts"]:
        return jnp.zeros(experts).at[ids[:, :k]].add(per_choice * weight[:, None])

    per_choice = (removal, norms, norms * turned, gates, jnp.ones_like(gates))
    totals = [old + by_expert(new) for old, new in zip(sums[:5], per_choice, strict=True)]
    sample = merge(sums.sample, _sample(moe, config, y, logits, weight, random))
    sums = RankSums(*totals, tokens=sums.tokens + jnp.sum(weight), sample=sample)
    if traced_mesh() is not None:  # so that every process can read and save them at any time
        sums = jax.lax.with_sharding_constraint(sums, PartitionSpec())
    return after.reshape(x.shape), sums


def _sample(moe: Params, config: ModelConfig, y: Array, logits: Array, weight: Array, random: PRNGKeyArray) -> Sample:
    """A sample of a batch's tokens, with the Gram matrices of their best-ranked experts' outputs."""
    key, weight, tokens = draw(random, weight, min(SAMPLED_PER_BATCH, weight.shape[0]))
    order = jnp.argsort(-logits[tokens], axis=-1, stable=True).astype(jnp.int32)
    best = order[:, : num_ranks(logits.shape[1], config.experts_per_token)]
    outputs = _outputs(moe, config, y[tokens], best)
    return Sample(key, weight, order, jnp.take_along_axis(logits[tokens], best, axis=-1), gram_matrices(outputs))


def _outputs(moe: Params, config: ModelConfig, y: Array, ids: Array) -> Float[Array, "tokens ranks hidden"]:
    """The outputs of the experts `ids` of every token."""
    found = expert_outputs(y, ids, layer_experts(moe), limit=config.swiglu_limit, mesh=traced_mesh())
    return found.astype(jnp.float32)


def _removal_errors(
    chosen: Float[Array, "tokens k_plus_1"],
    outputs: Float[Array, "tokens k_plus_1 hidden"],
    out: Float[Array, "tokens hidden"],
    k: int,
) -> Float[Array, "tokens k"]:
    """Mean squared change of the mixture's output when each of the k chosen experts is removed."""
    errors = []
    for removed in range(k):
        stays = jnp.arange(k + 1) != removed
        gates = jax.nn.softmax(jnp.where(stays, chosen, -jnp.inf), axis=-1)
        changed = jnp.einsum("tk,tkh->th", gates, outputs)
        errors.append(jnp.mean((changed - out) ** 2, axis=-1))
    return jnp.stack(errors, axis=-1)
