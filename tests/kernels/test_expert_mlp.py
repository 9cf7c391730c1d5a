from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.kernels import mxfp4
from puzzle_jax.kernels.expert_mlp import (
    IMPLEMENTATIONS,
    Experts,
    capacity,
    expert_loop,
    expert_mlp,
    expert_outputs,
    grouped,
    swiglu,
)
from puzzle_jax.kernels.expert_mlp.reference import apply_swiglu
from puzzle_jax.kernels.grouped_matmul.layout import half_share
from puzzle_jax.kernels.mxfp4 import MXFP4, decode
from puzzle_jax.kernels.platform import lowering_for
from puzzle_jax.kernels.route import Routing
from puzzle_jax.kernels.self_check import without_kernels
from tests.kernels.marks import GPU, MIXTURES_ON_CPU
from tests.support import normal

EXPERTS, HIDDEN, INTER, LIMIT = 5, 32, 64, 1.5


def drawn(seed, hidden, inter, scales, dtype) -> Experts:
    """Experts with normal matrices of these standard deviations and biases of standard deviation 1."""
    shapes = (EXPERTS, hidden, 2 * inter), (EXPERTS, 2 * inter), (EXPERTS, inter, hidden), (EXPERTS, hidden)
    scales = scales[0], 1.0, scales[1], 1.0
    values = (scale * np.asarray(x) for x, scale in zip(normal(seed, *shapes), scales, strict=True))
    return Experts(*(jnp.asarray(x.astype(dtype)) for x in values))


@cache
def make_experts(dtype=jnp.float32) -> Experts:
    return drawn(0, HIDDEN, INTER, (0.5, 0.3), dtype)


def rows_of(count, hidden=HIDDEN, dtype=jnp.float32):
    return normal(1, (count, hidden), dtype=dtype)[0]


outputs = jax.jit(partial(expert_outputs, limit=LIMIT))
decoded = jax.jit(decode)


def by_hand(x, ids, gates, experts: Experts, limit: float | None = LIMIT) -> np.ndarray:
    """The mixture in float64, one token and one expert at a time."""
    x, gates = np.asarray(x, np.float64), np.asarray(gates, np.float64)
    gate_up, gate_up_bias, down, down_bias = (np.asarray(w, np.float64) for w in experts)
    out = np.zeros_like(x)
    for token in range(x.shape[0]):
        for expert, weight in zip(ids[token], gates[token], strict=True):
            h = x[token] @ gate_up[expert] + gate_up_bias[expert]
            if limit is None:
                y = h[1::2] * h[0::2] / (1 + np.exp(-h[0::2]))
            else:
                gate, up = np.minimum(h[0::2], limit), np.clip(h[1::2], -limit, limit)
                y = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            out[token] += weight * (y @ down[expert] + down_bias[expert])
    return out


def routing_of(ids) -> Routing:
    gates = np.exp(normal(9, np.shape(ids))[0])
    return Routing(jnp.asarray(ids), jnp.asarray(gates / gates.sum(axis=-1, keepdims=True)))


@pytest.fixture(autouse=True)
def loops_over_small_experts(monkeypatch):
    monkeypatch.setattr(expert_loop, "MIN_EXPERT_BYTES", 0)


CASES = {
    "mixed": np.asarray([[0, 3], [3, 1], [2, 0], [4, 2], [1, 0], [0, 1], [3, 4]]),
    "all on one expert": np.asarray([[2]] * 11),
    "empty experts": np.asarray([[1, 4]] * 9),
    "one token": np.asarray([[4, 0, 2]]),
    "more rows than a block": np.stack([np.arange(300) % EXPERTS, (np.arange(300) + 2) % EXPERTS], axis=1),
}


