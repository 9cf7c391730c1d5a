"""Weights of the tokens with which thinking ends: the children that searches choose with and without them.

    python benchmarks/ending.py RUN/search [RUN/search ...] [--weights 1 8] [--tokens 8] [--json FILE]

From the traces, rankings and costs of finished searches of the embedded parent, the stages score, solve and refine run
again for each `score.ending_weight`. The children, none of them trained, are compared with the parent by KL on held-out
traces, in which all tokens count alike, and by greedy answers to fresh problems: accuracy, share of answers that ended
by themselves, and tokens over the parent's, the latter two with paired 95% intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.generate.traces import write_traces
from puzzle_jax.model.child import identity_child
from puzzle_jax.search.__main__ import SEARCH
from puzzle_jax.search.artifacts import TRACES, final_candidates
from puzzle_jax.search.context import Search
from puzzle_jax.search.pipeline import run_stages
from puzzle_jax.search.recipe import TRACE_SETS
from puzzle_jax.settings import verbs

CONSOLE = Console(width=150)
STAGES = ("cost", "trace", "rank", "refine_costs", "score", "solve", "refine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="directories of finished searches")
    parser.add_argument("--weights", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=8, help="last tokens of the analysis that belong to its ending")
    parser.add_argument("--min_speedup", type=float, default=1.5)
    parser.add_argument("--problems", type=int, default=100, help="per task, asked at every effort")
    parser.add_argument("--json", type=Path, help="file for all children")
    options = parser.parse_args()
    enable_compilation_cache()
    rows = []
    for run in options.runs:
        with TemporaryDirectory() as directory:
            for weight in options.weights:
                rows.append({"run": str(run), "weight": weight, **child_of(run, weight, Path(directory), options)})
    table = Table("search", "weight", "held-out KL", "accuracy", "ended by itself", "tokens over the parent's")
    for row in rows:
        efforts = row["efforts"].values()
        cells = [", ".join(form(effort) for effort in efforts) for form in (_accuracy, _ended, _tokens)]
        table.add_row(row["run"], str(row["weight"]), "{kl:.4f} ±{kl_se:.4f}".format(**row["heldout"]), *cells)
    CONSOLE.print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def child_of(run: Path, weight: int, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Searches from the traces of a finished search, and returns the child's layers and measurements."""
    file = directory / "traces.parquet"
    out = directory / f"weight-{weight}"
    if not file.exists():
        _gather(run, file)
    given = {
        "run": out,
        "costs": run / "cost" / "costs.json",
        "traces.file": file,
        "traces.seed": 0,
        "target": json.dumps({"min_speedup": options.min_speedup}),
        "refine.swaps": 3,
        "space.restrict": json.dumps([{"layers": "5", "windows": ["full"]}]),
        "score.ending_weight": weight,
        "score.ending_tokens": options.tokens,
        "evaluate.problems": options.problems,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    search = Search(verbs.parse(SEARCH, words), CONSOLE)
    for stage in STAGES:
        run_stages(search, stage)
    child = search.child(final_candidates(out)["child"])
    evaluator = search.evaluator(out / "kept")
    heldout = evaluator.divergence([child], search.traces("heldout"), "heldout").scores[0]
    found = evaluator.accuracy({"parent": identity_child(search.parent.config), "child": child})["child"]
    efforts = {effort: {**found["efforts"][effort], **found["compared"][effort]} for effort in found["compared"]}
    layers = [[block.num_experts, block.window] for block in child.viewed.blocks]
    return {"layers": layers, "heldout": {"kl": heldout.kl, "kl_se": heldout.kl_se}, "efforts": efforts}


def _gather(run: Path, file: Path) -> None:
    """Writes all traces of a finished search into one file."""
    write_traces(file, [trace for name in TRACE_SETS for trace in TRACES[name].read(run)])


def _accuracy(effort: dict[str, Any]) -> str:
    return f"{effort['accuracy']:.1%}"


def _ended(effort: dict[str, Any]) -> str:
    return f"{1 - effort['truncated']:.1%}"


def _tokens(effort: dict[str, Any]) -> str:
    ratio = effort["tokens"]
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


if __name__ == "__main__":
    main()
