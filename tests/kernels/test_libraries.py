"""Libraries behind `implementation=`: their results where they run on a CPU, their refusals where they do not."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.environment import LIBRARIES
from puzzle_jax.kernels import expert_mlp, grouped_matmul, window_attention
from puzzle_jax.kernels.dispatch import recording
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.kernels.platform import lowering_for

EXPERTS, ROWS, INPUTS, OUTPUTS = 4, 53, 64, 96
SIZES = {"mixed": [20, 0, 22, 11], "rows that are nobody's": [9, 17, 0, 12], "nothing": [0, 0, 0, 0]}


@pytest.mark.parametrize("form", ["dense", "transposed", "packed"])
@pytest.mark.parametrize("case", SIZES)
def test_tokamax_agrees_with_the_reference_forwards_and_backwards(form, case):
    pytest.importorskip("tokamax")
    sizes, source = jnp.asarray(SIZES[case]), np.random.default_rng(0)
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (EXPERTS, OUTPUTS, INPUTS) if form == "transposed" else (EXPERTS, INPUTS, OUTPUTS)
    weights = jax.random.normal(keys[0], shape)
    if form == "packed":
        codes = source.integers(0, 256, (EXPERTS, OUTPUTS, INPUTS // 2), np.uint8)
        scales = source.integers(118, 124, (EXPERTS, OUTPUTS, INPUTS // 32)).astype(np.uint8)
        weights = MXFP4(jnp.asarray(codes), jnp.asarray(scales))
    rows, cotangent = (jax.random.normal(key, (ROWS, n)) for key, n in zip(keys[1:], (INPUTS, OUTPUTS), strict=True))

    def both(name):
        def run(rows, weights):
            return grouped_matmul.grouped_matmul(
                rows, weights, sizes, transposed=form == "transposed", implementation=name
            )

        out, vjp = jax.vjp(run, rows, weights)
        d_rows, d_weights = vjp(cotangent)
        return out, d_rows, *([] if form == "packed" else [d_weights])

    for found, expected in zip(both("tokamax"), both("reference"), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * (np.abs(expected).max() + 1e-30))


def test_numbers_of_nobodys_rows_do_not_get_out_of_tokamax():
    pytest.importorskip("tokamax")
    sizes = SIZES["rows that are nobody's"]
    rows = jnp.ones((ROWS, INPUTS)).at[sum(sizes) :].set(jnp.nan)
    weights = jnp.ones((EXPERTS, INPUTS, OUTPUTS))

    def total(rows, weights):
        run = grouped_matmul.grouped_matmul
        return jnp.sum(run(rows, weights, jnp.asarray(sizes), implementation="tokamax"))

    found, gradients = jax.value_and_grad(total, (0, 1))(rows, weights)
    assert float(found) == sum(sizes) * INPUTS * OUTPUTS
    assert all(bool(jnp.isfinite(each).all()) for each in gradients)
    assert not gradients[0][sum(sizes) :].any()


def test_mixtures_by_tokamax():
    pytest.importorskip("tokamax")
    keys = jax.random.split(jax.random.key(1), 5)
    shapes = (EXPERTS, INPUTS, 2 * OUTPUTS), (EXPERTS, 2 * OUTPUTS), (EXPERTS, OUTPUTS, INPUTS), (EXPERTS, INPUTS)
    layer = expert_mlp.Experts(*(jax.random.normal(key, shape) * 0.2 for key, shape in zip(keys, shapes, strict=False)))
    x, ids = (
        jax.random.normal(keys[4], (7, INPUTS)),
        jnp.asarray([[0, 2], [3, 0], [2, 3], [0, 3], [3, 2], [2, 0], [0, 2]]),
    )

    def of(name):
        def total(x, layer):
            return jnp.sum(jnp.sin(expert_mlp.expert_outputs(x, ids, layer, limit=1.5, implementation=name)))

        return jax.tree.leaves(jax.value_and_grad(total, (0, 1))(x, layer))

    for found, expected in zip(of("tokamax"), of("reference"), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * max(1.0, float(jnp.abs(expected).max())))


def small_matmul(name):
    rows, weights = jnp.ones((5, INPUTS)), jnp.ones((2, INPUTS, OUTPUTS))
    return grouped_matmul.grouped_matmul(rows, weights, jnp.asarray([2, 3]), implementation=name)


def small_attention(name, dtype=jnp.bfloat16, **options):
    q, k = jnp.ones((1, 8, 4, 16), dtype), jnp.ones((1, 8, 2, 16), dtype)
    options = {"window": 3, **options}
    return window_attention.window_attention(q, k, k, jnp.zeros(4), implementation=name, **options)


@pytest.mark.parametrize(
    "name,run,extra", [("tokamax", small_matmul, "tokamax"), ("dew_flash_attn", small_attention, "flash-cuda13")]
)
def test_a_library_that_is_missing_is_one_sentence(monkeypatch, name, run, extra):
    monkeypatch.setitem(sys.modules, name, None)
    said = f"{name} is not installed; it comes with the extra '{extra}'"
    with lowering_for("gpu"), pytest.raises(NotImplementedError, match=said):
        run(name)


@pytest.mark.parametrize(
    "options,reason",
    [
        ({"segment_ids": jnp.zeros((1, 8), jnp.int32)}, "one window for all rows, and no segments"),
        ({"window": jnp.asarray([2])}, "one window for all rows, and no segments"),
        ({"dtype": jnp.float32}, "for bfloat16 or float16, but q, k and v are float32, float32 and float32"),
    ],
)
def test_what_the_attention_library_does_not_take(options, reason):
    with pytest.raises(NotImplementedError, match="for GPUs, but this is cpu"):
        small_attention("dew_flash_attn")
    with lowering_for("gpu"), pytest.raises(NotImplementedError, match=reason):
        small_attention("dew_flash_attn", **options)


def test_libraries_serve_by_name_only(monkeypatch):
    monkeypatch.delenv("PUZZLE_KERNELS", raising=False)
    for run in (small_matmul, small_attention):
        with recording() as choices:
            run(None)
        assert choices[-1].chosen not in LIBRARIES
        assert "it serves by name only" in choices[-1].refusals.values()
    monkeypatch.setenv("PUZZLE_KERNELS", "tokamax")
    monkeypatch.setitem(grouped_matmul.IMPLEMENTATIONS, "tokamax", grouped_matmul.IMPLEMENTATIONS["reference"])
    with recording() as choices:
        small_matmul(None)
    assert choices[-1].chosen == "tokamax"
