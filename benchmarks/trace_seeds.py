"""Does the search win on every draw of traces? Child and baselines over several trace seeds.

    python benchmarks/trace_seeds.py --seeds 0 1 2 --out runs/seeds

Each seed is a whole search of its own (run directory OUT/seed-N): other problems, other answers, other held-out set.
All seeds share the first one's measured costs, so that their predicted costs are the same numbers. Prints, per seed,
held-out KL of the child and of every baseline, and which limit of the target a baseline misses.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from puzzle_jax.cli import enable_compilation_cache
from puzzle_jax.search.__main__ import main as search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    options, settings = parser.parse_known_args()
    enable_compilation_cache()
    tables = {}
    for seed in options.seeds:
        run = options.out / f"seed-{seed}"
        arguments = ["--run", str(run), "--traces.seed", str(seed), *settings]
        first = options.out / f"seed-{options.seeds[0]}"
        if run != first and not (run / "cost").exists():
            run.mkdir(parents=True, exist_ok=True)
            shutil.copy(first / "run.json", run / "run.json")
            shutil.copytree(first / "cost", run / "cost")
        if code := search(arguments):
            raise SystemExit(code)
        tables[seed] = json.loads((run / "evaluate" / "evaluation.json").read_text())
    names = [name for name in next(iter(tables.values())) if name != "parent"]
    print("| trace seed | " + " | ".join(name.replace("_", " ") for name in names) + " |")
    print("|---|" + "---:|" * len(names))
    for seed, table in tables.items():
        cells = []
        for name in names:
            entry = table[name]
            missed = "" if not entry["missed"] else " (misses the target)"
            cells.append(f"{entry['heldout']['kl']:.4f} ±{entry['heldout']['kl_se']:.4f}{missed}")
        print(f"| {seed} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
