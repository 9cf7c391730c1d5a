"""One step of distillation, ours compared with plain PyTorch and transformers: tokens per second and peak memory.

The parent is a random model of gpt-oss's architecture with its true vocabulary; the child has half the experts and one
more window. Both sides minimise the forward KL over the whole vocabulary in float32 on the same cores, with experts and
routers frozen, and with the same AdamW, batches and checkpoints:

    ours     puzzle_jax.train: the child as a view of its parent, rematerialisation, losses that store no logits
    theirs   transformers' GptOssForCausalLM twice, logits of both, torch.nn.functional.kl_div, backward, AdamW

Every turn is a process of its own, and the sides take turns. Losses of the first step must agree to 1e-4 and those of
later steps to 1e-3, which also checks gradients and updates; otherwise the benchmark reports an error and no results.

Seconds are medians over all turns' steps but each turn's first, as wall-clock time and as CPU time of the process (all
its threads; for shared machines: set OMP_WAIT_POLICY=passive there, or torch's threads count as working while they
wait). Memory is the peak of resident bytes once models are loaded, compilation included: in total, and beyond what was
resident at that point. Ours holds the parent then, so that its fp32 master weights count as the step's, and theirs both
models; gradients and optimiser state are allocated later on both sides.

A second table shows the loss alone with its gradients, by vocabulary size: the peak beyond inputs and gradients, and
the temporary memory that XLA plans for ours.

    python benchmarks/distill.py [--rounds 3] [--steps 3] [--hidden 128] [--loss-only] [--json PATH]

Needs the extra `parity`. Memory is read from Linux's /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

CORES = len(os.sched_getaffinity(0))
FIRST, LATER = 1e-4, 1e-3  # largest relative difference of losses, in the first step and later
LEARNING_RATE, B1, B2, EPS = 1e-4, 0.9, 0.95, 1e-8  # for AdamW
VOCABULARIES = (16, 4, 1)  # for the loss alone, the vocabulary is divided by each of these


def main() -> None:
    settings = parse()
    if settings.job:
        print(json.dumps(JOBS[settings.job](settings)))
        return
    report: dict[str, Any] = {"settings": {n: str(v) for n, v in vars(settings).items()}, "load": [os.getloadavg()]}
    console = Console(width=110)
    if not settings.loss_only:
        report |= steps(settings, console)
        show_steps(report, settings, console)
    if not settings.steps_only:
        report["loss"] = losses(settings, console)
        show_losses(report["loss"], settings, console)
    report["load"].append(os.getloadavg())
    console.print(f"{CORES} cores; load {report['load'][0][0]:.1f} to {report['load'][1][0]:.1f}")
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn, after one that is not")
    parser.add_argument("--vocab", type=int, default=201_088)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 32; experts are as wide")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--experts-implementation", help="of transformers' experts, in place of its default")
    parser.add_argument("--steps-only", action="store_true", help="leaves the table of the loss out")
    parser.add_argument("--loss-only", action="store_true", help="leaves whole steps out")
    parser.add_argument("--directory", type=Path, help="where models go; by default the system's temporary directory")
    parser.add_argument("--json", type=Path, help="where to write everything")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    return parser.parse_args()


# Turns ----------------------------------------------------------------------------------------------------------------


def steps(settings: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs all turns of both sides; exits if their losses do not agree."""
    root = Path(tempfile.mkdtemp(prefix="distill-", dir=settings.directory))
    turns: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    try:
        in_a_process("make", settings, directory=root)
        for number in range(settings.rounds):
            for side in list(turns)[:: -1 if number % 2 else 1]:
                found = in_a_process(side, settings, directory=root)
                turns[side].append(found)
                console.print(
                    f"round {number}, {side}: loss {found['losses'][0]:.7f}, steps "
                    f"{', '.join(f'{s:.2f}' for s in found['seconds'])} s, peak {found['peak'] / 1e6:,.0f} MB"
                )
            difference = apart(turns)
    finally:
        shutil.rmtree(root)
    return {"turns": turns, "difference": difference}


def apart(turns: dict[str, list[dict[str, Any]]]) -> list[float]:
    """Largest relative difference of the losses, by step; exits if the sides do not agree."""
    ours, theirs = (np.array([turn["losses"] for turn in turns[side]]) for side in turns)
    difference = np.max(np.abs(ours - theirs) / np.abs(theirs), axis=0)
    if not difference[0] <= FIRST or not np.all(difference <= LATER):
        raise SystemExit(
            f"the sides do not compute the same, so nothing is reported: losses {ours[-1].tolist()} of ours and "
            f"{theirs[-1].tolist()} of theirs differ by {difference.tolist()} of their size, but may by {FIRST} in the "
            f"first step and by {LATER} after it"
        )
    return difference.tolist()


