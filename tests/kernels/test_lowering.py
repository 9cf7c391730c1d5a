"""Kernels for GPUs and TPUs lower for their platforms at the shapes of gpt-oss-120b, with no such device present."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from puzzle_jax.kernels.chunk_attention import chunk_attention
from puzzle_jax.kernels.decode_attention import decode_attention
from puzzle_jax.kernels.dispatch import recording
from puzzle_jax.kernels.expert_mlp import Experts, expert_outputs, mosaic_gpu
from puzzle_jax.kernels.grouped_matmul import block_matmul
from puzzle_jax.kernels.grouped_matmul.layout import num_blocks
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.kernels.platform import lowering_for, target_platform
from puzzle_jax.kernels.route import expert_order, route
from puzzle_jax.kernels.window_attention import window_attention
from tests.kernels.marks import GPU

PLATFORMS = ["tpu", pytest.param("gpu", marks=GPU)]
EXPERTS, HIDDEN, INTER = 128, 2880, 2880


def of(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(platform, function, *arguments) -> str:
    """Text of the lowered program; raises where a kernel does not lower."""
    with lowering_for(platform):
        calls = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")]
        name = "cuda" if platform == "gpu" else platform
        return export.export(jax.jit(function), platforms=[name], disabled_checks=calls)(*arguments).mlir_module()


def has_kernel(program: str, platform: str) -> bool:
    return ("mosaic_gpu" if platform == "gpu" else "tpu_custom_call") in program


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("form", ["dense", "transposed", "packed", "packed transposed"])
@pytest.mark.parametrize("pairs,block", [(64 * 4, 64), (4096 * 4, 128)])
@pytest.mark.parametrize("inputs,outputs", [(HIDDEN, 2 * INTER), (INTER, HIDDEN)])
def test_grouped_matmul(platform, form, pairs, block, inputs, outputs):
    blocks = num_blocks(pairs, EXPERTS, block)
    if "packed" in form:
        weights = tuple(of((EXPERTS, outputs, inputs // per), jnp.uint8) for per in (2, 32))
    else:
        shape = (outputs, inputs) if form == "transposed" else (inputs, outputs)
        weights = (of((EXPERTS, *shape), jnp.bfloat16),)

    def multiply(rows, expert, used, *parts):
        weights = MXFP4(*parts) if "packed" in form else parts[0]
        options = {"transposed": "transposed" in form, "implementation": f"mosaic_{platform}"}
        return block_matmul(rows, weights, expert, used, **options)

    columns = outputs if form == "packed transposed" else inputs
    rows, expert = of((blocks * block, columns), jnp.bfloat16), of((blocks,), jnp.int32)
    assert has_kernel(lowered(platform, multiply, rows, expert, of((), jnp.int32), *weights), platform)


@GPU
@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("pairs,block", [(64 * 4, 64), (4096 * 4, 128)])
def test_activated_matmul(form, pairs, block):
    blocks = num_blocks(pairs, EXPERTS, block)
    if form == "packed":
        weights = tuple(of((EXPERTS, 2 * INTER, HIDDEN // per), jnp.uint8) for per in (2, 32))
    else:
        weights = (of((EXPERTS, HIDDEN, 2 * INTER), jnp.bfloat16),)

    def multiply(rows, bias, expert, used, *parts):
        weights = MXFP4(*parts) if form == "packed" else parts[0]
        return mosaic_gpu.gate_up(rows, weights, bias, expert, used, limit=7.0)

    rows, bias = of((blocks * block, HIDDEN), jnp.bfloat16), of((EXPERTS, 2 * INTER), jnp.bfloat16)
    program = lowered("gpu", multiply, rows, bias, of((blocks,), jnp.int32), of((), jnp.int32), *weights)
    assert has_kernel(program, "gpu") and f"tensor<{blocks * block}x{2 * INTER}xbf16>" not in program


@GPU
@pytest.mark.parametrize("differentiated", [False, True])
def test_mixtures_are_activated_in_the_kernel_unless_they_are_differentiated(differentiated):
    """The pre-activation, twice as wide as the intermediate, is materialised only where a gradient needs it."""
    tokens, k, experts, hidden, inter = 96, 2, 6, 128, 192

    def outputs(x, ids, *parts):
        gate_up, down = MXFP4(*parts[:2]), MXFP4(*parts[2:4])
        with recording() as choices:
            out = expert_outputs(x, ids, Experts(gate_up, parts[4], down, parts[5]), limit=7.0)
        assert choices[-1].chosen == "mosaic_gpu_fused"
        return jnp.sum(out.astype(jnp.float32)) if differentiated else out

    sizes = (2 * inter, hidden), (hidden, inter)
    packed = [of((experts, outputs, inputs // per), jnp.uint8) for outputs, inputs in sizes for per in (2, 32)]
    biases = [of((experts, outputs), jnp.bfloat16) for outputs, _ in sizes]
    arguments = of((tokens, hidden), jnp.bfloat16), of((tokens, k), jnp.int32), *packed, *biases
    program = lowered("gpu", jax.grad(outputs) if differentiated else outputs, *arguments)
    assert (f"x{2 * inter}xbf16>" in program.replace(f"tensor<{experts}x{2 * inter}xbf16>", "")) == differentiated


def test_platforms():
    assert target_platform() == "cpu"
    with lowering_for("tpu"):
        assert target_platform() == "tpu"
    assert target_platform() == "cpu"
    with pytest.raises(ValueError, match="platform is 'npu', but must be one of cpu, gpu, tpu"), lowering_for("npu"):
        pass


def caching(operation, batch, chunk, slots, window, dtype, platform="gpu"):
    """A function that attends to a cache, and its arguments."""
    run = {"decode": decode_attention, "chunk": chunk_attention}[operation]

    def attend(*given):
        *given, scale = given
        scales = {"k_scale": scale, "v_scale": scale} if dtype == jnp.uint8 else {}
        return run(*given, window=window, **scales, implementation=f"mosaic_{platform}")

    heads, kv_heads, dim = 64, 8, 64
    counts, tokens = ((slots,), ()) if operation == "decode" else ((chunk, slots), (chunk,))
    held = [of((batch, kv_heads, *shape), dtype) for count in counts for shape in ((dim, count), (count, dim))]
    per_row = of((heads,), jnp.float32), of((batch,), jnp.int32), of((), jnp.float32)
    return attend, of((batch, *tokens, heads, dim), jnp.bfloat16), *held, *per_row


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("slots,window", [(131_072, None), (128, 128)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
def test_decode_attention(platform, slots, window, dtype):
    assert has_kernel(lowered(platform, *caching("decode", 7, 1, slots, window, dtype, platform)), platform)


@GPU
@pytest.mark.parametrize("operation", ["chunk", "decode"])
@pytest.mark.parametrize("slots", [80, 1000])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
def test_caches_of_slots_that_no_tile_divides(operation, slots, dtype):
    program = lowered("gpu", *caching(operation, 5, 3, slots, slots, dtype))
    assert has_kernel(program, "gpu")


@GPU
@pytest.mark.parametrize("batch,chunk,slots,window", [(1, 512, 131_072, None), (3, 8, 128, 128)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
def test_chunk_attention(batch, chunk, slots, window, dtype):
    assert has_kernel(lowered("gpu", *caching("chunk", batch, chunk, slots, window, dtype)), "gpu")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("tokens,experts", [(64, 32), (32_768, 128), (4_096, 256)])
def test_routing(platform, tokens, experts):
    name = f"mosaic_{platform}"

    def routed(logits, mask):
        ids, gates = route(logits, 4, mask=mask, implementation=name)
        return expert_order(ids, experts, 8, implementation=name), gates

    mask = of((1, experts), jnp.bool_)
    assert (
        lowered(platform, routed, of((tokens, experts), jnp.float32), mask).count(
            "mosaic_gpu" if platform == "gpu" else "tpu_custom_call"
        )
        >= 2
    )


@GPU
@pytest.mark.parametrize("window", [None, 2048])
def test_window_attention_of_128_queries_to_a_program(window):
    def attend(q, k, v, sinks, segments):
        options = {"window": window, "segment_ids": segments, "implementation": "mosaic_gpu_wide"}
        return window_attention(q, k, v, sinks, **options)

    seq, heads, kv_heads, dim = 65_536, 64, 8, 64
    arrays = of((1, seq, heads, dim), jnp.bfloat16), *[of((1, seq, kv_heads, dim), jnp.bfloat16)] * 2
    assert has_kernel(lowered("gpu", attend, *arrays, of((heads,), jnp.float32), of((1, seq), jnp.int32)), "gpu")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("window", [None, 128])
def test_window_attention_and_its_gradients(platform, window):
    def loss(q, k, v, sinks, segments):
        name = "mosaic_gpu" if platform == "gpu" else "splash"
        options = {"window": window, "segment_ids": segments, "implementation": name}
        return jnp.sum(window_attention(q, k, v, sinks, **options).astype(jnp.float32))

    # Splash attention examines its mask block by block before it lowers, which takes half a minute at 65,536.
    seq, heads, kv_heads, dim = 65_536 if platform == "gpu" else 4_096, 64, 8, 64
    arrays = of((1, seq, heads, dim), jnp.bfloat16), *[of((1, seq, kv_heads, dim), jnp.bfloat16)] * 2
    more = of((heads,), jnp.float32), of((1, seq), jnp.int32)
    program = lowered(platform, jax.grad(loss, (0, 1, 2, 3)), *arrays, *more)
    # The forward pass and two backward ones: for queries, and for keys and values.
    assert program.count("mosaic_gpu" if platform == "gpu" else "tpu_custom_call") >= 3
