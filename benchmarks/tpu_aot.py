"""Compiles the TPU kernels for TPUs that need not be there, at the shapes of gpt-oss-120b.

    python benchmarks/tpu_aot.py [--tpu v5e v5p v6e]

Needs jax[tpu], no TPU. Arguments get the layouts that the compiler likes best. Prints what a call allocates beside its
arguments (copies of weights would show there) and the compiler's modelled time, which takes a kernel's operations and
bytes from the estimate beside the kernel: a floor, no forecast.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from puzzle_jax.kernels.decode_attention import decode_attention
from puzzle_jax.kernels.grouped_matmul import block_matmul
from puzzle_jax.kernels.grouped_matmul.layout import num_blocks
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.kernels.platform import lowering_for
from puzzle_jax.kernels.window_attention import window_attention

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
EXPERTS, HIDDEN, INTER = 128, 2880, 2880
HEADS, KV_HEADS, DIM = 64, 8, 64
TOKENS = {64: 16, 4096: 128}
"""Of a call, at top 4, and rows per block."""

of = jax.ShapeDtypeStruct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    options = parser.parse_args()
    print(f"jax {jax.__version__}")
    failed = 0
    for tpu in options.tpu:
        device = topologies.get_topology_desc(TOPOLOGIES[tpu], platform="tpu").devices[0]
        free = Format(Layout.AUTO, SingleDeviceSharding(device))
        for name, function, arguments in programs():
            try:
                with lowering_for("tpu"):
                    program = jax.jit(function, in_shardings=free, out_shardings=free).lower(*arguments)
                compiled = program.compile()
            except jax.errors.JaxRuntimeError as error:
                failed += 1
                print(f"{tpu:<4} {name:<62} does not compile: {str(error).splitlines()[0]}")
                continue
            memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
            assert memory is not None and costs is not None
            temporary, seconds = memory.temp_size_in_bytes / 1e6, costs["optimal_seconds"]
            # Splash attention gives no estimates: what is left is no time.
            modelled = f"modelled {seconds * 1e3:7.3f} ms" if seconds > 0 else "not modelled"
            print(
                f"{tpu:<4} {name:<62} {temporary:8.0f} MB beside arguments, {modelled}",
                flush=True,
            )
    raise SystemExit(1 if failed else 0)


def programs() -> Iterator[tuple[str, Any, tuple[jax.ShapeDtypeStruct, ...]]]:
    """Name, function and arguments of every kernel at every shape."""
    yield from grouped_matmuls()
    yield from window_attentions()
    yield from decode_attentions()


def grouped_matmuls() -> Iterator[tuple[str, Any, tuple[jax.ShapeDtypeStruct, ...]]]:
    for tokens, block in TOKENS.items():
        count = num_blocks(4 * tokens, EXPERTS, block)
        for inputs, outputs in ((HIDDEN, 2 * INTER), (INTER, HIDDEN)):
            for form in ("dense", "transposed", "packed", "packed transposed"):

                def multiply(rows: Any, expert: Any, used: Any, *parts: Any, form: str = form) -> Any:
                    weights = MXFP4(*parts) if "packed" in form else parts[0]
                    options = {"transposed": "transposed" in form, "implementation": "mosaic_tpu"}
                    return block_matmul(rows, weights, expert, used, **options)

                if "packed" in form:
                    weights = tuple(of((EXPERTS, outputs, inputs // per), jnp.uint8) for per in (2, 32))
                else:
                    shape = (outputs, inputs) if form == "transposed" else (inputs, outputs)
                    weights = (of((EXPERTS, *shape), jnp.bfloat16),)
                columns = outputs if form == "packed transposed" else inputs
                rows, expert = of((count * block, columns), jnp.bfloat16), of((count,), jnp.int32)
                name = f"grouped_matmul, {form}, {tokens} tokens, {inputs} x {outputs}"
                yield name, multiply, (rows, expert, of((), jnp.int32), *weights)


def window_attentions() -> Iterator[tuple[str, Any, tuple[jax.ShapeDtypeStruct, ...]]]:
    """At 16,384 tokens: the mask of a longer context takes the host half a minute."""
    seq = 16_384
    arrays = (of((1, seq, HEADS, DIM), jnp.bfloat16), *[of((1, seq, KV_HEADS, DIM), jnp.bfloat16)] * 2)
    more = of((HEADS,), jnp.float32), of((1, seq), jnp.int32)
    for window in (128, None):

        def forward(q: Any, k: Any, v: Any, sinks: Any, segments: Any, window: int | None = window) -> Any:
            return window_attention(q, k, v, sinks, window=window, segment_ids=segments, implementation="splash")

        def loss(*given: Any, forward: Any = forward) -> Any:
            return jnp.sum(forward(*given).astype(jnp.float32))

        yield f"window_attention, {seq} tokens, window {window}", forward, (*arrays, *more)
        gradients = jax.grad(loss, (0, 1, 2, 3))
        yield f"window_attention with gradients, {seq} tokens, window {window}", gradients, (*arrays, *more)


def decode_attentions() -> Iterator[tuple[str, Any, tuple[jax.ShapeDtypeStruct, ...]]]:
    batch = 16
    for slots in (65_536, 128):
        for form, dtype in (("bf16", jnp.bfloat16), ("e4m3", jnp.uint8)):

            def attend(q: Any, k: Any, v: Any, sinks: Any, positions: Any, scale: Any, form: str = form) -> Any:
                scales = {"k_scale": scale, "v_scale": scale} if form == "e4m3" else {}
                given = q, k, v, sinks, positions
                return decode_attention(*given, window=None, **scales, implementation="mosaic_tpu")

            caches = (of((batch, KV_HEADS, DIM, slots), dtype), of((batch, KV_HEADS, slots, DIM), dtype))
            more = of((HEADS,), jnp.float32), of((batch,), jnp.int32), of((), jnp.float32)
            name = f"decode_attention, {batch} rows, {slots} slots, {form}"
            yield name, attend, (of((batch, HEADS, DIM), jnp.bfloat16), *caches, *more)


if __name__ == "__main__":
    main()