def losses(settings: argparse.Namespace, console: Console) -> dict[str, list[dict[str, Any]]]:
    """The loss alone at every vocabulary size, by side; exits if the sides do not agree."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for divisor in VOCABULARIES:
        for side, rows in found.items():
            rows.append(in_a_process(f"loss, {side}", settings, vocab=settings.vocab // divisor))
            console.print(
                f"vocabulary {settings.vocab // divisor:,}, {side}: loss {rows[-1]['value']:.7f}, norm of the head's "
                f"gradient {rows[-1]['gradient']:.7f}, {rows[-1]['first']:.2f} s"
            )
        for name in ("value", "gradient"):
            ours, theirs = (rows[-1][name] for rows in found.values())
            if not abs(ours - theirs) <= FIRST * abs(theirs):
                raise SystemExit(f"{name} of the loss is {ours} for ours, but {theirs} for theirs: nothing is reported")
    return found


def in_a_process(job: str, settings: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    passed = ("steps", "vocab", "hidden", "layers", "rows", "length", "experts_implementation", "directory")
    values = {**{name: getattr(settings, name) for name in passed}, **changes}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(CORES),
        "TQDM_DISABLE": "1",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # memory for compiling is part of the peak
    command = [sys.executable, __file__, f"--job={job}", *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{job!r} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# Whole steps ----------------------------------------------------------------------------------------------------------


def architecture(settings: argparse.Namespace) -> tuple[Any, Any]:
    """The parent's configuration and the child."""
    from puzzle_jax.config import BlockConfig, ModelConfig
    from puzzle_jax.model.child import Child, ChildBlock

    windows = [None if layer % 2 else 128 for layer in range(settings.layers)]
    parent = ModelConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        experts_per_token=4,
        blocks=tuple(BlockConfig(16, window) for window in windows),
    )
    windows[1] = 128
    kept = [tuple(sorted(np.random.default_rng(layer).permutation(16)[:8].tolist())) for layer in range(len(windows))]
    return parent, Child(parent, tuple(map(ChildBlock, kept, windows)))


def batches(settings: argparse.Namespace) -> np.ndarray:
    """Token ids, [steps + 1, rows, length]; the first step is not timed."""
    shape = (settings.steps + 1, settings.rows, settings.length)
    return np.random.default_rng(7).integers(0, settings.vocab, shape).astype(np.int32)


def make(settings: argparse.Namespace) -> dict[str, Any]:
    """Writes the checkpoints of parent and child, in bfloat16, which both sides read without rounding."""
    import jax

    from puzzle_jax.convert_hf.export import export_child, save_checkpoint
    from puzzle_jax.model.spec import init_params

    parent, child = architecture(settings)
    root = settings.directory
    save_checkpoint(
        root / "parent", parent, init_params(parent, jax.random.key(0)), config_base={"hidden_act": "silu"}, form="bf16"
    )
    export_child(root / "parent", root / "child", child.config, child.kept, provenance={})
    return {}


