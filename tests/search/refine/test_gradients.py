"""Values of missing experts against brute force, and values around a child from made-up effects."""

from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.costs.compute import compute_costs
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.network import attention_block, embed, forward, head_logits, moe_block
from puzzle_jax.model.rope import rope_table
from puzzle_jax.search.refine import expert_values as module
from puzzle_jax.search.refine.expert_values import NOISE, ExpertValues
from puzzle_jax.search.refine.gradients import addition_effects
from puzzle_jax.search.score.replace_one import Alternative, ReplaceOne
from puzzle_jax.search.solve.problem import Candidate, Problem
from puzzle_jax.search.space import ExpertChoice, Space
from tests.search.solve.test_constraints import Provider
from tests.support import random_params, small_config

CONFIG = small_config()
WINDOWS = (5, 8, 5, None)
LAYERS, EXPERTS = 4, 7


def traces_of(*sizes):
    random = np.random.default_rng(0)
    return [
        Trace(
            "t",
            "low",
            n,
            {},
            tuple(random.integers(0, 97, p).tolist()),
            tuple(random.integers(0, 97, c).tolist()),
            1.0,
            False,
        )
        for n, (p, c) in enumerate(sizes)
    ]


# Values of missing experts --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valued():
    params, (batch,) = random_params(CONFIG), micro_batches(traces_of((9, 7), (14, 3)), tokens_per_batch=128)
    masks = np.random.default_rng(1).random((len(batch.ids), LAYERS, EXPERTS)) < 0.5
    masks[:, :, :2] = True
    run = ReplaceOne(params, CONFIG, [Alternative(np.ones(EXPERTS, bool), window) for window in WINDOWS])
    return params, batch, masks, run, addition_effects(run, batch, masks, tried=EXPERTS)


@jax.jit
def child_kl(share, params, batch, masks, row, layer, expert):
    """Summed KL of one row's child, with `share` of the change of a layer's output by one more expert."""
    tokens = batch.tokens[row][None]
    parent = jax.nn.log_softmax(forward(params, CONFIG, tokens))
    x, table = embed(params, tokens), rope_table(CONFIG.rope, CONFIG.head_dim, jnp.arange(tokens.shape[1])[None])
    for index, of_layer in enumerate(params["layers"]):
        x, _ = attention_block(of_layer["attention"], CONFIG, x, table, window=WINDOWS[index])
        own = masks[row, index]
        new, _ = moe_block(of_layer["moe"], CONFIG, x, expert_mask=own)
        other, _ = moe_block(of_layer["moe"], CONFIG, x, expert_mask=own.at[expert].set(True))
        x = new + jnp.where(index == layer, share, 0.0) * jax.lax.stop_gradient(other - new)
    child = jax.nn.log_softmax(head_logits(params, CONFIG, x))
    return jnp.sum(jnp.sum(jnp.exp(parent) * (parent - child), axis=-1) * (batch.loss_weight[row] > 0))


def test_values_are_slopes_towards_the_child_with_one_more_expert(valued):
    params, batch, masks, _, (kl, effects) = valued
    given = params, batch._replace(ids=None), jnp.asarray(masks)
    slope = jax.jit(jax.value_and_grad(child_kl))
    for row, layer in ((0, 3), (1, 0), (0, 1)):
        for expert in range(EXPERTS):
            value, expected = slope(0.0, *given, row, layer, expert)
            np.testing.assert_allclose(kl[row], value, rtol=1e-4)
            np.testing.assert_allclose(effects[row, layer, expert], expected, rtol=2e-3, atol=2e-4)
        assert np.count_nonzero(effects[row, layer]) > 0
    assert np.all(effects[masks] == 0)


def test_finite_differences_agree(valued):
    params, batch, masks, _, (_, effects) = valued
    expert = int(np.flatnonzero(~masks[0, 2])[0])
    given = params, batch._replace(ids=None), jnp.asarray(masks), 0, 2, expert
    low, high = (float(child_kl(share, *given)) for share in (-0.02, 0.02))
    assert effects[0, 2, expert] == pytest.approx((high - low) / 0.04, rel=0.03, abs=2e-3)


def test_only_the_likeliest_experts_are_tried(valued):
    _, batch, masks, run, (_, every) = valued
    _, one = addition_effects(run, batch, masks, tried=1)
    assert np.any(one) and not np.allclose(one, every)
    assert not np.any(addition_effects(run, batch, np.ones_like(masks), tried=EXPERTS)[1])


# Values around a child -----------------------------------------------------------------------------------------------

