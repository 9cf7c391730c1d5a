"""Predicted and expected against real KL of chosen children: those that a search takes for targets of several speeds.

    python benchmarks/expected.py RUN/search [RUN/search ...] [--speeds 1.1 1.2 1.3 1.4 1.5] [--json FILE]

For each finished search of the embedded parent and each speed, the integer program is solved with the run's scores and
costs, its pool is run whole on the validation traces, and one child is chosen, as the stage `solve` does. Printed are
the sum of its scores (predicted), the KL that is expected of it (`search.refine.expected`: from its whole runs on the
validation and confirmation traces), and its real KL on held-out traces, which nothing depended on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.errors import InfeasibleError
from puzzle_jax.search.context import Search
from puzzle_jax.search.recipe import Recipe, SpaceSettings, TraceSettings
from puzzle_jax.search.refine.expected import expected_of_child
from puzzle_jax.settings.files import RECIPES

CONSOLE = Console(width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="directories of finished searches")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.1, 1.2, 1.3, 1.4, 1.5])
    parser.add_argument("--json", type=Path, help="file for all children")
    options = parser.parse_args()
    enable_compilation_cache()
    rows: list[dict[str, Any]] = []
    for run in options.runs:
        with tempfile.TemporaryDirectory() as kept:
            rows += of_run(run, options.speeds, Path(kept))
    table = Table("search", "speed", "predicted", "expected", "held-out", "held-out/predicted", "held-out/expected")
    for row in rows:
        real, ways = row["heldout"], (row["predicted"], row["expected"]["kl"])
        expected = "{kl:.4f} ±{kl_se:.4f}".format(**row["expected"])
        told = [f"{row['predicted']:.4f}", expected, f"{real['kl']:.4f} ±{real['kl_se']:.4f}"]
        table.add_row(row["run"], f"{row['speed']:g}x", *told, *(f"{real['kl'] / way:.2f}" for way in ways))
    CONSOLE.print(table)
    for name, way in (("predicted", lambda row: row["predicted"]), ("expected", lambda row: row["expected"]["kl"])):
        ratios = [row["heldout"]["kl"] / way(row) for row in rows]
        off = median(abs(ratio - 1) for ratio in ratios)
        CONSOLE.print(
            f"held-out over {name} KL of {len(rows)} chosen children: median {median(ratios):.2f}, "
            f"off by {off:.0%} in the median"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def of_run(run: Path, speeds: list[float], kept: Path) -> list[dict[str, Any]]:
    """The child chosen at every speed that can be reached, with its three KLs."""
    given = yaml.safe_load((RECIPES / "tiny.yaml").read_text())
    rows = []
    for speed in speeds:
        recipe = Recipe(
            scenario=Scenario(**given["scenario"]),
            target=Target(min_speedup=speed),
            traces=TraceSettings(**{**given["traces"], "tasks": tuple(given["traces"]["tasks"])}),
            space=SpaceSettings(windows=tuple(given["space"]["windows"])),
            run=run,
        )
        search = Search(recipe, CONSOLE)
        evaluator = search.evaluator(kept)
        try:
            pool = search.pool(search.problem(), evaluator)
        except InfeasibleError:
            break
        child = pool.candidates[pool.best]
        whole = {name: search.measure([child], name, evaluator) for name in ("validation", "confirmation", "heldout")}
        luck = max(0.0, float(pool.expected[pool.best]) - pool.scores[pool.best].kl)
        one, other = ((whole[name].kl[0], whole[name].tokens) for name in ("validation", "confirmation"))
        expected = expected_of_child(luck, one, other)
        heldout = whole["heldout"].scores[0]
        rows.append(
            {
                "run": str(run),
                "speed": speed,
                "predicted": child.score,
                "measured": pool.scores[pool.best].kl,
                "expected": expected,
                "heldout": {"kl": heldout.kl, "kl_se": heldout.kl_se},
            }
        )
    return rows


if __name__ == "__main__":
    main()
