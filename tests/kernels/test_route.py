import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_jax.kernels.route import expert_order, route, top_k_ids
from puzzle_jax.kernels.route.reference import FEW_PAIRS, stable_order


def test_top_k_takes_the_largest_first_and_the_lower_index_among_equals():
    logits = jnp.asarray([[1.0, 3.0, 3.0, 2.0, -1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(top_k_ids(logits, 3), [[1, 2, 3], [0, 1, 2]])
    np.testing.assert_array_equal(top_k_ids(logits, 5), jax.lax.top_k(logits, 5)[1])


def test_many_choices_agree_with_a_sort():
    logits = jax.random.normal(jax.random.key(0), (13, 29))
    np.testing.assert_array_equal(top_k_ids(logits, 11), jax.lax.top_k(logits, 11)[1])
    np.testing.assert_array_equal(top_k_ids(logits, 4), jax.lax.top_k(logits, 4)[1])


def test_gates_are_the_softmax_of_the_chosen_logits_alone():
    routing = route(jnp.asarray([[0.0, 2.0, 1.0, -3.0]]), 2)
    np.testing.assert_array_equal(routing.ids, [[1, 2]])
    expected = np.exp([2.0, 1.0]) / np.exp([2.0, 1.0]).sum()
    np.testing.assert_allclose(routing.gates, expected[None], rtol=1e-6)


def test_a_masked_expert_is_never_chosen_however_low_the_rest():
    logits = jnp.asarray([[9.0, -1e30, 8.0, -1e32]])
    routing = route(logits, 2, mask=jnp.asarray([[False, True, False, True]]))
    np.testing.assert_array_equal(routing.ids, [[1, 3]])
    np.testing.assert_allclose(routing.gates, [[1.0, 0.0]])


def test_replayed_ids_keep_their_order_and_use_their_own_logits():
    logits = jnp.asarray([[0.0, 2.0, 1.0]])
    routing = route(logits, 2, ids=jnp.asarray([[0, 2]]))
    np.testing.assert_array_equal(routing.ids, [[0, 2]])
    np.testing.assert_allclose(routing.gates, jax.nn.softmax(jnp.asarray([[0.0, 1.0]])), rtol=1e-6)


def test_gates_that_are_not_normalized_are_shares_of_all_experts_that_are_left():
    logits = np.asarray([[0.0, 2.0, 1.0, -3.0], [0.5, 0.1, -0.2, 0.4]], np.float32)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    routing = route(jnp.asarray(logits), 2, normalized=False)
    np.testing.assert_array_equal(routing.ids, [[1, 2], [0, 3]])
    np.testing.assert_allclose(routing.gates, [shares[0, [1, 2]], shares[1, [0, 3]]], rtol=1e-6)
    mask = jnp.asarray([[True, False, True, True]])
    left = shares[:, [0, 2, 3]] / shares[:, [0, 2, 3]].sum(axis=1, keepdims=True)
    routing = route(jnp.asarray(logits), 2, mask=mask, normalized=False)
    np.testing.assert_allclose(routing.gates, [left[0, [1, 0]], left[1, [0, 2]]], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: route(x, 2, normalized=False).gates[0, 0]))(jnp.asarray(logits[:1]))
    expected = -shares[0, 1] * shares[0] + shares[0, 1] * (np.arange(4) == 1)
    np.testing.assert_allclose(gradient[0], expected, atol=1e-6)


def test_gates_are_differentiable():
    gradient = jax.jit(jax.grad(lambda x: route(x, 2).gates[0, 0]))(jnp.asarray([[1.0, 2.0, 0.0]]))
    gate = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(gradient, [[-gate * (1 - gate), gate * (1 - gate), 0.0]], atol=1e-6)


@pytest.mark.parametrize("k", [0, 4])
def test_impossible_numbers_of_choices_are_refused(k):
    with pytest.raises(ValueError, match=f"cannot choose {k} of 3"):
        route(jnp.zeros((1, 3)), k)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 9]), st.integers(1, 3), st.sampled_from([3, 7]), st.sampled_from([1, 8]), st.integers(0, 99))
def test_every_pair_has_one_row_in_a_block_of_its_expert(tokens, k, experts, block, seed):
    rng = np.random.default_rng(seed)
    # A small pool of experts, so that some are empty and some crowded.
    pool = rng.choice(experts, size=max(k, experts // 2), replace=False)
    ids = np.stack([rng.choice(pool, size=k, replace=False) for _ in range(tokens)])
    order = jax.jit(lambda ids: expert_order(ids, experts, block))(jnp.asarray(ids))
    source, slot = np.asarray(order.source), np.asarray(order.slot)
    np.testing.assert_array_equal(source[slot], np.arange(tokens * k))
    assert (source < tokens * k).sum() == tokens * k
    np.testing.assert_array_equal(np.asarray(order.expert)[slot // block], ids.reshape(-1))
    np.testing.assert_array_equal(order.group_sizes, np.bincount(ids.reshape(-1), minlength=experts))


def test_an_order_is_stable_and_takes_keys_past_the_last_for_equal():
    keys = np.random.default_rng(0).integers(0, 9, 700)
    np.testing.assert_array_equal(stable_order(jnp.asarray(keys), 9), np.argsort(keys, kind="stable"))
    np.testing.assert_array_equal(stable_order(jnp.asarray(keys), 5), np.argsort(np.minimum(keys, 5), kind="stable"))
    # Key and index do not fit into one 32-bit integer.
    np.testing.assert_array_equal(stable_order(jnp.asarray(keys), 2**31 // 700), np.argsort(keys, kind="stable"))


def test_many_pairs_are_laid_out_as_few():
    ids = np.random.default_rng(0).integers(0, 5, (FEW_PAIRS // 2 + 7, 2))
    order = jax.jit(lambda ids: expert_order(ids, 5, 8))(jnp.asarray(ids))
    source, slot = np.asarray(order.source), np.asarray(order.slot)
    np.testing.assert_array_equal(source[slot], np.arange(ids.size))
    assert (source < ids.size).sum() == ids.size
    np.testing.assert_array_equal(np.asarray(order.expert)[slot // 8], ids.reshape(-1))
    of_expert = [slot[ids.reshape(-1) == expert] for expert in range(5)]
    assert all((np.diff(slots) > 0).all() for slots in of_expert)  # pairs keep their order
