"""Measured costs against measured speed: do sub-block times predict the tokens per second of whole models?

    python benchmarks/measured_costs.py [--rounds N] [--clock cpu] [--json PATH]

`costs.measured` predicts the speeds of a random parent of 6 layers (44M parameters, full attention) and of nine
children with fewer experts and narrower windows, timing every distinct sub-block once. The generation engine then runs
the whole models in turns (`evaluate.throughput`). What counts is the error of the predicted tokens per second, and
whether the architectures are ranked correctly. `--clock cpu` counts CPU seconds of the process on both sides, for
shared machines; these are not wall-clock seconds, but the sums must hold for them as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.costs.compute import compute_costs
from puzzle_jax.costs.hardware import device_identity
from puzzle_jax.costs.measured import Measured
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.evaluate.throughput import Spread, measure_throughput
from puzzle_jax.generate.sampling import Sampling
from puzzle_jax.model.child import Child, ChildBlock, cut_params
from puzzle_jax.model.spec import count_params, init_params
from puzzle_jax.progress import progress
from puzzle_jax.search.space import ExpertChoice, Space, candidate_windows

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LAYERS, COUNTS, WINDOWS = 6, (32, 16, 8), (256, 64)
PARENT = ModelConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=256,
    num_heads=16,
    num_kv_heads=2,
    head_dim=32,
    experts_per_token=4,
    blocks=(BlockConfig(COUNTS[0]),) * LAYERS,
)
SCENARIO = Scenario("long", input_tokens=1792, output_tokens=256, batch=4)


def architecture(counts: Sequence[int], windows: Sequence[int | None]) -> tuple[BlockConfig, ...]:
    """Layers that cycle through the given expert counts and windows."""
    return tuple(BlockConfig(counts[i % len(counts)], windows[i % len(windows)]) for i in range(LAYERS))


# Only the parent is also a trial of the provider: each other model has two differences from it, or unequal layers.
ARCHITECTURES = {
    "parent": PARENT.blocks,
    "8 and 32 experts": architecture([8, 32], [None]),
    "half with window 256": architecture([32], [None, 256]),
    "windows 256 and 64": architecture([32], [256, 64]),
    "16 experts, half with window 64": architecture([16], [64, None]),
    "16 experts, all with window 256": architecture([16], [256]),
    "8, 16, 32 experts, two thirds with window 64": architecture([8, 16, 32], [64, 64, None]),
    "8 experts, two thirds with window 256": architecture([8], [256, 256, None]),
    "16 and 8 experts, windows 64 and 256": architecture([16, 8], [64, 256]),
    "8 experts, all with window 64": architecture([8], [64]),
}


def main() -> None:
    options = parse()
    enable_compilation_cache()
    console = Console(width=110)
    start, load = time.perf_counter(), os.getloadavg()
    choices = tuple(ExpertChoice(count, tuple(range(count)), "first") for count in COUNTS)
    space = Space(PARENT, (choices,) * LAYERS, candidate_windows(PARENT, WINDOWS))
    with progress(console, "timing sub-blocks", None) as advance:
        provider = Measured(
            rounds=options.block_rounds, progress=lambda _, turns: advance(1, turns), clock=CLOCKS[options.clock]
        )
        costs = compute_costs(space.offer, [SCENARIO], "bf16", provider)
    predicted = {name: costs.tokens_per_second(blocks) for name, blocks in ARCHITECTURES.items()}
    block_seconds = time.perf_counter() - start
    params = init_params(PARENT, jax.random.key(0))
    models = {name: cut(params, blocks) for name, blocks in ARCHITECTURES.items()}
    with progress(console, "running models", options.rounds) as advance:
        measured = measure_throughput(
            models,
            batch=SCENARIO.given_batch,
            input_tokens=SCENARIO.input_tokens,
            output_tokens=SCENARIO.output_tokens,
            rounds=options.rounds,
            sampling=Sampling(temperature=1.0),
            on_round=lambda: advance(1),
            clock=CLOCKS[options.clock],
        )
    report = summary(predicted, measured)
    report |= {
        "device": device_identity(),
        "clock": options.clock,
        "load": [load, os.getloadavg()],
        "block_seconds": block_seconds,
        "seconds": time.perf_counter() - start,
        "parameters": count_params(PARENT),
    }
    show(report, console)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def cut(params: Any, blocks: Sequence[BlockConfig]) -> tuple[Any, ModelConfig]:
    """The child that keeps the first experts of every layer."""
    kept = tuple(ChildBlock(tuple(range(block.num_experts)), block.window) for block in blocks)
    child = Child(PARENT, kept)
    return cut_params(params, child), child.config


def summary(predicted: dict[str, float], measured: dict[str, Spread]) -> dict[str, Any]:
    errors = {name: predicted[name] / measured[name].median - 1 for name in predicted}
    medians = [measured[name].median for name in predicted]
    return {
        "architectures": {
            name: {"predicted": predicted[name], "measured": asdict(measured[name]), "error": errors[name]}
            for name in predicted
        },
        "median_error": statistics.median(abs(error) for error in errors.values()),
        "spearman": float(spearmanr(list(predicted.values()), medians)[0]),  # pyright: ignore[reportArgumentType]
        "span": max(medians) / min(medians),
    }


def show(report: dict[str, Any], console: Console) -> None:
    title = f"{report['parameters']:,} parameters, {SCENARIO.batch} x ({SCENARIO.input_tokens} + "
    title += f"{SCENARIO.output_tokens}) tokens, {report['device']['device']}, {report['clock']} seconds"
    table = Table("", "predicted tokens/s", "measured (range)", "error", title=title, title_justify="left")
    for name, row in report["architectures"].items():
        found = row["measured"]
        spread = f"{found['median']:.1f} ({found['low']:.1f}-{found['high']:.1f})"
        table.add_row(name, f"{row['predicted']:.1f}", spread, f"{row['error']:+.1%}")
    console.print(table)
    console.print(
        f"median error {report['median_error']:.1%}, Spearman {report['spearman']:.3f}, speeds span "
        f"{report['span']:.2f}x; {report['block_seconds']:.0f} s of {report['seconds']:.0f} s for the sub-blocks; "
        f"load {report['load'][0][0]:.1f} to {report['load'][1][0]:.1f}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of whole models")
    parser.add_argument("--block-rounds", type=int, default=5, help="of sub-blocks")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path, help="where to write everything")
    return parser.parse_args()


if __name__ == "__main__":
    main()
