"""The routing kernel, interpreted, agrees with plain XLA on choices, gates and the layout of pairs in blocks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.kernels.route import mosaic_gpu, mosaic_tpu, reference, route, tally
from tests.kernels.marks import GPU
from tests.support import normal

KERNELS = {"gpu": partial(mosaic_gpu.routed, interpret=True), "tpu": partial(mosaic_tpu.routed, interpret=True)}
PLATFORMS = ["tpu", pytest.param("gpu", marks=GPU)]


def logits_of(tokens, experts):
    """Logits rounded to quarters, so that many tie, with some experts masked out."""
    found = np.round(np.asarray(normal(tokens, (tokens, experts))[0]) * 4) / 4
    return np.where(np.arange(experts)[None] % 5 == np.arange(tokens)[:, None] % 7, -np.inf, found).astype(np.float32)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("tokens,experts,k", [(5, 7, 2), (70, 32, 4), (131, 150, 3)])
def test_choices_gates_and_their_gradients(platform, tokens, experts, k):
    kernel, logits = KERNELS[platform], logits_of(tokens, experts)
    replayed = np.argsort(-logits, axis=1, kind="stable")[:, :k][:, ::-1].astype(np.int32)
    weights = np.cos(np.arange(tokens * k).reshape(tokens, k))

    def both(run):
        """Ids, gates and gradients, with the router's own choices and with replayed ones."""

        def ids_gates_and_gradient(logits, given):
            def weighed(logits):
                ids, gates = run(logits, k, given)
                return jnp.sum(gates * weights), (ids, gates)

            (_, found), gradient = jax.value_and_grad(weighed, has_aux=True)(logits)
            return *found, gradient

        program = jax.jit(lambda *given: [ids_gates_and_gradient(given[0], each) for each in (None, given[1])])
        return program(jnp.asarray(logits), jnp.asarray(replayed))

    of_kernel, right = both(partial(tally.route, kernel)), both(reference.route)
    (ids, gates, _), (right_ids, right_gates, _) = of_kernel[0], right[0]
    np.testing.assert_array_equal(ids, right_ids)
    np.testing.assert_array_equal(ids, replayed[:, ::-1])
    np.testing.assert_allclose(gates, right_gates, rtol=1e-5)
    ids, gates, _ = of_kernel[1]
    np.testing.assert_array_equal(ids, replayed)
    np.testing.assert_allclose(gates, np.asarray(right_gates)[:, ::-1], rtol=1e-5)
    for (*_, found), (*_, expected) in zip(of_kernel, right, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def orders(kernel, ids, experts, block):
    """Layouts by the kernel and by the reference."""
    runs = partial(tally.expert_order, kernel), reference.expert_order
    return jax.jit(lambda ids: [run(ids, experts, block) for run in runs])(jnp.asarray(ids))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("tokens,experts,k,block", [(3, 9, 2, 4), (70, 32, 4, 8), (131, 150, 3, 16)])
def test_pairs_lie_as_a_stable_sort_lays_them(platform, tokens, experts, k, block):
    source = np.random.default_rng(tokens)
    # Uneven: some experts have no rows. Every ninth token has no expert here, as on a mesh.
    ids = np.argsort(source.random((tokens, experts)) * np.arange(1, experts + 1), axis=1)[:, :k]
    ids[4::9] = experts
    found, expected = orders(KERNELS[platform], ids, experts, block)
    for name in expected._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert int(found.used) * block >= tokens - len(ids[4::9])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_token_that_names_an_expert_twice_has_two_rows(platform):
    ids = [[2, 2, 0], [1, 2, 1], [0, 0, 0]]
    found, expected = orders(KERNELS[platform], ids, 3, 4)
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
