"""One streaming pass over the traces, which gathers all that the ranking rules read.

Every valid token of a trace counts, prompt included; every trace of a task has the same weight, however long it is, and
so has every task, however many traces it has (`rank.rows`). Sums whose name begins with `token_` give every token the
same weight in place of that. Memory does not grow with the number of traces.

The removal error of an expert e is exact: mean_d (y'_d - y_d)^2, where y' is the mixture's output with e removed and
the token routed again. With a top-k router the expert that enters is always the (k+1)-th, so the top k+1 experts,
evaluated once, give all k counterfactuals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from puzzle_jax.config import ModelConfig
from puzzle_jax.evaluate.divergence import cosine
from puzzle_jax.files import write_beside
from puzzle_jax.kernels.expert_mlp import expert_outputs
from puzzle_jax.kernels.route import route, top_k_ids
from puzzle_jax.model.network import attention_block, embed, rms_norm, router_logits, traced_mesh
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.sharding import beside, on_mesh, read, replicated, spread_rows
from puzzle_jax.model.spec import Params, layer_experts
from puzzle_jax.search.rank.rows import PackedTraces
from puzzle_jax.search.rank.sample import Sample, draw, empty_sample, gram_matrices, merge, num_ranks

SAMPLED_PER_LAYER, SAMPLED_PER_BATCH = 8192, 512
"""Most tokens sampled for the rules that remove one expert after the other."""

_SAVE_SECONDS = 5.0

ByExpert = Float[np.ndarray, "layers experts"]
ByPair = Float[np.ndarray, "layers experts experts"]


class LayerSums(NamedTuple):
    """One layer's sums over the tokens so far, and a sample of those tokens.

    Attributes, by expert, summed over the tokens that are routed to it, with their weights:
      removal: the removal error.
      norms, squared_norms: the norm of the expert's output, and its square.
      gated_norms: the gate times the norm.
      turned_norms: the same, times how far the mixture turned the hidden state: max(0, 1 - cosine).
      gates: the gate.
      routed: 1.
      token_gated_norms, token_routed: as `gated_norms` and `routed`, every token with weight 1.
    By pair of experts, over the tokens routed to both:
      pair_norms: the product of their gated norms.
      pair_routed: 1.
    In all:
      tokens: the weight of all tokens.
      sample: sampled tokens.
    """

    removal: Float[Array, "experts"]
    norms: Float[Array, "experts"]
    squared_norms: Float[Array, "experts"]
    gated_norms: Float[Array, "experts"]
    turned_norms: Float[Array, "experts"]
    gates: Float[Array, "experts"]
    routed: Float[Array, "experts"]
    token_gated_norms: Float[Array, "experts"]
    token_routed: Float[Array, "experts"]
    pair_norms: Float[Array, "experts experts"]
    pair_routed: Float[Array, "experts experts"]
    tokens: Float[Array, ""]
    sample: Sample


@dataclass(frozen=True)
class Statistics:
    """The sums of all layers, as `LayerSums` describes them, in float64.

    Attributes:
      experts_per_token: the router's k.
      samples: sampled tokens of each layer.
      mesh: mesh that holds the samples.
    """

    removal: ByExpert
    norms: ByExpert
    squared_norms: ByExpert
    gated_norms: ByExpert
    turned_norms: ByExpert
    gates: ByExpert
    routed: ByExpert
    token_gated_norms: ByExpert
    token_routed: ByExpert
    pair_norms: ByPair
    pair_routed: ByPair
    tokens: Float[np.ndarray, "layers"]
    experts_per_token: int
    samples: Sequence[Sample] = ()
    mesh: Mesh | None = None

    @staticmethod
    def of(sums: Sequence[LayerSums], experts_per_token: int, mesh: Mesh | None = None) -> Statistics:
        names = [name for name in LayerSums._fields if name != "sample"]
        stacked = {name: np.stack([np.asarray(getattr(s, name), np.float64) for s in sums]) for name in names}
        return Statistics(**stacked, experts_per_token=experts_per_token, samples=[s.sample for s in sums], mesh=mesh)

    def mean_over_tokens(self, sums: ByExpert) -> ByExpert:
        """Sums as means over all tokens."""
        return sums / self.tokens[:, None]

    def mean_over_routed(self, sums: ByExpert) -> ByExpert:
        """Sums as means over the tokens that are routed to each expert; 0 where there are none."""
        return sums / np.maximum(self.routed, 1e-30)

    def by_sample(self, rule: Callable[[Sample, Array, int], Array]) -> ByExpert:
        """Scores that a jitted function of a layer's sample, `routed` and k gives."""
        of_layers = zip(self.samples, self.routed, strict=True)
        found = [rule(sample, jnp.asarray(routed, jnp.float32), self.experts_per_token) for sample, routed in of_layers]
        return np.stack([np.asarray(read(scores, self.mesh), np.float64) for scores in found])


class KeptSums:
    """A file of the sums over the batches so far, saved as often as costs little; an unusable file is ignored."""

    def __init__(self, path: Path) -> None:
        self.path, self._next = path, 0.0

    def load(self, config: ModelConfig) -> tuple[int, list[LayerSums]]:
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

    def save(self, batches: int, sums: Sequence[LayerSums]) -> None:
        """Saves the sums, unless the last save was less than 20 times its own duration, or less than 5 s, ago."""
        start = time.monotonic()
        if start < self._next:
            return
        arrays = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(list(sums)))}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(self.path, save({**arrays, "batches": np.array([batches])}))
        end = time.monotonic()
        self._next = end + max(20 * (end - start), _SAVE_SECONDS)


