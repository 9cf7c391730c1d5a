"""Compiles the programs for NVIDIA GPUs with XLA's compiler; no GPU and no driver is needed.

    python benchmarks/gpu_aot.py [--only kernels libraries controls experts plans] [--gpu h100 h200 b200] [--json PATH]

kernels    every Mosaic GPU kernel at the shapes of gpt-oss-20b and -120b, down to machine code: registers, spills,
           shared memory, tensor-core instructions, and how many programs a multiprocessor holds; all within `LIMITS`
libraries  other projects' kernels (`kernels.libraries`), if they are installed: whether they compile
controls   what must fail: more shared memory than a GPU has, registers that spill, a mixture expanded over all experts
experts    120B's mixture of experts without a kernel, forward and backward: temporaries in proportion to the rows
plans      every program of puzzle_jax at the width of 20B and 120B: load, generation, rank, lens, score, calibration,
           distillation and reinforcement learning on one device and on eight, with few layers, since programs unroll
           them; and the whole recipe for 120B on its host, each stage within `MOST_GB`

Needs the extra `gpu-compiler` and a JAX version that has the kernels (`kernels.mosaic.FIRST_JAX`). Exits with 1 if a
limit is exceeded, a program does not compile, or a control does not fail.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from machine_code import DUMP, machine_code

os.environ.update(JAX_PLATFORMS="cpu", MOSAIC_GPU_DUMP_TO=str(DUMP), MOSAIC_GPU_DUMP_PTXAS="1")
os.environ.update(MOSAIC_GPU_DUMP_SASS="1", JAX_ENABLE_COMPILATION_CACHE="false", PUZZLE_KERNELS="auto")

import aot_programs
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from puzzle_jax.kernels.expert_mlp import Experts, expert_outputs
from puzzle_jax.kernels.grouped_matmul import BLOCK_ROWS
from puzzle_jax.kernels.mosaic import launched, plgpu
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.plan.abstract import read_model, virtual_devices
from puzzle_jax.plan.compilers import GPUS, GpuCompiler, gpu_targets
from puzzle_jax.plan.distill import PlannedDistillation, first_experts
from puzzle_jax.plan.grpo import PlannedPolicy
from puzzle_jax.plan.record import GB, Usage, compiled
from puzzle_jax.plan.search import PlannedSearch

SEQ = 16_384
LIMITS = {
    "grouped_matmul, dense": (224, 214_000),
    "grouped_matmul, transposed": (224, 214_000),
    "grouped_matmul, packed,": (128, 100_000),
    "grouped_matmul, packed transposed": (232, 110_000),
    "activated_matmul, dense": (224, 166_000),
    "activated_matmul, packed": (232, 102_000),
    "window_attention,": (184, 64_000),
    "window_attention with gradients": (240, 87_000),
    "wide window_attention": (168, 121_000),
    "chunk_attention": (168, 71_000),
    "decode_attention": (232, 111_000),
    "route": (168, 77_000),
    "expert_order": (216, 86_000),
}
"""Most registers of a thread and most bytes of shared memory, by kernel; no registers may spill."""

TIMES_ROWS = {"forwards": 12, "gradient of the rows": 20, "gradient of the weights": 20}
"""Most bytes of a mixture's temporaries, as a multiple of the bytes of its pairs' inputs."""

MOST_GB = 72.0
"""The most GB that a device may need in any stage of the recipe for 120B on eight devices of 80 GB."""

PUBLISHED = Path(__file__).parent / "published"
ABSTRACT = jax.ShapeDtypeStruct


@dataclass
class Findings:
    """Rows for the JSON file, and the faults among them."""

    rows: list[dict[str, Any]]
    broken: list[str]

    def add(self, part: str, name: str, said: str, fault: str = "", **figures: Any) -> None:
        self.rows.append({"part": part, "name": name, "fault": fault, **figures})
        if fault:
            self.broken.append(f"{name}: {fault}")
        print(f"{name:<86} {said}{'   FAULT: ' + fault if fault else ''}", flush=True)


def main() -> None:
    parts = {"kernels": kernels, "libraries": libraries, "controls": controls, "experts": experts, "plans": plans}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["h100", "h200", "b200"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not gpu_targets():
        sys.exit("gpu_aot: no CUDA plugin of JAX is installed; pip install -e '.[gpu-compiler]'")
    virtual_devices(64)
    print(f"jax {jax.__version__}")
    found = Findings([], [])
    began = time.monotonic()
    try:
        for part in options.only:
            parts[part](found, options.gpu)
            if options.json:
                options.json.write_text(json.dumps({"jax": jax.__version__, "rows": found.rows}, indent=1) + "\n")
    finally:
        shutil.rmtree(DUMP, ignore_errors=True)
    print(f"{len(found.rows)} programs in {time.monotonic() - began:.0f} seconds, {len(found.broken)} faults")
    print("\n".join(found.broken))
    sys.exit(1 if found.broken else 0)


def compiled_for(gpu: str, run: Callable[..., Any], arguments: Any) -> Any:
    """Returns a program compiled for one GPU of a kind. Raises what the compiler raises."""
    compiler = GpuCompiler(gpu=gpu)
    devices = compiler.devices(1)
    place = SingleDeviceSharding(devices[0])
    given = jax.tree.map(lambda leaf: ABSTRACT(leaf.shape, leaf.dtype, sharding=place), arguments)
    with compiler.in_force():
        lowered = jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options=dict(compiler.options))


# Kernels --------------------------------------------------------------------------------------------------------------


def kernels(found: Findings, gpus: list[str]) -> None:
    """Compiles every kernel. All are for Hopper GPUs, which share machine code, so only the first of them is used."""
    hopper = [gpu for gpu in gpus if GpuCompiler(gpu=gpu).capability == "9.0"]
    for gpu in hopper:
        for size, count in aot_programs.EXPERTS.items() if gpu == hopper[0] else ():

            def block(tokens: int, form: str, count: int = count) -> int:
                rows = BLOCK_ROWS["mosaic_gpu"](aot_programs.TOP_K * tokens, count, "packed" in form)
                return max(rows, 64) if form == "packed transposed" else rows

            listed = aot_programs.programs("mosaic_gpu", "mosaic_gpu", count, block, SEQ)
            more = aot_programs.wide_window_attentions(SEQ), aot_programs.chunk_attentions("mosaic_gpu")
            for name, run, arguments in chain(listed, aot_programs.activated_matmuls(count, block), *more):
                depends_on_experts = "_matmul" in name or f" {count} experts" in name
                if size != "120b" and not depends_on_experts:
                    continue
                before = set(DUMP.glob("*.ptxas"))
                title = f"{gpu} {size} {name}"
                try:
                    program = compiled_for(gpu, run, arguments)
                except Exception as error:
                    found.add("kernels", title, "", f"does not compile: {_line(error)}")
                    continue
                codes = list(machine_code(before))
                if not codes:
                    found.add("kernels", title, "", "no kernel is in it")
                registers, shared = next(limit for prefix, limit in LIMITS.items() if name.startswith(prefix))
                for code in codes:
                    faults = {
                        f"{code.spills} bytes of registers spill": code.spills > 0,
                        f"more than {registers} registers": code.registers > registers,
                        f"more than {shared} bytes of shared memory": code.shared > shared,
                        "no program fits on a multiprocessor": code.programs < 1,
                        "no tensor-core instructions": code.wgmma == 0 and not name.startswith("route"),
                    }
                    memory = program.memory_analysis().temp_size_in_bytes
                    found.add(
                        "kernels",
                        title,
                        f"{code.registers} registers, {code.spills} spilled, {code.shared:,} bytes shared, "
                        f"{code.programs} per SM, {code.wgmma} HGMMA, {memory / 1e6:,.0f} MB beside",
                        "; ".join(fault for fault, is_one in faults.items() if is_one),
                        **asdict(code),
                        programs=code.programs,
                        temporaries=memory,
                    )


def libraries(found: Findings, gpus: list[str]) -> None:
    """Compiles other projects' kernels, if installed, at 120B's shapes for the first GPU; no limits apply."""
    gpu = gpus[0]
    for name, run, arguments in aot_programs.of_libraries(SEQ):
        title, before = f"{gpu} {name}", set(DUMP.glob("*.ptxas"))
        try:
            # They inspect the default device, whereas ours look at the platform that is lowered for.
            with jax.default_device(GpuCompiler(gpu=gpu).devices(1)[0]):
                program = compiled_for(gpu, run, arguments)
        except Exception as error:
            missing = isinstance(error, NotImplementedError) and "is not installed" in str(error)
            found.add("libraries", title, str(error) if missing else "", "" if missing else _line(error))
            continue
        memory = program.memory_analysis().temp_size_in_bytes
        said = [
            f"{each.registers} registers, {each.spills} spilled, {each.shared:,} shared"
            for each in machine_code(before)
        ]
        found.add("libraries", title, "; ".join([*said, f"{memory / 1e6:,.0f} MB beside"]), temporaries=memory)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# What must fail -------------------------------------------------------------------------------------------------------


def controls(found: Findings, gpus: list[str]) -> None:
    """Breaks each limit once on purpose."""
    gpu = gpus[0]
    mosaic = plgpu()

    def copies(columns: int, terms: int) -> Callable[..., Any]:
        """A kernel that uses one tile of shared memory and holds `terms` arrays in registers."""

        def kernel(x: Any, out: Any, tile: Any, arrived: Any) -> None:
            mosaic.copy_gmem_to_smem(x, tile, arrived)
            mosaic.barrier_wait(arrived)
            held = [tile[...]]
            for _ in range(terms):
                held.append(jnp.exp(held[-1]))
            for each in held[::-1]:
                tile[...] = jnp.exp(tile[...]) + each
            mosaic.commit_smem()
            mosaic.copy_smem_to_gmem(tile, out)
            mosaic.wait_smem_to_gmem(0)

        shape = (64, columns)
        scratch = [mosaic.SMEM(shape, jnp.float32), mosaic.Barrier()]
        return launched(kernel, ABSTRACT(shape, jnp.float32), {"only": 1}, scratch, False)

    def control(name: str, fails: Callable[[], str]) -> None:
        try:
            said, fault = fails(), "did not fail"
        except Exception as error:
            said, fault = "", f"failed in another way: {_line(error)}"
        found.add("controls", f"{gpu} control: {name}", said, "" if said else fault)

    def spills() -> str:
        before = set(DUMP.glob("*.ptxas"))
        compiled_for(gpu, copies(128, 24), (ABSTRACT((64, 128), jnp.float32),))
        spilled = max(code.spills for code in machine_code(before))
        return f"{spilled} bytes of registers spill" if spilled else ""

    def too_large() -> str:
        try:
            compiled_for(gpu, copies(1024, 1), (ABSTRACT((64, 1024), jnp.float32),))
        except ValueError as error:
            if "shared memory" not in str(error):
                raise
            return _line(error)
        return ""

    def expanded() -> str:
        rows, inputs, outputs, count = 4096, 2880, 5760, 128
        shapes = ABSTRACT((rows, inputs), jnp.bfloat16), ABSTRACT((count, inputs, outputs), jnp.bfloat16)
        program = compiled_for(gpu, jax.lax.ragged_dot, (*shapes, ABSTRACT((count,), jnp.int32)))
        memory = program.memory_analysis().temp_size_in_bytes
        times = memory / (2 * rows * inputs)
        return f"lax.ragged_dot: {times:.0f} times the rows" if times > TIMES_ROWS["forwards"] else ""

    control("shared memory that no GPU has", too_large)
    control("registers that spill", spills)
    control("a mixture expanded over all experts", expanded)


# Mixtures without kernels ---------------------------------------------------------------------------------------------


def experts(found: Findings, gpus: list[str]) -> None:
    """Compiles the default path of 120B's experts without kernels."""
    count, hidden, inter = 128, aot_programs.HIDDEN, aot_programs.INTER
    os.environ["PUZZLE_KERNELS"] = "off"
    try:
        for gpu in gpus:
            for pairs in (16_384, 65_536):
                for packed in (False, True):
                    of_mixture(found, gpu, pairs, packed, count, hidden, inter)
    finally:
        os.environ["PUZZLE_KERNELS"] = "auto"


