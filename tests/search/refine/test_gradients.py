"""Values of missing experts against brute force, and descents on made-up values."""

from dataclasses import replace
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.costs.compute import compute_costs
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.errors import ConfigError
from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.network import attention_block, embed, forward, head_logits, moe_block
from puzzle_jax.model.rope import rope_table
from puzzle_jax.search.recipe import GradientSettings
from puzzle_jax.search.refine import descent as descent_module
from puzzle_jax.search.refine.accept import Difference, refine
from puzzle_jax.search.refine.descent import Descent
from puzzle_jax.search.refine.gradients import addition_effects
from puzzle_jax.search.score.measurements import Score
from puzzle_jax.search.score.replace_one import Alternative, ReplaceOne
from puzzle_jax.search.score.whole_children import Measurements
from puzzle_jax.search.solve.problem import Candidate, Problem
from puzzle_jax.search.space import ExpertChoice, Space
from tests.search.solve.test_constraints import Provider
from tests.support import present, random_params, small_config

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


# Descents -------------------------------------------------------------------------------------------------------------

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


def unasked(*_):
    raise AssertionError("nothing was to be asked")


def descent(measure=unasked, validate=unasked, **settings):
    traces = traces_of(*[(9, 3)] * 11)
    return Descent(
        SPACE,
        problem,
        lambda _: ReplaceOne({}, CONFIG),
        traces,
        measure,
        validate,
        GradientSettings(**settings),
        seed=3,
    )


def test_the_projection_keeps_windows_and_limits_and_the_largest_values():
    values = np.random.default_rng(4).standard_normal((LAYERS, EXPERTS))
    found = descent().project(start(), values)
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
    drawn = list(islice(descent(noise=0.6).noisy(start(), np.random.default_rng(5)), 6))
    signs = np.where(descent().masks(start()), 1.0, -1.0)
    for one, other in zip(drawn[::2], drawn[1::2], strict=True):
        np.testing.assert_allclose(one + other, 2 * signs)
        assert np.std(one - signs) == pytest.approx(0.6 * np.pi / 3**0.5, rel=0.5)
    assert not np.allclose(drawn[0], drawn[2])


def made_up(goal):
    """Measurements in which a child's KL is the share of its experts that are not among the goal's."""

    def kl(candidates, tokens):
        kls = [float(np.mean([len({*k} - {*g}) for k, g in zip(c.kept, goal, strict=True)])) for c in candidates]
        return Measurements(
            [Score(value, 0.1, 1.0, 1.0, tokens, {}) for value in kls],
            np.tile(np.array(kls)[:, None], tokens),
            np.ones(tokens, int),
        )

    return kl


@pytest.mark.parametrize("gain,taken", [(-0.5, True), (-0.1, False)])
def test_a_descent_finds_the_valued_experts_and_is_accepted_by_confirmation_alone(monkeypatch, gain, taken):
    goal = ((0, 2, 3, 4, 6), (0, 1, 2, 4, 6), (4, 5, 6), (2, 3, 4))
    worth = np.stack([np.isin(np.arange(EXPERTS), kept) for kept in goal]) * 2.0 - 1.0

    def effects(run, batch, masks):
        assert masks.sum(axis=2).min() >= 3 and masks.shape[1:] == worth.shape
        return np.zeros(len(masks)), np.where(masks, 0.0, -worth)

    monkeypatch.setattr(descent_module, "addition_effects", effects)
    kl, names = made_up(goal), []

    def measure(candidates, traces, name):
        names.append(name)
        assert len(traces) == 5
        return kl(candidates, 5)

    found = descent(measure, lambda candidates: kl(candidates, 4), steps=3, traces=6, compared=5)
    child, tried = refine(
        start(), 0, unasked, 0, unasked, lambda new, old: (Difference(-0.9, 0.1), Difference(gain, 0.1)), found
    )
    assert [step.step for step in tried] == ["gradients 1"] and tried[0].accepted is taken
    assert len(set(names)) == len(names)  # every sample of traces has its own name
    proposal = present(tried[0].candidate)
    assert proposal.meets_target and sum(len({*k} - {*g}) for k, g in zip(proposal.kept, goal, strict=True)) == 0
    assert child == (replace(proposal, score=0.5 + gain) if taken else start())
    # From the best child, no step finds a better one.
    assert found(proposal) is None


@pytest.mark.parametrize(
    ("field", "value"), [("steps", -1), ("traces", 1), ("compared", 0), ("noise", 0.0), ("noise", 1e9), ("decay", 1.5)]
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"refine\.gradients\.{field} is {value}"):
        GradientSettings(**{field: value})
