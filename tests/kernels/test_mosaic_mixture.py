"""The matmul with its activation fused, interpreted, against float64 and against the two separate steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.kernels.expert_mlp import grouped, mosaic_gpu
from puzzle_jax.kernels.grouped_matmul import BLOCK_IMPLEMENTATIONS, blocks_of
from puzzle_jax.kernels.mxfp4 import MXFP4, decode
from tests.kernels.marks import GPU

pytestmark = GPU

EXPERTS, ROWS, LIMIT = 4, 83, 1.5
SIZES = {"mixed": [20, 0, 33, 11], "all on one expert": [0, 0, 83, 0], "the last is empty": [1, 30, 52, 0]}


def matrix(form, hidden, inter):
    """A stack of matrices as the kernel takes it, and its values."""
    if form == "dense":
        dense = (jax.random.normal(jax.random.key(1), (EXPERTS, hidden, 2 * inter)) * 0.2).astype(jnp.bfloat16)
        return dense, dense
    source = np.random.default_rng(0)
    codes = source.integers(0, 256, (EXPERTS, 2 * inter, hidden // 2), np.uint8)
    scales = source.integers(118, 124, (EXPERTS, 2 * inter, hidden // 32)).astype(np.uint8)
    packed = MXFP4(jnp.asarray(codes), jnp.asarray(scales))
    return packed, decode(packed)


def by_hand(rows, weights, bias, sizes, limit: float | None = LIMIT):
    """Products and activation in float64, row by row."""
    rows, weights, bias = (np.asarray(each, np.float64) for each in (rows, weights, bias))
    found = []
    for row, expert in enumerate(np.repeat(np.arange(EXPERTS), sizes)):
        h = rows[row] @ weights[expert] + bias[expert]
        if limit is None:
            found.append(h[1::2] * h[0::2] / (1 + np.exp(-h[0::2])))
            continue
        gate, up = np.minimum(h[0::2], limit), np.clip(h[1::2], -limit, limit)
        found.append((up + 1) * gate / (1 + np.exp(-1.702 * gate)))
    return np.stack(found)


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize(
    "form,block,hidden,inter",
    [
        ("packed", 8, 64, 192),
        ("packed", 24, 192, 64),
        ("dense", 64, 128, 192),  # tiles of 192 columns, of 128, and of 64
        ("dense", 128, 64, 64),
        ("dense", 64, 192, 32),
    ],
)
def test_row_by_row(form, block, hidden, inter, case):
    sizes = SIZES[case]
    rows = jax.random.normal(jax.random.key(0), (ROWS, hidden)).astype(jnp.bfloat16).at[sum(sizes) :].set(jnp.nan)
    bias = jax.random.normal(jax.random.key(2), (EXPERTS, 2 * inter))
    given, numbers = matrix(form, hidden, inter)
    blocks = blocks_of(jnp.asarray(sizes), ROWS, block)
    padded = jnp.take(rows, blocks.source, axis=0, mode="fill", fill_value=0)
    arguments = padded, given, bias, blocks.expert, blocks.used
    out = mosaic_gpu.gate_up(*arguments, limit=LIMIT, interpret=True)
    if form == "packed":  # [even or odd, groups, rows, 16], as the second matmul takes them
        assert out.shape == (2, inter // 32, len(padded), 16)
        out = out.transpose(2, 1, 3, 0).reshape(len(padded), inter)
    assert out.shape == (len(padded), inter) and out.dtype == jnp.bfloat16
    found = np.asarray(out, np.float64)[np.asarray(blocks.slot)[: sum(sizes)]]
    expected = by_hand(rows[: sum(sizes)], numbers, bias, sizes)
    assert np.mean(np.abs(expected) > 0.5) > 0.1  # the activation does not vanish
    np.testing.assert_allclose(found, expected, atol=1e-2 * np.abs(expected).max())

    kernel = partial(BLOCK_IMPLEMENTATIONS["mosaic_gpu"], interpret=True)
    pair = grouped.activated_product(*arguments, limit=LIMIT, kernel=kernel)
    in_use = int(blocks.used) * block
    tolerance = 0 if form == "dense" else 1e-2 * np.abs(expected).max()  # packed products are not rounded between
    np.testing.assert_allclose(
        np.asarray(out[:in_use], np.float64), np.asarray(pair[:in_use], np.float64), atol=tolerance, rtol=2**-7
    )


@pytest.mark.parametrize("form,block,hidden,inter", [("packed", 8, 64, 192), ("dense", 64, 128, 192)])
def test_without_a_clamp(form, block, hidden, inter):
    sizes = SIZES["mixed"]
    rows = jax.random.normal(jax.random.key(0), (ROWS, hidden)).astype(jnp.bfloat16)
    given, numbers = matrix(form, hidden, inter)
    blocks, bias = blocks_of(jnp.asarray(sizes), ROWS, block), jnp.zeros((EXPERTS, 2 * inter))
    padded = jnp.take(rows, blocks.source, axis=0, mode="fill", fill_value=0)
    out = mosaic_gpu.gate_up(padded, given, bias, blocks.expert, blocks.used, limit=None, interpret=True)
    if form == "packed":
        out = out.transpose(2, 1, 3, 0).reshape(len(padded), inter)
    found = np.asarray(out, np.float64)[np.asarray(blocks.slot)[: sum(sizes)]]
    expected = by_hand(rows[: sum(sizes)], numbers, bias, sizes, limit=None)
    np.testing.assert_allclose(found, expected, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize(
    "form,rows,hidden,inter,reason",
    [
        ("dense", jnp.bfloat16, 100, 64, "100 inputs are no multiple of 64"),
        ("dense", jnp.bfloat16, 64, 40, "80 outputs are no multiple of 64"),
        ("packed", jnp.bfloat16, 64, 96, "96 outputs are no multiple of 64"),
        ("packed", jnp.bfloat16, 32, 64, "32 inputs are no multiple of 64"),
        ("packed", jnp.float32, 64, 64, "for bfloat16, but rows are float32"),
    ],
)
def test_what_no_tile_divides_is_refused(form, rows, hidden, inter, reason):
    given, _ = matrix(form, hidden, inter)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.gate_up(
            jnp.ones((128, hidden), rows),
            given,
            jnp.ones((EXPERTS, 2 * inter)),
            jnp.zeros(2, jnp.int32),
            jnp.asarray(1),
            limit=LIMIT,
            interpret=True,
        )