@pytest.mark.parametrize("implementation", MIXTURES_ON_CPU)
@pytest.mark.parametrize("case", CASES)
def test_mixture_by_hand(implementation, case):
    ids = CASES[case]
    if implementation == "capacity" and ids.size > capacity.MAX_MEAN_ROWS * EXPERTS:
        with pytest.raises(NotImplementedError, match=f"{ids.size} pairs are many for {EXPERTS} experts"):
            expert_mlp(
                jnp.ones((len(ids), HIDDEN)), routing_of(ids), make_experts(), limit=LIMIT, implementation="capacity"
            )
        return
    x, routing, experts = rows_of(len(ids)), routing_of(ids), make_experts()
    run = jax.jit(
        lambda x, routing, experts: expert_mlp(x, routing, experts, limit=LIMIT, implementation=implementation)
    )
    out = run(x, routing, experts)
    expected = by_hand(x, ids, routing.gates, experts)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("implementation", MIXTURES_ON_CPU)
def test_plain_swiglu_and_its_gradients(implementation):
    ids = CASES["mixed"]
    x, routing, experts = rows_of(len(ids)), routing_of(ids), make_experts()

    def run(x, gates, experts, implementation=implementation):
        out = expert_mlp(x, Routing(routing.ids, gates), experts, limit=None, implementation=implementation)
        return jnp.sum(jnp.sin(out)), out

    def gradients(run):
        return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(x, routing.gates, experts)

    (_, out), found = gradients(run)
    expected = by_hand(x, ids, routing.gates, experts, limit=None)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    _, expected = gradients(partial(run, implementation="reference"))
    for fast, slow in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(slow).max())))


def test_the_clamp_bites_in_these_cases():
    gate_up, bias, *_ = (np.asarray(leaf) for leaf in make_experts())
    h = np.asarray(rows_of(300)) @ gate_up[0] + bias[0]
    assert 0.2 < np.mean(np.abs(h) > LIMIT) < 0.9


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_the_reference(case):
    ids = CASES[case]
    x, routing = rows_of(len(ids)), routing_of(ids)

    def loss(implementation):
        def f(x, gates, experts):
            out = expert_mlp(x, Routing(routing.ids, gates), experts, limit=LIMIT, implementation=implementation)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(f, argnums=(0, 1, 2)))(x, routing.gates, make_experts())

    for fast, slow in zip(jax.tree.leaves(loss(None)), jax.tree.leaves(loss("reference")), strict=True):
        np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(slow).max())))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_activations_gradient_is_that_of_its_formula(dtype):
    h, d_out = normal(0, (5, 7, 2 * INTER), (5, 7, INTER))
    h, d_out = (jnp.asarray(np.asarray(x).astype(dtype)) for x in (2 * np.asarray(h), d_out))
    limit = LIMIT + 1e-3  # not representable in bfloat16: the slope is ambiguous exactly at the clamp's edge

    def both(function):
        def run(h, d_out):
            out, vjp = jax.vjp(lambda h: function(h, limit), h)
            return out, vjp(d_out)[0].astype(jnp.float32)

        return jax.jit(run)(h, d_out)

    (out, found), (expected, formula) = both(swiglu.apply_swiglu), both(apply_swiglu)
    np.testing.assert_array_equal(out, expected)
    assert 0.1 < np.mean(np.asarray(h[..., 0::2], np.float32) > LIMIT) < 0.5  # the clamp is reached
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(found, formula, rtol=tolerance, atol=tolerance)


