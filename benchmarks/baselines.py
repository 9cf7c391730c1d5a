"""Held-out KL of the searched child and of every baseline before training, for several targets and trace seeds.

    python benchmarks/baselines.py --costs runs/tiny/cost [--seeds 0 1 2] [--rounds N] [--swaps N] [--json PATH]

Each seed draws different problems and answers of the embedded parent; costs come from an earlier run of the tiny
recipe, so that they are the same for all seeds and baselines. Where a baseline cannot meet a target, its nearest
architecture is shown, marked with *. All are run whole on traces that were not used for scoring or choosing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.costs.scenario import Target
from puzzle_jax.search.__main__ import SEARCH
from puzzle_jax.search.artifacts import final_candidates
from puzzle_jax.search.context import Search
from puzzle_jax.search.pipeline import run_stages
from puzzle_jax.search.recipe import RefineSettings
from puzzle_jax.search.solve.baselines import all_baselines
from puzzle_jax.settings import verbs

TARGETS = [(0.8, 1.2), (0.65, 1.3), (0.5, 1.2), (0.5, 1.4), (0.4, 1.3)]
"""Maximum expert bytes and minimum speed-up, relative to the parent."""

STAGES = ("cost", "trace", "rank", "refine_costs", "score", "solve", "refine")


def main() -> None:
    options = parse()
    enable_compilation_cache()
    console = Console(width=150)
    rows = json.loads(options.json.read_text()) if options.json and options.json.is_file() else []
    known = {(row["seed"], *row["target"]) for row in rows}
    for seed in options.seeds:
        for target in TARGETS:
            if (seed, *target) in known:
                continue
            rows.append({"seed": seed, "target": target, **measure(seed, target, options, console)})
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    show(sorted(rows, key=lambda row: (-row["target"][0], row["target"][1], row["seed"])), console)


def measure(seed: int, target: tuple[float, float], options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Returns the held-out KL of child and baselines, and the limits that each of them violates."""
    recipe = verbs.parse(SEARCH, ["--run", str(options.out / f"seed-{seed}")])
    recipe = replace(
        recipe,
        traces=replace(recipe.traces, seed=seed, calibration=options.calibration, validation=options.validation),
        target=Target(max_expert_bytes_ratio=target[0], min_speedup=target[1]),
        refine=RefineSettings(rounds=options.rounds, swaps=options.swaps),
    )
    search = Search(recipe, console)
    if not (search.run / "cost").exists():
        shutil.copytree(options.costs, search.run / "cost")
    for stage in STAGES:
        run_stages(search, stage)
    candidates = {"child": final_candidates(search.run)["child"], **all_baselines(search.problem(), seed=seed)}
    children = [search.child(candidate) for candidate in candidates.values()]
    scores = search.evaluator(search.run / "kept").divergence(children, search.traces("heldout"), "heldout").scores
    return {
        name: {"kl": score.kl, "kl_se": score.kl_se, "missed": list(candidate.violated), "choice": candidate.to_json()}
        for (name, candidate), score in zip(candidates.items(), scores, strict=True)
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    names = [name for name in rows[0] if name not in ("seed", "target")]
    table = Table("expert bytes", "speed-up", "seed", *names)
    for row in rows:
        cells = [f"{row[n]['kl']:.3f} ±{row[n]['kl_se']:.3f}{'*' if row[n]['missed'] else ''}" for n in names]
        table.add_row(f"{row['target'][0]:g}", f"{row['target'][1]:g}", str(row["seed"]), *cells)
    console.print(table)
    for name in names[1:]:
        ratios = [row[name]["kl"] / row["child"]["kl"] for row in rows]
        lower = sum(ratio > 1 for ratio in ratios)
        console.print(
            f"{name}: {statistics.median(ratios):.2f}x the child's KL in the median, {min(ratios):.2f}x at least; "
            f"the child's is lower in {lower} of {len(rows)}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, required=True, help="cost directory of an earlier run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=24, help="problems per task")
    parser.add_argument("--validation", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=0, help="of scores around the child, in refinement")
    parser.add_argument("--swaps", type=int, default=0, help="of experts, in refinement")
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--json", type=Path, help="where to write everything; rows that it holds are not run again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