def gather_statistics(
    params: Params,
    config: ModelConfig,
    batches: Sequence[PackedTraces],
    on_batch: Callable[[], None] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    kept: KeptSums | None = None,
) -> Statistics:
    """Streams batches through the parent, whose layers must have equally many experts.

    Args:
      on_batch: called after every batch.
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
                x = attend(layer["attention"], config, config.blocks[index].window, x, batch)
                x, sums[index] = add_mixture(layer["moe"], config, x, batch.weight, sums[index], random)
        if kept is not None:
            kept.save(number + 1, sums)
        if on_batch is not None:
            on_batch()
    return Statistics.of(sums, config.experts_per_token, mesh)


def no_sums(config: ModelConfig) -> LayerSums:
    """The sums of a layer before the first batch."""
    experts = config.blocks[0].num_experts
    sample = empty_sample(SAMPLED_PER_LAYER, experts, num_ranks(experts, config.experts_per_token))
    by_expert = [jnp.zeros(experts) for _ in range(9)]
    by_pair = [jnp.zeros((experts, experts)) for _ in range(2)]
    return LayerSums(*by_expert, *by_pair, tokens=jnp.zeros(()), sample=sample)


_embed = jax.jit(embed)


@partial(jax.jit, static_argnames=("config", "window"))
def attend(
    attention: Params,
    config: ModelConfig,
    window: int | None,
    x: Float[Array, "rows seq hidden"],
    batch: PackedTraces,
) -> Float[Array, "rows seq hidden"]:
    """One layer's attention within the traces of packed rows."""
    table = rope_table(config.rope, config.head_dim, batch.positions)
    return attention_block(attention, config, x, table, window=window, segment_ids=batch.segment_ids)[0]


@partial(jax.jit, static_argnames="config", donate_argnames="sums")
def add_mixture(
    moe: Params,
    config: ModelConfig,
    x: Float[Array, "rows seq hidden"],
    weight: Float[Array, "rows seq"],
    sums: LayerSums,
    random: PRNGKeyArray,
) -> tuple[Float[Array, "rows seq hidden"], LayerSums]:
    """One layer's mixture in the parent, after its attention, and the layer's sums with the batch added."""
    k, experts = config.experts_per_token, config.blocks[0].num_experts
    before, weight = x.reshape(-1, x.shape[-1]), weight.reshape(-1)
    y = rms_norm(before, moe["norm"], config.rms_norm_eps)
    logits = router_logits(moe, y)
    ids = top_k_ids(logits, min(k + 1, experts))
    outputs = _outputs(moe, config, y, ids)
    gates = route(logits, k, ids=ids[:, :k], normalized=config.variant.normalized_gates).gates
    out = jnp.einsum("tk,tkh->th", gates, outputs[:, :k])
    after = before + out.astype(x.dtype)
    norms = jnp.linalg.norm(outputs[:, :k], axis=-1)
    gated = gates * norms
    turned = jnp.maximum(1.0 - cosine(before, after), 0.0)[:, None]
    removal = _removal_errors(config, logits, ids, outputs, out) if experts > k else jnp.zeros_like(gates)
    is_token = (weight > 0).astype(jnp.float32)

    is_chosen = jax.nn.one_hot(ids[:, :k], experts)

    def spread(per_choice: Float[Array, "tokens k"]) -> Float[Array, "tokens experts"]:
        return jnp.sum(per_choice[..., None] * is_chosen, axis=1)

    by_expert = [spread(v) for v in (removal, norms, norms**2, gated, gated * turned, gates, jnp.ones_like(gates))]
    of_gated, of_routed = by_expert[3], by_expert[6]
    highest = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    totals = [highest(weight, values) for values in by_expert]
    totals += [highest(is_token, values) for values in (of_gated, of_routed)]
    totals += [highest((values * weight[:, None]).T, values) for values in (of_gated, of_routed)]
    sample = merge(sums.sample, _sample(moe, config, y, logits, weight, random))
    added = [getattr(sums, name) + new for name, new in zip(LayerSums._fields, totals, strict=False)]
    sums = LayerSums(*added, tokens=sums.tokens + jnp.sum(weight), sample=sample)
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
    config: ModelConfig,
    logits: Float[Array, "tokens experts"],
    ids: Int[Array, "tokens k_plus_1"],
    outputs: Float[Array, "tokens k_plus_1 hidden"],
    out: Float[Array, "tokens hidden"],
) -> Float[Array, "tokens k"]:
    """Mean squared change of the mixture's output when each of the k chosen experts is removed."""
    errors = []
    for removed in range(config.experts_per_token):
        mask = jnp.arange(logits.shape[-1]) != ids[:, removed, None]
        stays = [rank for rank in range(ids.shape[1]) if rank != removed]
        gates = route(
            logits, len(stays), mask=mask, ids=ids[:, stays], normalized=config.variant.normalized_gates
        ).gates
        changed = jnp.einsum("tk,tkh->th", gates, outputs[:, stays])
        errors.append(jnp.mean((changed - out) ** 2, axis=-1))
    return jnp.stack(errors, axis=-1)