def test_bfloat16_stays_near_float32():
    ids = CASES["mixed"]
    exact, rough = (
        outputs(rows_of(len(ids), dtype=dtype), jnp.asarray(ids), make_experts(dtype))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rough.dtype == jnp.bfloat16
    assert np.abs(np.asarray(rough, np.float32) - exact).max() < 0.04 * np.abs(exact).max()


@pytest.mark.parametrize("implementation", MIXTURES_ON_CPU)
def test_packed_experts_equal_their_decoded_values(implementation):
    rng = np.random.default_rng(3)

    def packed(outputs, inputs):
        blocks = rng.integers(0, 256, (EXPERTS, outputs, inputs // 2)).astype(np.uint8)
        scales = rng.integers(122, 126, (EXPERTS, outputs, inputs // 32)).astype(np.uint8)
        return MXFP4(jnp.asarray(blocks), jnp.asarray(scales))

    dense = make_experts()
    gate_up, down = packed(2 * INTER, HIDDEN), packed(HIDDEN, INTER)
    assert gate_up.shape == (EXPERTS, HIDDEN, 2 * INTER) and down.shape == (EXPERTS, INTER, HIDDEN)
    x, ids = rows_of(7), jnp.asarray(CASES["mixed"])
    run = jax.jit(lambda experts: expert_outputs(x, ids, experts, limit=LIMIT, implementation=implementation))
    expected = run(dense._replace(gate_up=decoded(gate_up), down=decoded(down)))
    out = run(dense._replace(gate_up=gate_up, down=down))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_an_unknown_implementation_is_refused_by_name():
    with pytest.raises(
        ValueError,
        match="'triton'; known: mosaic_gpu_fused, mosaic_gpu, mosaic_tpu, tokamax, expert_loop, capacity, ",
    ):
        expert_outputs(
            jnp.zeros((1, HIDDEN)), jnp.zeros((1, 1), int), make_experts(), limit=LIMIT, implementation="triton"
        )


def test_rounds_of_the_busiest_expert_and_no_more():
    assert [
        capacity.round_rows(*sizes) for sizes in ((16, 64, 32), (64, 128, 16), (1, 4, 32), (3, 6, 5), (9, 9, 1))
    ] == [
        8,
        16,
        4,
        4,
        12,
    ]


def test_blocks_are_about_half_an_experts_share():
    limits = expert_loop.MIN_BLOCK, expert_loop.MAX_BLOCK
    sizes = (64, 32), (256, 32), (2_048, 32), (9_000, 32), (3, 5)
    assert [half_share(*each, *limits) for each in sizes] == [4, 4, 32, 64, 4]


@pytest.mark.parametrize(
    ("dtype", "least_bytes", "reason"),
    [
        (jnp.bfloat16, 0, "for float32 on CPUs, but this is bfloat16 on cpu"),
        (jnp.float32, 24_577, "experts of 24576 b"),
    ],
)
def test_what_a_loop_is_not_for(monkeypatch, dtype, least_bytes, reason):
    monkeypatch.setattr(expert_loop, "MIN_EXPERT_BYTES", least_bytes)
    x, ids = jnp.ones((2, HIDDEN), dtype), jnp.asarray([[0], [3]])
    with pytest.raises(NotImplementedError, match=reason):
        expert_outputs(x, ids, make_experts(dtype), limit=LIMIT, implementation="expert_loop")
    assert jax.jit(lambda *given: expert_outputs(*given, limit=LIMIT))(x, ids, make_experts(dtype)).dtype == dtype


@pytest.mark.parametrize("implementation", ["capacity", "expert_loop"])
def test_a_token_gets_the_same_bits_whoever_else_is_there(implementation):
    experts = make_experts()
    x = rows_of(24)
    ids = np.stack([np.arange(24) % EXPERTS, (np.arange(24) + 1) % EXPERTS], axis=1)
    mine = jax.jit(lambda x, ids: expert_outputs(x, ids, experts, limit=LIMIT, implementation=implementation))
    alone = np.asarray(mine(x, ids))[5]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(24)
        others = np.random.default_rng(seed).integers(0, EXPERTS - 1, 24)
        crowded = np.stack([others, others + 1], axis=1)  # several rounds, since the same experts recur
        crowded[7], place = ids[5], order.copy()
        place[place == 5], place[7] = place[7], 5
        np.testing.assert_array_equal(np.asarray(mine(x[place], crowded))[7], alone)


@pytest.mark.parametrize(("tile_bytes", "tiles"), [(4 * HIDDEN * 48, 4), (4 * HIDDEN * 5, 32)])
def test_packed_products_are_made_tile_by_tile(monkeypatch, tile_bytes, tiles):
    """At most 48 (or 5) of 128 outputs fit at once, so tiles have 32 (or 4)."""
    monkeypatch.setattr(mxfp4, "TILE_BYTES", tile_bytes)
    source = np.random.default_rng(0)
    codes = source.integers(0, 256, (1, 128, HIDDEN // 2), np.uint8)
    weight = MXFP4(jnp.asarray(codes), jnp.asarray(source.integers(125, 130, (1, 128, HIDDEN // 32)).astype(np.uint8)))
    rows = rows_of(11)
    found = jax.jit(lambda *given: mxfp4.matmul(*given))(rows, weight)
    np.testing.assert_allclose(found, np.asarray(rows) @ np.asarray(decoded(weight))[0], rtol=1e-5, atol=1e-4)
    assert (
        f"tensor<{128 // tiles}x{HIDDEN // 2}xf32>"
        in jax.jit(lambda *given: mxfp4.matmul(*given)).lower(rows, weight).as_text()
    )


# With the kernels of grouped_matmul, interpreted ----------------------------------------------------------------------


ON_GPUS = [pytest.param(name, marks=GPU) for name in ("mosaic_gpu", "mosaic_gpu_fused")]


def wide_experts(dtype) -> Experts:
    """Experts whose sizes are multiples of the GPU kernels' tiles."""
    return drawn(4, 128, 192, (0.2, 0.2), dtype)


def kernel_of(name, poisoned=True):
    """The interpreted kernel; blocks without rows hold NaN, as they may on a device."""
    if name == "mosaic_gpu_fused":
        return lambda *given, limit=LIMIT: grouped.fused(interpret=True)(*given, limit=limit)
    run = grouped.by(name, interpret=True)

    def poison(rows, weights, expert, used, **options):
        out = run.keywords["kernel"](rows, weights, expert, used, **options)
        return jnp.where(grouped.in_use_rows(expert, used, len(rows)), out, jnp.nan) if poisoned else out

    return lambda *given, limit=LIMIT: run(*given, limit=limit, kernel=poison)


@pytest.mark.parametrize("name", ["looped", "mosaic_tpu", *ON_GPUS])
@pytest.mark.parametrize("case", ["mixed", "all on one expert", "one token"])
def test_kernels_agree_with_the_reference_forwards_and_backwards(name, case):
    dtype = jnp.bfloat16 if name.startswith("mosaic_gpu") else jnp.float32
    limit = (
        100.0 if dtype == jnp.bfloat16 else LIMIT
    )  # rounding moves values across the clamp's edge, where gradients jump
    ids, experts = jnp.asarray(CASES[case]), wide_experts(dtype)
    x, cotangent = rows_of(len(ids), 128, dtype), normal(2, (*ids.shape, 128))[0]

    def exact(x, experts):
        x, experts = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (x, experts))
        return IMPLEMENTATIONS["reference"](x, ids, experts, limit=limit)

    def both(function):
        def run(x, experts):
            out, vjp = jax.vjp(function, x, experts)
            return jax.tree.leaves((out, vjp(cotangent.astype(out.dtype))))

        return jax.jit(run)(x, experts)

    kernel = kernel_of(name)
    tolerance = 0.03 if dtype == jnp.bfloat16 else 2e-5
    for found, expected in zip(both(lambda x, w: kernel(x, ids, w, limit=limit)), both(exact), strict=True):
        expected = np.asarray(expected, np.float32)
        np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", ["mosaic_tpu", *ON_GPUS])
def test_kernels_take_packed_experts_as_they_are(name):
    source, dtype = np.random.default_rng(3), jnp.bfloat16

    def packed(outputs, inputs):
        codes = source.integers(0, 256, (EXPERTS, outputs, inputs // 2)).astype(np.uint8)
        return MXFP4(
            jnp.asarray(codes), jnp.asarray(source.integers(118, 124, (EXPERTS, outputs, inputs // 32)), jnp.uint8)
        )

    experts = wide_experts(dtype)._replace(gate_up=packed(384, 128), down=packed(128, 192))
    x, ids = rows_of(7, 128, dtype), jnp.asarray(CASES["mixed"])
    dense = experts._replace(gate_up=decoded(experts.gate_up), down=decoded(experts.down))
    reference = jax.jit(lambda x, experts: IMPLEMENTATIONS["reference"](x, ids, experts, limit=LIMIT))
    expected = reference(x.astype(jnp.float32), dense)
    found = jax.jit(kernel_of(name))(x, ids, experts)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.02 * np.abs(expected).max())


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": jnp.zeros((2, 31))}, r"x has shape \(2, 31\), but .* for ids of shape \(2, 1\) needs \(2, 32\)"),
        ({"down": jnp.zeros((EXPERTS, INTER, 7))}, r"experts.down has shape \(5, 64, 7\).* needs \(5, 64, 32\)"),
        ({"down_bias": jnp.zeros((4, HIDDEN))}, r"experts.down_bias has shape \(4, 32\).* needs \(5, 32\)"),
        ({"gate_up_bias": jnp.zeros((EXPERTS, 3))}, r"experts.gate_up_bias has shape \(5, 3\).* needs \(5, 128\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    x = change.pop("x", jnp.zeros((2, HIDDEN)))
    with pytest.raises(ValueError, match=message):
        expert_outputs(x, jnp.zeros((2, 1), int), make_experts()._replace(**change), limit=LIMIT)


def test_every_refusal_is_told():
    with pytest.raises(NotImplementedError, match="for TPUs, but this is cpu"):
        expert_outputs(
            jnp.zeros((1, HIDDEN)), jnp.zeros((1, 1), int), make_experts(), limit=LIMIT, implementation="mosaic_tpu"
        )


# On GPUs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [24, 700])
def test_what_gpus_are_given_agrees_with_the_reference(tokens):
    """`capacity` runs the forward pass of few tokens; the loop over blocks runs many tokens and all gradients."""
    ids = jnp.asarray(np.stack([np.arange(tokens) % 3, 3 + np.arange(tokens) % 2], axis=1))
    x, experts = rows_of(tokens), make_experts()

    def of(implementation):
        def loss(x, experts):
            return jnp.sum(jnp.sin(expert_outputs(x, ids, experts, limit=LIMIT, implementation=implementation)))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, experts)

    expected = of("reference")
    with lowering_for("gpu"), without_kernels():
        found = of(None)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        scale = np.abs(other).max()  # of each gradient as a whole: an empty expert has zeros
        np.testing.assert_allclose(one / scale, other / scale, atol=2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_memory_on_gpus_is_in_proportion_to_the_rows(packed):
    """The GPU program's temporaries, as XLA plans them for CPUs, hold neither experts' matrices gathered per block
    (200 MB here) nor rows times experts (1.6 GB)."""
    tokens, k, num_experts, hidden, inter = 2048, 4, 128, 256, 224

    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def matrix(inputs, outputs):
        if not packed:
            return (of(num_experts, inputs, outputs),)
        return tuple(of(num_experts, outputs, inputs // per, dtype=jnp.uint8) for per in (2, 32))

    def weights(parts):
        return MXFP4(*parts) if packed else parts[0]

    def gradient(x, ids, gate_up, gate_up_bias, down, down_bias):
        experts = Experts(weights(gate_up), gate_up_bias, weights(down), down_bias)
        return jax.grad(lambda x: jnp.sum(expert_outputs(x, ids, experts, limit=LIMIT)))(x)

    experts = matrix(hidden, 2 * inter), of(num_experts, 2 * inter), matrix(inter, hidden), of(num_experts, hidden)
    with lowering_for("gpu"), without_kernels():
        lowered = jax.jit(gradient).lower(of(tokens, hidden), of(tokens, k, dtype=jnp.int32), *experts)
    found = lowered.compile().memory_analysis()
    assert found is not None
    row = 4 * (2 * hidden + 3 * inter)  # input and output, both halves before the activation, and its output
    padded = tokens * k + num_experts * 31
    assert found.temp_size_in_bytes < 3 * padded * row < 200e6
