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

from puzzle_jax.kernels.grouped_matmul import block_matmul
from puzzle_jax.kernels.grouped_matmul.layout import num_blocks
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.kernels.platform import lowering_for

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
EXPERTS, HIDDEN, INTER = 128, 2880, 2880
TOKENS = {64: 16, 4096: 128}
"""Of a call, at top 4, and rows per block."""


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
            temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
            seconds = compiled.cost_analysis()["optimal_seconds"]
            print(
                f"{tpu:<4} {name:<62} {temporary:8.0f} MB beside arguments, modelled {seconds * 1e3:7.3f} ms",
                flush=True,
            )
    raise SystemExit(1 if failed else 0)


def programs() -> Iterator[tuple[str, Any, tuple[jax.ShapeDtypeStruct, ...]]]:
    """Name, function and arguments of every kernel at every shape."""
    of = jax.ShapeDtypeStruct
    for tokens, block in TOKENS.items():
        count = num_blocks(4 * tokens, EXPERTS, block)
        for inputs, outputs in ((HIDDEN, 2 * INTER), (INTER, HIDDEN)):
            for form in ("dense", "transposed", "packed"):

                def multiply(rows: Any, expert: Any, used: Any, *parts: Any, form: str = form) -> Any:
                    weights = MXFP4(*parts) if form == "packed" else parts[0]
                    options = {"transposed": form == "transposed", "implementation": "mosaic_tpu"}
                    return block_matmul(rows, weights, expert, used, **options)

                if form == "packed":
                    weights = tuple(of((EXPERTS, outputs, inputs // per), jnp.uint8) for per in (2, 32))
                else:
                    shape = (outputs, inputs) if form == "transposed" else (inputs, outputs)
                    weights = (of((EXPERTS, *shape), jnp.bfloat16),)
                rows, expert = of((count * block, inputs), jnp.bfloat16), of((count,), jnp.int32)
                name = f"grouped_matmul, {form}, {tokens} tokens, {inputs} x {outputs}"
                yield name, multiply, (rows, expert, of((), jnp.int32), *weights)


if __name__ == "__main__":
    main()