def of_mixture(found: Findings, gpu: str, pairs: int, packed: bool, count: int, hidden: int, inter: int) -> None:
    def matrix(inputs: int, outputs: int) -> Any:
        if not packed:
            return ABSTRACT((count, inputs, outputs), jnp.bfloat16)
        return tuple(ABSTRACT((count, outputs, inputs // per), jnp.uint8) for per in (2, 32))

    def forwards(x: Any, ids: Any, gate_up: Any, gate_up_bias: Any, down: Any, down_bias: Any) -> Any:
        gate_up, down = (MXFP4(*parts) if packed else parts for parts in (gate_up, down))
        return expert_outputs(x, ids, Experts(gate_up, gate_up_bias, down, down_bias), limit=7.0)

    def total(*given: Any) -> Any:
        return jnp.sum(forwards(*given).astype(jnp.float32))

    runs = {"forwards": forwards, "gradient of the rows": jax.grad(total)}
    if not packed:
        runs["gradient of the weights"] = jax.grad(total, (2, 4))
    k = aot_programs.TOP_K
    biases = (ABSTRACT((count, size), jnp.bfloat16) for size in (2 * inter, hidden))
    arguments = (
        ABSTRACT((pairs // k, hidden), jnp.bfloat16),
        ABSTRACT((pairs // k, k), jnp.int32),
        matrix(hidden, 2 * inter),
        next(biases),
        matrix(inter, hidden),
        next(biases),
    )
    for what, run in runs.items():
        memory = compiled_for(gpu, run, arguments).memory_analysis().temp_size_in_bytes
        times, most = memory / (2 * pairs * hidden), TIMES_ROWS[what]
        name = f"{gpu} experts without a kernel, {'MXFP4' if packed else 'bf16'}, {pairs:,} pairs, {what}"
        fault = f"more than {most} times the pairs' inputs" if times > most else ""
        found.add("experts", name, f"{memory / GB:.2f} GB, {times:.1f} x the inputs", fault, temporaries=memory)


# Programs of the product ----------------------------------------------------------------------------------------------


def plans(found: Findings, gpus: list[str]) -> None:
    """Compiles two layers of 20B and 120B on one device and on eight, and the whole recipe for 120B."""
    compiler = GpuCompiler(gpu=gpus[0])
    with compiler.in_force():
        for size in aot_programs.EXPERTS:
            for devices in (1, 8):
                for what, run in small_runs(size, devices).items():
                    of_plan(found, f"{gpus[0]} {size}, {devices} devices, {what}", run, None)
        of_plan(found, f"{gpus[0]} 120b, the whole recipe, search", whole_search(), MOST_GB)


def small_runs(size: str, devices: int) -> dict[str, Any]:
    """Plans of a search, a distillation and reinforcement learning with two layers."""
    from puzzle_jax.search.__main__ import SEARCH
    from puzzle_jax.settings.verbs import parse
    from puzzle_jax.train.__main__ import VERBS

    config, packed = read_model(PUBLISHED / f"gpt-oss-{size}.json")
    config = replace(config, blocks=config.blocks[:2])
    path, mesh = PUBLISHED / f"gpt-oss-{size}.json", ["--mesh", f"model={devices}"]
    search = parse(SEARCH, ["--parent", str(path), "--recipe", f"gpt-oss-{size}-1xh100", *mesh])
    answers = dict.fromkeys(search.traces.efforts, 7_000)
    search = replace(search, traces=replace(search.traces, max_tokens=answers, batch_size=16))
    common = ["--parent", str(path), "--child", str(path), "--traces", "-", "--out", "-", *mesh]
    distill = parse(VERBS["distill"], [*common, "--data", "row_length=4096,rows=2"])
    grpo = parse(
        VERBS["grpo"],
        [
            *("--model", str(path), "--out", "-", *mesh, "--rollout", "slots=16,max_tokens=1024"),
            *("--update", "row_length=2048,rows=2"),
        ],
    )
    child = first_experts(config, config, path, path)
    return {
        "search": PlannedSearch(config, search, packed, 1024),
        "distillation": PlannedDistillation(child, distill, packed),
        "reinforcement learning": PlannedPolicy(child, grpo, packed),
    }


def whole_search() -> PlannedSearch:
    from puzzle_jax.search.__main__ import SEARCH
    from puzzle_jax.settings.verbs import parse

    path = PUBLISHED / "gpt-oss-120b.json"
    config, packed = read_model(path)
    recipe = parse(SEARCH, ["--parent", str(path), "--recipe", "gpt-oss-120b-8xh100"])
    return PlannedSearch(config, recipe, packed, 1024)


def of_plan(found: Findings, title: str, run: Any, most: float | None) -> None:
    """Compiles every program of a plan."""
    for name, program in run.programs.items():
        try:
            usage: Usage = compiled({name: program})[name]
        except Exception as error:
            found.add("plans", f"{title}, {name}", "", f"does not compile: {_line(error)}")
            continue
        total = usage.total / GB
        fault = f"more than {most} GB" if most is not None and total > most else ""
        said = f"{total:.1f} GB, {usage.temporaries / GB:.1f} of them temporaries ({usage.seconds:.0f} s)"
        found.add("plans", f"{title}, {name}", said, fault, total=usage.total, temporaries=usage.temporaries)


if __name__ == "__main__":
    main()
