"""Every kernel at gpt-oss's shapes, as `tpu_aot.py` and `gpu_aot.py` compile it: name, function, abstract arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.chunk_attention import chunk_attention
from puzzle_jax.kernels.decode_attention import decode_attention
from puzzle_jax.kernels.expert_mlp import mosaic_gpu
from puzzle_jax.kernels.grouped_matmul import block_matmul, grouped_matmul
from puzzle_jax.kernels.grouped_matmul.layout import num_blocks
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.kernels.route import expert_order, route
from puzzle_jax.kernels.window_attention import window_attention

HIDDEN, INTER, TOP_K = 2880, 2880, 4
HEADS, KV_HEADS, DIM = 64, 8, 64
EXPERTS = {"120b": 128, "20b": 32}
MOST_EXPERTS = 256
FORMS = ("dense", "transposed", "packed", "packed transposed")

of = jax.ShapeDtypeStruct


class Program(NamedTuple):
    """One call of a kernel: its name, the function, and its arguments without values."""

    name: str
    run: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]


def programs(
    kernels: str, attention: str, experts: int, blocks: Callable[[int, str], int], seq: int
) -> Iterator[Program]:
    """Yields all kernels but chunk attention and activated matmuls, which do not exist for TPUs.

    Args:
      kernels: implementation of grouped matmuls and decode attention.
      attention: implementation of window attention.
      blocks: maps the tokens of a call and the form of its weights to the rows of a block.
      seq: sequence length of window attention.
    """
    yield from grouped_matmuls(kernels, experts, blocks)
    yield from window_attentions(attention, seq)
    yield from decode_attentions(kernels)
    for count in (experts, MOST_EXPERTS):
        yield from routings(kernels, count)


def grouped_matmuls(implementation: str, experts: int, blocks: Callable[[int, str], int]) -> Iterator[Program]:
    """Both matrices of a layer, for a decode step of 64 tokens and a batch of 4,096."""
    for tokens in (64, 4096):
        for inputs, outputs in ((HIDDEN, 2 * INTER), (INTER, HIDDEN)):
            for form in FORMS:

                def multiply(rows: Any, expert: Any, used: Any, *parts: Any, form: str = form) -> Any:
                    weights = MXFP4(*parts) if "packed" in form else parts[0]
                    options: Mapping[str, Any] = {"transposed": "transposed" in form, "implementation": implementation}
                    return block_matmul(rows, weights, expert, used, **options)

                block = blocks(tokens, form)
                count = num_blocks(TOP_K * tokens, experts, block)
                if "packed" in form:
                    weights = tuple(of((experts, outputs, inputs // per), jnp.uint8) for per in (2, 32))
                else:
                    shape = (outputs, inputs) if form == "transposed" else (inputs, outputs)
                    weights = (of((experts, *shape), jnp.bfloat16),)
                columns = outputs if form == "packed transposed" else inputs
                rows, expert = of((count * block, columns), jnp.bfloat16), of((count,), jnp.int32)
                name = f"grouped_matmul, {form}, {tokens} tokens, {inputs} x {outputs}, blocks of {block}"
                yield Program(name, multiply, (rows, expert, of((), jnp.int32), *weights))


def activated_matmuls(experts: int, blocks: Callable[[int, str], int]) -> Iterator[Program]:
    """The first matrix of a layer fused with its activation, for Hopper GPUs."""
    for tokens in (64, 4096):
        for form in ("dense", "packed"):

            def multiply(rows: Any, bias: Any, expert: Any, used: Any, *parts: Any, form: str = form) -> Any:
                weights = MXFP4(*parts) if form == "packed" else parts[0]
                return mosaic_gpu.gate_up(rows, weights, bias, expert, used, limit=7.0)

            block = blocks(tokens, form)
            count = num_blocks(TOP_K * tokens, experts, block)
            if form == "packed":
                weights = tuple(of((experts, 2 * INTER, HIDDEN // per), jnp.uint8) for per in (2, 32))
            else:
                weights = (of((experts, HIDDEN, 2 * INTER), jnp.bfloat16),)
            rows, bias = of((count * block, HIDDEN), jnp.bfloat16), of((experts, 2 * INTER), jnp.bfloat16)
            name = f"activated_matmul, {form}, {tokens} tokens, {HIDDEN} x 2 x {INTER}, blocks of {block}"
            yield Program(name, multiply, (rows, bias, of((count,), jnp.int32), of((), jnp.int32), *weights))


def window_attentions(
    implementation: str,
    seq: int,
    windows: tuple[int | None, ...] = (128, None),
    gradients: bool = True,
    segments: bool = True,
) -> Iterator[Program]:
    """Attention within each of `windows`, also with gradients if `gradients`; on packed sequences if `segments`."""
    arrays = (of((1, seq, HEADS, DIM), jnp.bfloat16), *[of((1, seq, KV_HEADS, DIM), jnp.bfloat16)] * 2)
    more = of((HEADS,), jnp.float32), of((1, seq), jnp.int32)
    for window in windows:

        def forward(q: Any, k: Any, v: Any, sinks: Any, ids: Any, window: int | None = window) -> Any:
            own = ids if segments else None
            return window_attention(q, k, v, sinks, window=window, segment_ids=own, implementation=implementation)

        def loss(*given: Any, forward: Any = forward) -> Any:
            return jnp.sum(forward(*given).astype(jnp.float32))

        yield Program(f"window_attention, {seq} tokens, window {window}", forward, (*arrays, *more))
        if not gradients:
            continue
        name = f"window_attention with gradients, {seq} tokens, window {window}"
        yield Program(name, jax.grad(loss, (0, 1, 2, 3)), (*arrays, *more))


def of_libraries(seq: int) -> Iterator[Program]:
    """The calls behind `implementation="tokamax"` and `"dew_flash_attn"`."""
    count, sizes = EXPERTS["120b"], of((EXPERTS["120b"],), jnp.int32)

    def multiply(rows: Any, weights: Any, sizes: Any) -> Any:
        return grouped_matmul(rows, weights, sizes, implementation="tokamax")

    def total(*given: Any) -> Any:
        return jnp.sum(multiply(*given).astype(jnp.float32))

    arguments = of((TOP_K * 4096, INTER), jnp.bfloat16), of((count, INTER, HIDDEN), jnp.bfloat16), sizes
    name = f"tokamax, grouped_matmul, dense, 4096 tokens, {INTER} x {HIDDEN}"
    yield Program(name, multiply, arguments)
    yield Program(f"{name}, gradient of the rows", jax.grad(total), arguments)
    with suppress(ImportError):
        import dew_flash_attn  # pyright: ignore[reportMissingImports]

        dew_flash_attn._hopper = lambda: True  # it would look for a GPU
    for program in window_attentions("dew_flash_attn", seq, segments=False):
        yield program._replace(name=f"dew_flash_attn, {program.name}")


def wide_window_attentions(seq: int) -> Iterator[Program]:
    """Window attention with 128 queries per program; its gradients are those of the other kernel."""
    for program in window_attentions("mosaic_gpu_wide", seq, (2048, None), gradients=False):
        yield program._replace(name=f"wide {program.name}")


def decode_attentions(implementation: str, batch: int = 16) -> Iterator[Program]:
    """Decode attention over a long cache, a ring, and a cache that no tile size divides, in bfloat16 and e4m3."""
    for slots in (65_536, 128, 4_000):
        for form, dtype in (("bf16", jnp.bfloat16), ("e4m3", jnp.uint8)):

            def attend(q: Any, k: Any, v: Any, sinks: Any, positions: Any, scale: Any, form: str = form) -> Any:
                scales = {"k_scale": scale, "v_scale": scale} if form == "e4m3" else {}
                given = q, k, v, sinks, positions
                return decode_attention(*given, window=None, **scales, implementation=implementation)

            caches = (of((batch, KV_HEADS, DIM, slots), dtype), of((batch, KV_HEADS, slots, DIM), dtype))
            more = of((HEADS,), jnp.float32), of((batch,), jnp.int32), of((), jnp.float32)
            name = f"decode_attention, {batch} rows, {slots} slots, {form}"
            yield Program(name, attend, (of((batch, HEADS, DIM), jnp.bfloat16), *caches, *more))


def chunk_attentions(implementation: str) -> Iterator[Program]:
    """A prompt chunk against a long cache and a ring, and a few tokens of each of several rows against a long cache and
    a ring that no tile size divides; in bfloat16 and e4m3."""
    for batch, chunk, slots, window in (
        (1, 512, 65_536, None),
        (1, 512, 128, 128),
        (16, 8, 65_536, None),
        (16, 8, 96, 96),
    ):
        for form, dtype in (("bf16", jnp.bfloat16), ("e4m3", jnp.uint8)):

            def attend(*given: Any, form: str = form, window: int | None = window) -> Any:
                *arrays, scale = given
                scales = {"k_scale": scale, "v_scale": scale} if form == "e4m3" else {}
                return chunk_attention(*arrays, window=window, **scales, implementation=implementation)

            held = tuple(
                of((batch, KV_HEADS, *shape), dtype)
                for count in (chunk, slots)
                for shape in ((DIM, count), (count, DIM))
            )
            more = of((HEADS,), jnp.float32), of((batch,), jnp.int32), of((), jnp.float32)
            name = f"chunk_attention, {batch} rows of {chunk} tokens, {slots} slots, {form}"
            yield Program(name, attend, (of((batch, chunk, HEADS, DIM), jnp.bfloat16), *held, *more))


def routings(implementation: str, experts: int) -> Iterator[Program]:
    """The choice of experts and the layout of token-expert pairs, as separate programs."""
    for tokens in (64, 32_768):

        def choose(logits: Any) -> Any:
            return route(logits, TOP_K, implementation=implementation)

        def lay_out(ids: Any) -> Any:
            return expert_order(ids, experts, 64, implementation=implementation)

        yield Program(f"route, {tokens} tokens, {experts} experts", choose, (of((tokens, experts), jnp.float32),))
        name = f"expert_order, {tokens} tokens, {experts} experts"
        yield Program(name, lay_out, (of((tokens, TOP_K), jnp.int32),))
