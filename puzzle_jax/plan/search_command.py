"""`python -m puzzle_jax.search plan`: what a search needs on every device, before there are devices.

Of the parent config.json is read, of the recipe its fields, and no file of traces. The compiler is XLA's for CPUs, on
virtual devices; see `plan.programs` for what its figures are worth.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from puzzle_jax.commands import Parser, guarded
from puzzle_jax.consoles import plain_console
from puzzle_jax.costs.hardware import HARDWARE
from puzzle_jax.errors import ConfigError
from puzzle_jax.plan.programs import GB, device_limit, read_model, virtual_devices
from puzzle_jax.plan.search import LENS, RANK, SCORE, TRACE, PlannedSearch, StageMemory, plan_search
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.search.recipe_file import parse_recipe
from puzzle_jax.settings.fields import checked_arguments
from puzzle_jax.settings.files import OTHER_OPTIONS

_PROG = "python -m puzzle_jax.search plan"
_NAMES = {
    "loaded": "parameters as stored, {form}",
    "weights": "parameters, bfloat16",
    "caches": "caches of {slots} slots of {context:,}",
    "slots": "their logits and tokens",
    "group": "{rows} rows whose prompts are run",
    "batch": "batch of traces",
    "states": "hidden states kept",
    "sums": "sums over batches",
    "temporaries": "temporaries",
}
_HELP = {
    TRACE: "lower traces.batch_size or traces.max_tokens, or have the parent answer elsewhere (traces.file)",
    RANK: "shorter answers (traces.max_tokens)",
    LENS: "lower score.per_call, score.keep_every or score.tokens_per_batch, or score.keep_sets 0, which needs no lens",
    SCORE: "lower score.per_call, score.keep_every or score.tokens_per_batch",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, compiles, and prints the plan; returns the exit code."""
    parser = Parser(
        prog=_PROG,
        description="What a search needs on every device, from configurations alone.",
        epilog="Any field of the recipe can be given too, as in a search: --score.per_call 2",
    )

    def add(flag: str, **options: Any) -> None:
        parser.add_argument(flag, **options)

    add("--parent", type=Path, required=True, metavar="CONFIG|DIR", help="config.json, or a directory that has one")
    add("--devices", type=int, metavar="N", help="of one host, all on the model axis (else the recipe's mesh)")
    add("--hardware", choices=[name for name in HARDWARE if name != "local"], help="whose memory there is")
    add("--hbm-gb", type=float, default=80.0, metavar="GB", help="memory of a device, in 10^9 bytes (default: 80.0)")
    add("--prompt-tokens", type=int, default=1024, metavar="N", help="of the longest prompt (default: 1024)")

    def run() -> None:
        options, others = parser.parse_known_args(arguments)
        checked_arguments(others, Recipe, [*parser.options(others), *OTHER_OPTIONS])
        _run(options, others)

    return guarded(_PROG, run)


def _run(options: argparse.Namespace, others: Sequence[str]) -> None:
    if options.hardware is not None:
        options.hbm_gb = HARDWARE[options.hardware].memory_bytes / GB
    limit = device_limit(options)
    config, packed = read_model(options.parent)
    run = PlannedSearch(config, _recipe(options, others), packed, options.prompt_tokens)
    devices = run.recipe.mesh.devices
    virtual_devices(devices)
    _ = run.mesh
    plain_console(stderr=True).print(f"compiling for {devices} virtual devices", highlight=False)
    found = plan_search(run)
    out = plain_console()
    mesh = run.recipe.mesh
    out.print(
        f"{options.parent.name} on {mesh.data} x {mesh.model} devices, traces of up to {run.longest:,} tokens",
        highlight=False,
        soft_wrap=True,
    )
    out.print(_table(run, found, limit))
    for line in (*_verdict(found, limit), *_notes(run)):
        out.print(line, highlight=False, soft_wrap=True)


def _recipe(options: argparse.Namespace, others: Sequence[str]) -> Recipe:
    _, recipe = parse_recipe(["--parent", str(options.parent), *others], _PROG, deployment=False)
    if options.devices is None:
        return recipe
    if options.devices < 1:
        raise ConfigError(f"--devices is {options.devices}, but must be at least 1")
    return replace(recipe, mesh=replace(recipe.mesh, data=1, model=options.devices))


# Output ---------------------------------------------------------------------------------------------------------------


def _table(run: PlannedSearch, found: Mapping[str, StageMemory], limit: float) -> Table:
    table = Table("GB per device", *found)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, sizes: Sequence[int]) -> None:
        if any(sizes):
            table.add_row(name, *(f"{size / GB:,.3f}" if size else "" for size in sizes))

    engine = run.engine()
    about = {
        "form": "MXFP4" if run.packed else "bfloat16",
        "slots": engine.slots,
        "context": engine.context,
        "rows": engine.rows,
    }
    for name, shown in _NAMES.items():
        add(shown.format(**about), [getattr(memory, name) for memory in found.values()])
    table.add_section()
    add("total", [memory.total for memory in found.values()])
    add("of a device's", [round(limit)] * len(found))
    return table


def _verdict(found: Mapping[str, StageMemory], limit: float) -> list[str]:
    """Whether it fits, and if not, what would help, stage by stage."""
    most = max(memory.total for memory in found.values())
    if most <= limit:
        return [f"fits: {(limit - most) / GB:.1f} GB are left"]
    lines = []
    for stage, memory in found.items():
        if memory.total > limit:
            helps = _HELP.get(stage, "")
            beside = f"{helps}; or " if helps and memory.weights < limit else ""
            missing = f"{(memory.total - limit) / GB:.1f} GB too many"
            lines.append(f"{stage} does not fit: {missing}; {beside}more devices (mesh.model)")
    return lines


def _notes(run: PlannedSearch) -> list[str]:
    """What the figures are."""
    lines = ["compiled by XLA for CPUs, in float16 for bfloat16"]
    for name, count in (
        ("experts", run.config.blocks[0].num_experts),
        ("key-value heads", run.config.num_kv_heads),
    ):
        if count % run.recipe.mesh.model:
            lines.append(f"{name} are whole on every device: {run.recipe.mesh.model} do not divide {count}")
    return lines