def ours(settings: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from puzzle_jax.convert_hf.load import load_checkpoint
    from puzzle_jax.train.distill.objectives import Distillation, Fixed, LossSettings
    from puzzle_jax.train.optimizer import OptimizerSettings, make_optimizer
    from puzzle_jax.train.placement import Placement
    from puzzle_jax.train.rows import Packed
    from puzzle_jax.train.step import init_state, make_step
    from puzzle_jax.train.student import Student

    parent, child = architecture(settings)
    student, placement = Student(child), Placement()
    loaded = load_checkpoint(settings.directory / "parent", dtype=jnp.float32)
    stacked = jax.jit(student.stacked, donate_argnums=0)(loaded.params)
    fixed = Fixed(jax.block_until_ready(placement.base(stacked, parent)))
    del loaded
    before = resident_memory()

    adamw = OptimizerSettings("adamw", LEARNING_RATE, "constant", b1=B1, b2=B2, eps=EPS, clip_norm=None)
    optimizer = make_optimizer(adamw, settings.steps + 1)
    state = jax.jit(lambda params: init_state(student.master_weights(params), optimizer, jax.random.key(0)))(fixed.base)
    step = make_step(Distillation(student, LossSettings()), optimizer)

    def run(tokens: np.ndarray) -> float:
        nonlocal state
        ones = np.ones_like(tokens)
        places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        row = Packed(tokens, np.roll(tokens, -1, axis=1), ones.astype(np.float32), ones, places, {})
        state, metrics = step(state, fixed, placement.micro_batches(jax.tree.map(lambda array: array[None], row)))
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return timed(run, settings) | memory(before)


def theirs(settings: argparse.Namespace) -> dict[str, Any]:
    import torch
    from torch.nn.functional import kl_div, log_softmax
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.set_num_threads(CORES)
    root, options = settings.directory, {"dtype": torch.float32, "attn_implementation": "eager"}
    if settings.experts_implementation:
        options["experts_implementation"] = settings.experts_implementation
    of_child = GptOssConfig.from_pretrained(root / "parent")  # the child's own configuration asks for remote code
    of_child.num_local_experts = 8
    assert of_child.layer_types is not None
    of_child.layer_types[1] = "sliding_attention"
    teacher = GptOssForCausalLM.from_pretrained(root / "parent", **options).eval()
    student = GptOssForCausalLM.from_pretrained(root / "child", config=of_child, **options).train()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not (".mlp.experts." in name or ".mlp.router." in name))
    before = resident_memory()

    optimizer = torch.optim.AdamW(
        [parameter for parameter in student.parameters() if parameter.requires_grad],
        lr=LEARNING_RATE,
        betas=(B1, B2),
        eps=EPS,
        weight_decay=0.0,
    )

    def run(tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens).long()
        with torch.no_grad():
            target = log_softmax(teacher(ids, use_cache=False).logits.flatten(0, 1), dim=-1)
        logits = student(ids, use_cache=False).logits.flatten(0, 1)
        loss = kl_div(log_softmax(logits, dim=-1), target, reduction="batchmean", log_target=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return timed(run, settings) | memory(before)


def timed(run: Callable[[np.ndarray], float], settings: argparse.Namespace) -> dict[str, Any]:
    """Losses of all steps; the first step's seconds, and wall-clock and CPU seconds of all others."""
    values, seconds, cpu_seconds = [], [], []
    for tokens in batches(settings):
        start, cpu_start = time.perf_counter(), time.process_time()
        values.append(run(tokens))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {"losses": values, "first": seconds[0], "seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:]}


# The loss alone -------------------------------------------------------------------------------------------------------


def loss_inputs(settings: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """Final hidden states of student and teacher, [tokens, hidden], and their heads, [hidden, vocab]."""
    rng = np.random.default_rng(3)
    tokens, hidden, vocab = settings.rows * settings.length, settings.hidden, settings.vocab
    shapes = ((tokens, hidden), (tokens, hidden), (hidden, vocab), (hidden, vocab))
    x, y, own, teachers = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return x, y, own * np.float32(hidden**-0.5), teachers * np.float32(hidden**-0.5)


def loss_ours(settings: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from puzzle_jax.train.losses.head import Head
    from puzzle_jax.train.losses.head_sum import head_loss_sum

    x, y, own, teachers = map(jax.device_put, loss_inputs(settings))
    norm, weights = jnp.ones(settings.hidden), jnp.full(len(x), 1 / len(x))
    inputs = (x, Head(norm, own), y, Head(norm, teachers), weights)

    def loss(x: Any, student: Head, y: Any, teacher: Head, weights: Any) -> Any:
        return head_loss_sum("forward_kl", student, x, weights, eps=1e-5, teacher=teacher, y=y)

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()
    jax.block_until_ready(inputs)
    before, start = resident_memory(), time.perf_counter()
    value, gradients = jax.block_until_ready(compiled(*inputs))
    seconds, beyond = time.perf_counter() - start, memory(before)["beyond"]
    beyond -= sum(leaf.nbytes for leaf in jax.tree.leaves(gradients))
    analysis = compiled.memory_analysis()
    assert analysis is not None
    norm = float(np.linalg.norm(np.asarray(gradients[1].weight, np.float64)))
    found = {"value": float(value), "gradient": norm, "beyond": beyond, "first": seconds}
    return found | {"plan": analysis.temp_size_in_bytes}


def loss_theirs(settings: argparse.Namespace) -> dict[str, Any]:
    import torch
    from torch.nn.functional import kl_div, linear, log_softmax, rms_norm

    torch.set_num_threads(CORES)
    x, y, own, teachers = map(torch.from_numpy, loss_inputs(settings))
    own, teachers = own.T.contiguous(), teachers.T.contiguous()
    norm = torch.ones(settings.hidden, requires_grad=True)
    for array in (x, own):
        array.requires_grad_()
    before, start = resident_memory(), time.perf_counter()
    shape = (settings.hidden,)
    with torch.no_grad():
        target = log_softmax(linear(rms_norm(y, shape, norm, 1e-5), teachers), dim=-1)
    logits = linear(rms_norm(x, shape, norm, 1e-5), own)
    loss = kl_div(log_softmax(logits, dim=-1), target, reduction="batchmean", log_target=True)
    loss.backward()
    seconds, beyond = time.perf_counter() - start, memory(before)["beyond"]
    assert x.grad is not None and own.grad is not None
    beyond -= x.grad.nbytes + own.grad.nbytes
    return {"value": loss.item(), "gradient": own.grad.double().norm().item(), "beyond": beyond, "first": seconds}


# Memory ---------------------------------------------------------------------------------------------------------------


def resident_memory() -> int:
    """Returns the resident bytes and resets their peak."""
    Path("/proc/self/clear_refs").write_text("5")
    return proc_status("VmRSS")


def memory(before: int) -> dict[str, int]:
    """Peak of resident bytes since `resident_memory` was called, in total and beyond what it returned."""
    peak = proc_status("VmHWM")
    return {"peak": peak, "beyond": peak - before}


def proc_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(field)


# Tables ---------------------------------------------------------------------------------------------------------------


def show_steps(report: dict[str, Any], settings: argparse.Namespace, console: Console) -> None:
    tokens = settings.rows * settings.length
    console.print(
        f"\na step on {settings.rows} x {settings.length} tokens, vocabulary {settings.vocab:,}, hidden "
        f"{settings.hidden}, {settings.layers} layers; {settings.rounds} rounds of {settings.steps} steps"
    )
    table = Table("", "ours", "theirs", "ratio")
    for column in table.columns[1:]:
        column.justify = "right"
    turns = report["turns"]
    every = {side: [s for turn in turns[side] for s in turn["seconds"]] for side in turns}
    median = {side: statistics.median(every[side]) for side in turns}
    report["tokens_per_second"] = {side: tokens / median[side] for side in turns}
    ratio = report["speed_ratio"] = median["theirs"] / median["ours"]
    spread = [f"{min(every[side]):.2f} to {max(every[side]):.2f}" for side in turns]
    table.add_row("tokens per second", *(f"{tokens / median[side]:,.1f}" for side in turns), f"{ratio:.2f}")
    table.add_row("seconds per step", *(f"{median[side]:.3f}" for side in turns), "")
    table.add_row("fastest to slowest", *spread, "")
    cpu = {side: statistics.median(s for turn in turns[side] for s in turn["cpu_seconds"]) for side in turns}
    report["cpu_ratio"] = cpu["theirs"] / cpu["ours"]
    table.add_row("CPU seconds per step", *(f"{cpu[side]:.3f}" for side in turns), f"{report['cpu_ratio']:.2f}")
    first = [statistics.median(turn["first"] for turn in turns[side]) for side in turns]
    table.add_row("first step, seconds", *(f"{seconds:.2f}" for seconds in first), "")
    for name, label in (("peak", "peak memory, MB"), ("beyond", "beyond loaded models, MB")):
        sizes = {side: statistics.median(turn[name] for turn in turns[side]) for side in turns}
        report[f"{name}_ratio"] = sizes["ours"] / sizes["theirs"]
        cells = (f"{sizes[side] / 1e6:,.0f}" for side in turns)
        table.add_row(label, *cells, f"{report[f'{name}_ratio']:.2f}")
    console.print(table)
    shown = ", ".join(f"{difference:.1e}" for difference in report["difference"])
    console.print(f"losses differ by {shown} of their size, step by step")


def show_losses(found: dict[str, list[dict[str, Any]]], settings: argparse.Namespace, console: Console) -> None:
    console.print(
        f"\nthe loss alone on {settings.rows * settings.length:,} tokens, hidden {settings.hidden}: peak beyond inputs "
        "and gradients, MB"
    )
    table = Table("vocabulary", "ours", "XLA's plan", "theirs")
    for column in table.columns:
        column.justify = "right"
    for divisor, our, their in zip(VOCABULARIES, found["ours"], found["theirs"], strict=True):
        sizes = (our["beyond"], our["plan"], their["beyond"])
        table.add_row(f"{settings.vocab // divisor:,}", *(f"{size / 1e6:,.0f}" for size in sizes))
    console.print(table)


JOBS = {"make": make, "ours": ours, "theirs": theirs, "loss, ours": loss_ours, "loss, theirs": loss_theirs}

if __name__ == "__main__":
    main()