COUNTS = (7, 5, 3)
SPACE = Space(
    CONFIG,
    (tuple(ExpertChoice(count, tuple(range(count)), "reap") for count in COUNTS),) * LAYERS,
    ((5,), (None, 8), (5,), (None, 8)),
)
TARGET = Target(max_expert_bytes_ratio=0.7, max_kv_bytes_ratio=0.9)
COSTS = compute_costs(SPACE.offer, [Scenario("chat", input_tokens=12, output_tokens=6, batch=3)], "bf16", Provider())


def problem(space, scores):
    return Problem(space, scores, COSTS, TARGET)


def start():
    blocks = tuple(BlockConfig(count, window) for count, window in zip((7, 5, 3, 3), WINDOWS, strict=True))
    choices = tuple(ExpertChoice(b.num_experts, tuple(range(b.num_experts)), "reap") for b in blocks)
    return Candidate("child", blocks, choices, 0.5, {}, {"chat": 3}, (), "optimal", 0.0)


TRACES = traces_of(*[(9, 3)] * 5, (11, 8))
VALUES = ExpertValues(SPACE, problem, lambda _: ReplaceOne({}, CONFIG), TRACES, seed=3)


def test_the_projection_keeps_windows_and_limits_and_the_largest_values():
    values = np.random.default_rng(4).standard_normal((LAYERS, EXPERTS))
    found = VALUES.project(start(), values)
    assert found.meets_target and [block.window for block in found.blocks] == list(WINDOWS) and found.score == 0.5
    for layer, kept in enumerate(found.kept):
        assert kept == tuple(sorted(np.argsort(-values[layer])[: len(kept)].tolist()))
    # No other numbers of experts that the target allows have a larger sum of values.
    best = np.sort(values, axis=1)[:, ::-1].cumsum(axis=1)
    own = sum(best[layer, len(kept) - 1] for layer, kept in enumerate(found.kept))
    for counts in np.stack(np.meshgrid(*[COUNTS] * LAYERS), axis=-1).reshape(-1, LAYERS):
        blocks = tuple(BlockConfig(int(n), window) for n, window in zip(counts, WINDOWS, strict=True))
        if COSTS.expert_bytes(blocks) <= 0.7 * COSTS.expert_bytes(CONFIG.blocks):
            assert sum(best[layer, n - 1] for layer, n in enumerate(counts)) <= own + 1e-3


def test_noise_comes_in_antithetic_pairs():
    mask = VALUES.mask(start())
    drawn = list(islice(VALUES.noisy(mask, np.random.default_rng(5)), 6))
    signs = np.where(mask, 1.0, -1.0)
    for one, other in zip(drawn[::2], drawn[1::2], strict=True):
        np.testing.assert_allclose(one + other, 2 * signs)
        assert np.std(one - signs) == pytest.approx(NOISE * np.pi / 3**0.5, rel=0.5)
    assert not np.allclose(drawn[0], drawn[2])


def test_values_are_means_per_token_over_the_children_that_lack_an_expert(monkeypatch):
    worth, drawn = np.random.default_rng(6).standard_normal((LAYERS, EXPERTS)), []

    def effects(run, batch, masks):
        """Every token's KL falls by an expert's worth, twice as fast in traces of 8 tokens."""
        tokens = np.array([len(TRACES[n].completion) if n >= 0 else 0 for n in order(batch)])
        drawn.extend(masks[batch.ids >= 0])
        per_token = np.where(tokens == 8, 2.0, 1.0) * tokens
        return np.zeros(len(masks)), np.where(masks, 0.0, -worth * per_token[:, None, None])

    def order(batch):
        shuffled = np.random.default_rng(3).permutation(len(TRACES))
        return [shuffled[n] if n >= 0 else -1 for n in batch.ids]

    monkeypatch.setattr(module, "addition_effects", effects)
    found = VALUES(start())
    lacking = ~np.array(drawn)
    assert len(drawn) == len(TRACES) and (~lacking).sum(axis=2).min() >= 3
    (long,) = [n for n, number in enumerate(np.random.default_rng(3).permutation(6)) if number == 5]
    tokens = np.where(np.arange(6) == long, 8, 3)[:, None, None] * lacking
    factor = np.where(np.arange(6) == long, 2.0, 1.0)[:, None, None]
    expected = worth * (tokens * factor).sum(axis=0) / np.maximum(tokens.sum(axis=0), 1)
    np.testing.assert_allclose(found, expected)
    assert np.any(lacking.any(axis=0) & VALUES.mask(start()))  # experts that the child has are missing now and then
    np.testing.assert_array_equal(VALUES(start()), found)  # the same draws whenever it is asked
