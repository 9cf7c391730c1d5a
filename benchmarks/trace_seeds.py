"""Does the search win on every draw of traces? Child and baselines over several trace seeds.

    python benchmarks/trace_seeds.py --recipe puzzle_jax/recipes/tiny.yaml --costs runs/tiny/cost --out runs/seeds

Each seed is a search of its own up to the program (run directory OUT/seed-N): other problems, other answers, other
held-out set. All seeds use the costs of an earlier run, so that their predicted costs are the same numbers. Prints,
per seed, held-out KL of the child and of every baseline, and whether a baseline misses the target.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import yaml

from puzzle_jax.cli import enable_compilation_cache
from puzzle_jax.search.pipeline import Search
from puzzle_jax.search.recipe import Recipe, SpaceSettings, TraceSettings
from puzzle_jax.search.scenario import Scenario, Target
from puzzle_jax.search.score import score_children

STAGES = ("cost", "trace", "rank", "score", "solve", "refine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="scenario, target and windows are taken from it")
    parser.add_argument("--costs", type=Path, required=True, help="cost directory of an earlier run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=16, help="problems per task")
    parser.add_argument("--validation", type=int, default=8)
    parser.add_argument("--heldout", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    options = parser.parse_args()
    enable_compilation_cache()
    given = yaml.safe_load(options.recipe.read_text())
    recipe = Recipe(
        scenario=Scenario(**given["scenario"]),
        target=Target(**given["target"]),
        space=SpaceSettings(windows=tuple(given["space"]["windows"])),
    )
    for seed in options.seeds:
        traces = TraceSettings(
            calibration=options.calibration,
            validation=options.validation,
            confirmation=options.validation,
            heldout=options.heldout,
            seed=seed,
        )
        search = Search(dataclasses.replace(recipe, run=options.out / f"seed-{seed}", traces=traces))
        if not (search.run / "cost").exists():
            shutil.copytree(options.costs, search.run / "cost")
        for stage in STAGES:
            search.execute(stage)
        candidates = {name: found for name, found in search.candidates().items() if name != "parent"}
        scores, _ = score_children(
            search.parent.params,
            search.parent.config,
            [search.child(candidate) for candidate in candidates.values()],
            search.traces("heldout"),
        )
        if seed == options.seeds[0]:
            print("| trace seed | " + " | ".join(name.replace("_", " ") for name in candidates) + " |")
            print("|---|" + "---:|" * len(candidates))
        cells = [
            f"{score.kl:.3f} ±{score.kl_se:.3f}{'' if candidate.meets_target else ' (misses the target)'}"
            for candidate, score in zip(candidates.values(), scores, strict=True)
        ]
        print(f"| {seed} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
