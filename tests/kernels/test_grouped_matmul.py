"""Grouped matmuls against a loop over rows: values, gradients, layouts and refusals; kernels are interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.kernels.grouped_matmul import (
    BLOCK_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    block_matmul,
    blocks_of,
    grouped_matmul,
)
from puzzle_jax.kernels.grouped_matmul.layout import num_blocks
from puzzle_jax.kernels.mxfp4 import CODE_VALUES, MXFP4, code_values, decode
from tests.kernels.marks import GPU
from tests.support import normal

EXPERTS, ROWS, INPUTS, OUTPUTS = 5, 71, 192, 320
SIZES = {
    "mixed": [20, 0, 7, 33, 11],
    "all on one expert": [0, 0, 71, 0, 0],
    "the last is empty": [1, 30, 2, 38, 0],
    "rows that are nobody's": [9, 0, 17, 1, 12],
    "nothing": [0, 0, 0, 0, 0],
}
FORMS = ["dense", "transposed", "packed", "packed transposed"]
KERNELS = ["looped", "mosaic_tpu", pytest.param("mosaic_gpu", marks=GPU)]


def dense_weights(dtype=jnp.float32):
    return normal(1, (EXPERTS, INPUTS, OUTPUTS), dtype=dtype)[0]


def packed_weights() -> MXFP4:
    source = np.random.default_rng(0)
    blocks = source.integers(0, 256, (EXPERTS, OUTPUTS, INPUTS // 2))
    scales = source.integers(118, 130, (EXPERTS, OUTPUTS, INPUTS // 32))
    return MXFP4(jnp.asarray(blocks, jnp.uint8), jnp.asarray(scales, jnp.uint8))


def rows_of(dtype=jnp.float32, columns=INPUTS, used=ROWS):
    """Rows that are NaN from `used` on."""
    rows = np.array(normal(0, (ROWS, columns), dtype=dtype)[0])
    rows[used:] = np.nan
    return jnp.asarray(rows)


def by_hand(rows, weights, sizes) -> np.ndarray:
    """The product in float64, row by row; zeros past the last group."""
    rows, weights = np.asarray(rows, np.float64), np.asarray(weights, np.float64)
    out = np.zeros((len(rows), weights.shape[2]))
    expert = np.repeat(np.arange(len(sizes)), sizes)
    for row, own in enumerate(expert):
        out[row] = rows[row] @ weights[own]
    return out


# Jitted: one program compiles faster than the operations one by one, and serves all cases of one shape.
decoded = jax.jit(decode)
by_implementation = jax.jit(grouped_matmul, static_argnames="implementation")


@partial(jax.jit, static_argnames=("kernel", "block", "transposed"))
def interpreted(kernel, rows, weights, sizes, block, transposed=False):
    """`grouped_matmul` by an interpreted kernel; what the kernel leaves unwritten is NaN and must not leak."""
    blocks = blocks_of(sizes, len(rows), block)
    padded = jnp.take(rows, blocks.source, axis=0, mode="fill", fill_value=0)
    run = BLOCK_IMPLEMENTATIONS[kernel]
    out = run(padded, weights, blocks.expert, blocks.used, interpret=True, transposed=transposed)
    out = jnp.where((jnp.arange(len(out)) < blocks.used * block)[:, None], out, jnp.nan)
    return jnp.take(out, blocks.slot, axis=0, mode="fill", fill_value=0)


def near(found, expected, dtype):
    scale = np.abs(expected).max() + 1e-30
    tolerance = 2e-6 if dtype == jnp.float32 else 8e-3
    np.testing.assert_allclose(np.asarray(found, np.float64) / scale, expected / scale, atol=tolerance)


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("packed", [False, True])
def test_row_by_row(implementation, case, packed):
    weights = packed_weights() if packed else dense_weights()
    sizes = SIZES[case]
    rows = rows_of(used=sum(sizes)) if implementation == "blocked" else rows_of()
    found = by_implementation(rows, weights, jnp.asarray(sizes), implementation=implementation)
    near(found, by_hand(rows, decoded(weights) if packed else weights, sizes), jnp.float32)


@pytest.mark.parametrize(
    "kernel,form,case",
    [
        *(("mosaic_tpu", form, case) for form in FORMS for case in SIZES),
        *(("looped", form, case) for form in FORMS for case in ("rows that are nobody's", "nothing")),
        *(
            pytest.param("mosaic_gpu", form, case, marks=GPU)
            for form in FORMS
            for case in ("rows that are nobody's", "all on one expert")
        ),
    ],
)
def test_interpreted_kernels_row_by_row(kernel, form, case):
    dtype, transposed = jnp.bfloat16 if kernel == "mosaic_gpu" else jnp.float32, "transposed" in form
    packed = packed_weights()
    weights = np.asarray(decoded(packed) if "packed" in form else dense_weights(dtype))
    columns = OUTPUTS if form == "packed transposed" else INPUTS
    rows, sizes = rows_of(dtype, columns, used=sum(SIZES[case])), jnp.asarray(SIZES[case])
    expected = by_hand(rows, weights.swapaxes(1, 2) if form == "packed transposed" else weights, SIZES[case])
    given = packed if "packed" in form else jnp.asarray(weights.swapaxes(1, 2) if transposed else weights)
    block = 64 if kernel == "mosaic_gpu" and form != "packed" else 16
    found = interpreted(kernel, rows, given, sizes, block, transposed=transposed)
    near(found, expected, dtype)


@pytest.mark.parametrize("inputs,outputs,block", [(96, 160, 16), (384, 1100, 8), (1536, 128, 24)])
def test_tiles_that_do_not_divide_on_tpus(inputs, outputs, block):
    """All inputs in one tile, a last tile of outputs that overhangs, several tiles of inputs; bfloat16 and packed."""
    rows, back, weights = normal(2, (13, inputs), (13, outputs), (3, inputs, outputs), dtype=jnp.bfloat16)
    source, sizes = np.random.default_rng(3), [6, 0, 7]
    packed = MXFP4(
        jnp.asarray(source.integers(0, 256, (3, outputs, inputs // 2)), jnp.uint8),
        jnp.asarray(source.integers(118, 130, (3, outputs, inputs // 32)), jnp.uint8),
    )
    dense = np.asarray(decoded(packed))
    run = partial(interpreted, "mosaic_tpu", sizes=jnp.asarray(sizes), block=block)
    near(run(rows, weights), by_hand(rows, weights, sizes), jnp.bfloat16)
    near(run(rows, packed), by_hand(rows, dense, sizes), jnp.bfloat16)
    near(run(back, packed, transposed=True), by_hand(back, dense.swapaxes(1, 2), sizes), jnp.bfloat16)


@pytest.mark.parametrize("block", [64, 16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_those_of_the_reference(kernel, block):
    """On GPUs, blocks of 16 rows are for packed weights only, and XLA computes their gradient."""
    dtype = jnp.bfloat16 if kernel == "mosaic_gpu" else jnp.float32
    sizes, cotangent = jnp.asarray(SIZES["rows that are nobody's"]), normal(5, (ROWS, OUTPUTS))[0]

    def loss(rows, weights, run):
        return jnp.sum(run(rows, weights).astype(jnp.float32) * cotangent)

    def reference(rows, weights):
        return grouped_matmul(rows, weights, sizes, implementation="reference")

    both = (packed_weights(),) if (kernel, block) == ("mosaic_gpu", 16) else (dense_weights(dtype), packed_weights())
    for weights in both:
        argnums = 0 if isinstance(weights, MXFP4) else (0, 1)
        found, expected = (
            jax.tree.leaves(jax.jit(partial(jax.grad(loss, argnums), run=run))(rows_of(dtype), weights))
            for run in (lambda r, w: interpreted(kernel, r, w, sizes, block), reference)
        )
        for one, other in zip(found, expected, strict=True):
            near(one, np.asarray(other, np.float64), dtype)


def test_layout_of_blocks():
    blocks = blocks_of(jnp.asarray([5, 0, 3, 4]), 14, 4)
    assert len(blocks.expert) == num_blocks(14, 4, 4) == 6
    assert blocks.expert.tolist() == [0, 0, 2, 3, 3, 3] and int(blocks.used) == 4
    assert blocks.slot.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 12, 13, 14, 15, 24, 24]
    assert blocks.source[:8].tolist() == [0, 1, 2, 3, 4, 14, 14, 14] and blocks.source[12:16].tolist() == [8, 9, 10, 11]
    assert set(blocks.source[16:].tolist()) == {14}


def test_codes_by_arithmetic_are_those_of_the_table():
    found = np.asarray(code_values(jnp.arange(16)))
    np.testing.assert_array_equal(found, CODE_VALUES)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(CODE_VALUES))


def test_what_does_not_fit_is_refused_before_anything_runs():
    rows, weights = rows_of(), dense_weights()
    with pytest.raises(ValueError, match=r"rows have shape \(71, 192\), but weights of shape \(5, 320, 192\) take 320"):
        grouped_matmul(rows, weights.swapaxes(1, 2), jnp.asarray(SIZES["mixed"]))
    with pytest.raises(
        ValueError, match=r"group_sizes has shape \(4,\), but weights of shape \(5, 192, 320\) need \(5,\)"
    ):
        grouped_matmul(rows, weights, jnp.asarray([1, 2, 3, 4]))
    with pytest.raises(ValueError, match="group_sizes are 0 at least and 72 in sum, but rows are 71"):
        grouped_matmul(rows, weights, jnp.asarray([72, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="group_sizes are -1 at least"):
        grouped_matmul(rows, weights, jnp.asarray([-1, 2, 0, 0, 0]))
    with pytest.raises(ValueError, match="71 rows are no whole blocks: expert names 5"):
        block_matmul(rows, weights, jnp.zeros(5, jnp.int32), jnp.asarray(5))
    for pinned in ("mosaic_gpu", "mosaic_tpu", "ragged_dot", "looped"):
        with pytest.raises(NotImplementedError, match=r"cpu|CPU|needs JAX"):
            grouped_matmul(rows, weights, jnp.asarray(SIZES["mixed"]), implementation=pinned)
    of_xla = ["ragged_dot", "looped", "blocked", "reference"]  # after kernels and those that serve by name only
    assert list(IMPLEMENTATIONS)[3:] == of_xla
