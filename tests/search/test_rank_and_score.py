"""Ranking and scoring against direct computation: one removal, one replacement, one whole forward pass at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.traces import Trace
from puzzle_jax.kernels.expert_mlp import expert_mlp
from puzzle_jax.kernels.route import route
from puzzle_jax.model.child import Child, ChildBlock, whole
from puzzle_jax.model.network import attention_block, embed, forward, rms_norm
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.spec import layer_experts
from puzzle_jax.search.rank import METHODS, rank_experts
from puzzle_jax.search.score import Alternative, replace_one_scores, score_children
from tests.support import random_params, small_config


@pytest.fixture(scope="module")
def parent():
    config = small_config()
    params = random_params(config)
    # Expert 6 of layer 1 is never chosen.
    moe = params["layers"][1]["moe"]
    moe["router_bias"] = moe["router_bias"].at[6].set(-1e4)
    rng = np.random.default_rng(0)
    sizes = [(9, 7), (14, 3), (40, 12), (25, 30)]
    traces = [
        Trace(
            "t",
            "low",
            i,
            {},
            tuple(rng.integers(0, 97, p).tolist()),
            tuple(rng.integers(0, 97, c).tolist()),
            1.0,
            False,
        )
        for i, (p, c) in enumerate(sizes)
    ]
    return config, params, traces


def test_rankings_by_hand(parent):
    config, params, traces = parent
    ranking = rank_experts(params, config, micro_batches(traces, tokens_per_batch=128, smallest=64))
    sums = [removals_and_contributions(params, config, *padded(trace)) for trace in traces]
    for layer in range(config.num_layers):
        removal, gated, routed = np.sum([of_trace[layer] for of_trace in sums], axis=0)
        with np.errstate(invalid="ignore"):
            expected = {"removal_error": removal / 4, "reap": gated / routed, "frequency": routed / 4}
        for method in METHODS:
            found, never = ranking.scores[method][layer], routed == 0
            np.testing.assert_allclose(found[~never], expected[method][~never], rtol=2e-4)
            assert np.all(found[never] == -np.inf) and (layer != 1 or never[6])


def padded(trace):
    """A trace's tokens as one row of 64, one length for all traces, and how many there are."""
    tokens = (*trace.prompt, *trace.completion)
    return jnp.zeros((1, 64), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens)), len(tokens)


@partial(jax.jit, static_argnums=1)
def removals_and_contributions(params, config, tokens, count):
    """Per layer and expert, means over one row's tokens: the error when it is removed, where it was chosen; the norm of
    its gated output; how often it was chosen."""
    x, means = embed(params, tokens), []
    table = rope_table(config.rope, config.head_dim, jnp.arange(tokens.shape[1])[None])
    for layer, block in zip(params["layers"], config.blocks, strict=True):
        x, _ = attention_block(layer["attention"], config, x, table, window=block.window)
        moe, y = layer["moe"], rms_norm(x, layer["moe"]["norm"], config.rms_norm_eps)[0]
        logits = y @ moe["router_weight"] + moe["router_bias"]

        def mixture(routing, moe=moe, y=y):
            return expert_mlp(y, routing, layer_experts(moe), limit=config.swiglu_limit, implementation="reference")

        def of_expert(expert, logits=logits, mixture=mixture):
            chosen = route(logits, 2)
            used = (chosen.ids == expert).any(axis=1)
            without = mixture(route(logits, 2, mask=jnp.arange(7)[None] != expert))
            alone = mixture(chosen._replace(gates=jnp.where(chosen.ids == expert, chosen.gates, 0.0)))
            error = used * jnp.mean((without - mixture(chosen)) ** 2, axis=-1)
            by_token = jnp.stack([error, jnp.linalg.norm(alone, axis=-1), used])
            return jnp.sum(by_token, axis=1, where=jnp.arange(64) < count) / count

        means.append(jax.vmap(of_expert, out_axes=1)(jnp.arange(7)))
        x = x + mixture(route(logits, 2))[None]
    return jnp.stack(means)


def test_never_routed_experts_leave_first_and_kept_ids_ascend(parent):
    config, params, traces = parent
    ranking = rank_experts(params, config, micro_batches(traces, tokens_per_batch=128, smallest=64))
    for method in METHODS:
        kept = ranking.keep(method, 1, 6)
        assert 6 not in kept and list(kept) == sorted(set(kept)) and len(kept) == 6
        assert set(ranking.keep(method, 0, 3)) < set(ranking.keep(method, 0, 5))


def test_scores_are_those_of_whole_passes_over_single_replacements(parent):
    config, params, traces = parent
    batches = micro_batches(traces, tokens_per_batch=128, smallest=64)
    replaced = {(0, "experts"): ((1, 2, 4), 5), (1, "window"): (tuple(range(7)), 6), (3, "both"): ((0, 5), 9)}
    alternatives = [[] for _ in range(4)]
    for (layer, _), (kept, window) in replaced.items():
        mask = np.isin(np.arange(7), kept)
        alternatives[layer].append(Alternative(mask, window))
    scores = replace_one_scores(params, config, alternatives, batches, per_call=2)
    for (layer, _), (kept, window) in replaced.items():
        blocks = list(whole(config).blocks)
        blocks[layer] = ChildBlock(kept, window)
        child = Child(config, tuple(blocks))
        kls = [direct_kl(params, config, child, trace) for trace in traces]
        (score,) = scores[layer]
        np.testing.assert_allclose(score.kl, np.mean(kls), rtol=2e-3)
        np.testing.assert_allclose(score.kl_se, np.std(kls, ddof=1) / 2, rtol=2e-3)
        assert score.traces == 4
        (again,) = score_children(params, config, [child], batches)
        np.testing.assert_allclose(again.kl, score.kl, rtol=1e-4)


def test_a_window_no_shorter_than_the_traces_scores_zero(parent):
    config, params, traces = parent
    short = [trace for trace in traces if len(trace.prompt) + len(trace.completion) <= 20]
    batches = micro_batches(short, tokens_per_batch=128, smallest=64)
    everything = np.ones(7, bool)
    scores = replace_one_scores(
        params, config, [[], [Alternative(everything, 20), Alternative(everything, 4)], [], []], batches
    )
    assert scores[1][0].kl < 1e-6 < scores[1][1].kl
    assert scores[1][0].agreement == 1.0


def direct_kl(params, config, child, trace):
    tokens, count = padded(trace)
    ours, parents = (viewed(params, config, tokens, one.view) for one in (child, Child(config, whole(config).blocks)))
    p, q = (np.asarray(jax.nn.log_softmax(x), np.float64)[0] for x in (parents, ours))
    kl = (np.exp(p) * (p - q)).sum(-1)
    return kl[len(trace.prompt) - 1 : count - 1].mean()


@partial(jax.jit, static_argnums=1)
def viewed(params, config, tokens, view):
    return forward(params, config, tokens, windows=list(view.windows), expert_masks=list(view.expert_masks))
