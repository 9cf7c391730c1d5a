"""Attention with positions sharded over a mesh equals attention on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.kernels.window_attention import window_attention
from puzzle_jax.kernels.window_attention.parallel import kv_copies
from puzzle_jax.model.sharding import make_mesh, make_training_mesh

SEQ, DIM = 40, 6
CASES = {
    # mesh, rows, heads, key-value heads, window, packed; the comments name what each device runs
    "full": ((1, 4, 2), 3, 16, 4, None, False),  # causal_blocks; two copies of each key-value head
    "packed": ((2, 2, 2), 2, 12, 3, 5, True),  # banded; four copies, as the model axis does not divide 3
    "windows as data": ((2, 4, 1), 2, 12, 6, (3, 2**30), False),  # square
    "rows that do not divide": ((2, 2, 1), 3, 6, 3, None, True),  # and a key-value head that two devices need
    "heads that do not divide": ((2, 2, 2), 2, 6, 3, 9, True),  # left to XLA
}


def given(case):
    mesh, rows, heads, kv_heads, window, packed = CASES[case]
    source = np.random.default_rng(0)
    shapes = ((rows, SEQ, heads, DIM), (rows, SEQ, kv_heads, DIM), (rows, SEQ, kv_heads, DIM), (heads,))
    arrays = tuple(jnp.asarray(source.standard_normal(shape), jnp.float32) for shape in shapes)
    options = {
        "window": jnp.asarray(window) if isinstance(window, tuple) else window,
        "segment_ids": jnp.asarray(np.sort(source.integers(0, 3, (rows, SEQ)))) if packed else None,
    }
    return arrays, options, make_training_mesh(*mesh)


def outputs_and_gradients(arrays, **options):
    def run(*arrays):
        out = window_attention(*arrays, **options)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2, 3), has_aux=True))(*arrays)
    return out, *gradients


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_one_device(case):
    arrays, options, mesh = given(case)
    expected = outputs_and_gradients(arrays, **options, implementation="reference")
    found = outputs_and_gradients(arrays, **options, mesh=mesh)
    for one, other in zip(found, expected, strict=True):
        assert float(jnp.abs(other).max()) > 1e-2
        np.testing.assert_allclose(one, other, atol=1e-5)


def exchanges(case, mesh):
    arrays, options, _ = given(case)
    lowered = jax.jit(lambda *arrays: window_attention(*arrays, **options, mesh=mesh)).lower(*arrays)
    return lowered.as_text().count('"stablehlo.all_to_all"')


def test_positions_are_traded_for_heads_where_both_divide():
    assert exchanges("packed", make_training_mesh(2, 2, 2)) == 4  # of q, k and v, and back
    assert exchanges("packed", make_training_mesh(1, 8, 1)) == 0  # 12 heads
    assert exchanges("full", make_training_mesh(1, 8, 1)) == 4
    assert exchanges("full", make_training_mesh(1, 3, 1)) == 0  # 40 positions


@pytest.mark.parametrize("mesh", [make_training_mesh(4, 1, 2), make_mesh(4, 2)])
def test_positions_that_are_whole_are_left_alone(mesh):
    arrays, options, _ = given("full")
    alone, on_mesh = (
        str(jax.make_jaxpr(lambda *arrays, mesh=mesh: window_attention(*arrays, **options, mesh=mesh))(*arrays))
        for mesh in (None, mesh)
    )
    assert on_mesh == alone


def test_every_query_head_finds_its_key_value_head():
    for kv_heads in range(1, 9):
        for heads in range(kv_heads, 33, kv_heads):
            for devices in (n for n in range(1, heads + 1) if heads % n == 0):
                copies = kv_copies(heads, kv_heads, devices)
                queries, keys = heads // devices, kv_heads * copies // devices
                assert queries % keys == 0 and keys * devices == kv_heads * copies
                for head in range(heads):
                    device, local = divmod(head, queries)
                    copy = device * keys + local // (queries // keys)
                    assert copy // copies == head // (heads // kv_heads)
    assert kv_copies(64, 8, 8) == 1 and kv_copies(64, 8, 16) == 2 and kv_copies(6, 3, 2) == 2


def test_what_no_implementation_takes_is_refused_on_a_mesh_too():
    arrays, _, mesh = given("full")
    with pytest.raises(ValueError, match="window is 0"):
        window_attention(*arrays, window=0, mesh=mesh)
    with pytest.raises(NotImplementedError, match="two blocks of 21 already span the sequence of 40"):
        window_attention(*arrays, window=21, mesh=mesh, implementation="banded")
