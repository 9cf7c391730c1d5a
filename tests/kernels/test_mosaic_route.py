"""The kernel of routing, interpreted, agrees with plain XLA: choices and gates, and the layout of pairs in blocks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.kernels.route import mosaic_gpu, mosaic_tpu, reference, route, tally
from tests.kernels.marks import GPU

KERNELS = {"gpu": partial(mosaic_gpu.routed, interpret=True), "tpu": partial(mosaic_tpu.routed, interpret=True)}
PLATFORMS = ["tpu", pytest.param("gpu", marks=GPU)]


def logits_of(tokens, experts):
    """Quarters, so that many are equal, and experts that are masked out."""
    found = jnp.round(jax.random.normal(jax.random.key(tokens), (tokens, experts)) * 4) / 4
    return jnp.where(jnp.arange(experts)[None] % 5 == jnp.arange(tokens)[:, None] % 7, -jnp.inf, found)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("tokens,experts,k", [(5, 7, 2), (70, 32, 4), (131, 150, 3)])
def test_choices_gates_and_their_gradients(platform, tokens, experts, k):
    kernel, logits = KERNELS[platform], logits_of(tokens, experts)
    ids, gates = tally.route(kernel, logits, k, None)
    right_ids, right_gates = reference.route(logits, k, None)
    np.testing.assert_array_equal(ids, right_ids)
    np.testing.assert_allclose(gates, right_gates, rtol=1e-5)

    replayed = right_ids[:, ::-1]
    found = tally.route(kernel, logits, k, replayed)
    np.testing.assert_array_equal(found[0], replayed)
    np.testing.assert_allclose(found[1], right_gates[:, ::-1], rtol=1e-5)

    weights = jnp.cos(jnp.arange(tokens * k).reshape(tokens, k))
    for given in (None, replayed):
        of_kernel, right = (
            jax.grad(lambda x, run=run, given=given: jnp.sum(run(x, k, given)[1] * weights))(logits)
            for run in (partial(tally.route, kernel), reference.route)
        )
        np.testing.assert_allclose(of_kernel, right, atol=1e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("tokens,experts,k,block", [(3, 9, 2, 4), (70, 32, 4, 8), (131, 150, 3, 16)])
def test_pairs_lie_as_a_stable_sort_lays_them(platform, tokens, experts, k, block):
    source = np.random.default_rng(tokens)
    # Uneven: some experts have none. Every ninth token is nobody's, as others' are on a mesh.
    ids = np.argsort(source.random((tokens, experts)) * np.arange(1, experts + 1), axis=1)[:, :k]
    ids[4::9] = experts
    found = tally.expert_order(KERNELS[platform], jnp.asarray(ids), experts, block)
    expected = reference.expert_order(jnp.asarray(ids), experts, block)
    for name in expected._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert int(found.used) * block >= tokens - len(ids[4::9])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_token_that_names_an_expert_twice_has_two_rows(platform):
    ids = jnp.asarray([[2, 2, 0], [1, 2, 1], [0, 0, 0]])
    found = tally.expert_order(KERNELS[platform], ids, 3, 4)
    expected = reference.expert_order(ids, 3, 4)
    np.testing.assert_array_equal(found.slot, expected.slot)
    np.testing.assert_array_equal(found.group_sizes, [4, 2, 3])


def test_what_a_kernel_cannot_do_is_refused():
    with pytest.raises(NotImplementedError, match="mosaic_tpu of route was asked for: for TPUs, but this is cpu"):
        route(jnp.zeros((3, 5)), 2, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="2 of 1025 experts are more than 128 of 1024"):
        KERNELS["tpu"](jnp.zeros((3, 1025)), None, 2, 1025, tally=False)
    with pytest.raises(
        ValueError, match="route has no implementation 'sort'; known: mosaic_gpu, mosaic_tpu, reference"
    ):
        route(jnp.zeros((3, 5)), 2, implementation="sort")


@GPU
def test_what_hopper_cannot_do_is_refused():
    for k, experts in ((9, 32), (2, 257)):
        with pytest.raises(NotImplementedError, match=f"{k} of {experts} experts are more than 8 of 256"):
            KERNELS["gpu"](jnp.zeros((3, experts)), None, k, experts, tally=False)


def test_no_tokens_have_no_choices():
    found = route(jnp.zeros((0, 5)), 2)
    assert found.ids.shape == found.gates.shape == (0, 2)
