"""Compiles the TPU kernels at the shapes of gpt-oss-120b; no TPU is needed.

    python benchmarks/tpu_aot.py [--tpu v5e v5p v6e]

Needs jax[tpu]. The compiler chooses the arguments' layouts. Prints the memory that a call allocates besides its
arguments (copies of weights would show up there) and the compiler's modelled time, which takes a kernel's operations
and bytes from the kernel's own cost estimate: a lower bound, not a prediction.
"""

from __future__ import annotations

import argparse

import aot_programs
import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from puzzle_jax.kernels.platform import lowering_for

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
BLOCKS = {64: 16, 4096: 128}
"""Rows per block by tokens of a call."""
SEQ = 16_384
"""Tokens of window attention; evaluating the mask of a longer context takes the host half a minute."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    options = parser.parse_args()
    print(f"jax {jax.__version__}")
    failed = 0
    for tpu in options.tpu:
        device = topologies.get_topology_desc(TOPOLOGIES[tpu], platform="tpu").devices[0]
        free = Format(Layout.AUTO, SingleDeviceSharding(device))
        of_120b = aot_programs.EXPERTS["120b"]
        for name, function, arguments in aot_programs.programs(
            "mosaic_tpu", "splash", of_120b, lambda tokens, form: BLOCKS[tokens], SEQ
        ):
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
            # Splash attention gives no cost estimate, so the modelled time would be meaningless.
            modelled = f"modelled {seconds * 1e3:7.3f} ms" if seconds > 0 else "not modelled"
            print(
                f"{tpu:<4} {name:<62} {temporary:8.0f} MB beside arguments, {modelled}",
                flush=True,
            )
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
