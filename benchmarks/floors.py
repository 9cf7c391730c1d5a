"""Floors for a search: what becomes of a task that the traces hardly have, without limits on its KL and with them.

    python benchmarks/floors.py --run RUN/search [--task recall] [--share 0.1] [--seeds 0 1 2] [--max_kl JSON]

From the traces of a finished search of the embedded parent (RUN/search) all but a tenth of those of one task are left
out, and two searches with the same target and costs start from what is left: without floors, and with `max_kl`. Both
children are then compared with the parent on the finished run's held-out traces, on which all tasks are complete, and
by greedy answers to fresh problems. A seed draws the traces that stay and splits them into sets.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.errors import InfeasibleError
from puzzle_jax.generate.traces import Trace, read_traces, write_traces
from puzzle_jax.model.child import identity_child
from puzzle_jax.search.__main__ import SEARCH
from puzzle_jax.search.artifacts import TRACES, final_candidates
from puzzle_jax.search.context import Search
from puzzle_jax.search.evaluator import kl_by_group
from puzzle_jax.search.pipeline import run_stages
from puzzle_jax.search.solve.frontier import speedup
from puzzle_jax.settings import verbs

STAGES = ("cost", "trace", "rank", "refine_costs", "score", "solve", "refine")
SCORE_TABLES = "*-book.safetensors"


def main() -> None:
    options = parse()
    enable_compilation_cache()
    console = Console(width=150)
    rows = []
    for seed in options.seeds:
        file = options.out / f"seed-{seed}" / "traces.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_traces(file, neglected(options.run, options.task, options.share, seed))
        plain, floors = (file.parent / name for name in ("plain", "floors"))
        rows.append({"seed": seed, "child": measure(plain, file, seed, {}, options, console)})
        if not floors.exists():  # ranking and scores, which floors do not change, need not be computed again
            shutil.copytree(plain, floors)
        try:
            rows[-1]["child with floors"] = measure(floors, file, seed, {"max_kl": options.max_kl}, options, console)
            rows[-1]["child with floors"].pop("parent")
        except InfeasibleError as error:
            rows[-1]["infeasible"] = str(error)
        rows[-1]["parent"] = rows[-1]["child"].pop("parent")
        show(rows[-1], console)
        if options.json:
            options.json.write_text(json.dumps({"max_kl": options.max_kl, "rows": rows}, indent=1) + "\n")


def neglected(run: Path, task: str, share: float, seed: int) -> list[Trace]:
    """All traces of a finished search but those held out, with only a share of one task's problems at every effort."""
    source = np.random.default_rng(seed)
    found: list[Trace] = []
    for name in ("calibration", "validation", "confirmation"):
        traces = TRACES[name].read(run)
        found += [trace for trace in traces if trace.task != task]
        for effort in dict.fromkeys(trace.effort for trace in traces):
            of_task = [trace for trace in traces if (trace.task, trace.effort) == (task, effort)]
            kept = source.permutation(len(of_task))[: max(1, round(share * len(of_task)))]
            found += [of_task[int(number)] for number in kept]
    return found


def measure(
    run: Path, file: Path, seed: int, max_kl: dict[str, Any], options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Searches, and returns what the table shows of the child, and of the parent beside it."""
    target = {"max_expert_bytes_ratio": options.max_expert_bytes_ratio, "min_speedup": options.min_speedup, **max_kl}
    given = {
        "run": run,
        "costs": options.costs,
        "traces.file": file,
        "traces.seed": seed,
        "traces.heldout": 4,
        "target": json.dumps(target),
        "refine.swaps": options.swaps,
        "space.restrict": json.dumps(options.restrict),
        "evaluate.problems": options.problems,
    }
    recipe = verbs.parse(SEARCH, [word for name, value in given.items() for word in (f"--{name}", str(value))])
    search = Search(recipe, console)
    for stage in STAGES:
        run_stages(search, stage)
    candidate = final_candidates(search.run)["child"]
    heldout = read_traces(options.run / "traces" / "heldout.parquet")
    children = {"parent": identity_child(search.parent.config), "child": search.child(candidate)}
    with TemporaryDirectory() as kept:
        evaluator = search.evaluator(Path(kept))
        found = evaluator.divergence(list(children.values()), heldout, "of the finished run")
        accuracy = evaluator.accuracy(children)
    of_child = {"speedup": speedup(search.problem(), candidate), "violated": list(candidate.violated)}
    about = {"parent": {"speedup": 1.0, "violated": []}, "child": of_child}
    told = {
        name: {
            **about[name],
            "kl": {"all": {"kl": score.kl, "kl_se": score.kl_se}, **kl_by_group(kl, heldout)["tasks"]},
            "accuracy": {task: summary["accuracy"] for task, summary in accuracy[name]["tasks"].items()},
            "answers": {task: summary["answers"] for task, summary in accuracy[name]["tasks"].items()},
        }
        for name, score, kl in zip(children, found.scores, found.kl, strict=True)
    }
    return {**told["child"], "layers": candidate.to_json()["layers"], "parent": told["parent"]}


def show(row: dict[str, Any], console: Console) -> None:
    models = [name for name in ("parent", "child", "child with floors") if name in row]
    table = Table(f"seed {row['seed']}", *models)
    for name in row["child"]["kl"]:
        cells = ["{kl:.4f} ±{kl_se:.4f}".format(**row[model]["kl"][name]) for model in models]
        table.add_row(f"held-out KL, {name}", *cells)
    for task in row["child"]["accuracy"]:
        table.add_row(f"accuracy, {task}", *(f"{row[model]['accuracy'][task]:.1%}" for model in models))
    table.add_row("predicted speed", *(f"{row[model]['speedup']:.3f}x" for model in models))
    console.print(table)
    for sentence in row["child with floors"]["violated"] if "child with floors" in row else [row["infeasible"]]:
        console.print(sentence, highlight=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory of a finished search")
    parser.add_argument("--task", default="recall", help="the task that the traces hardly have")
    parser.add_argument("--share", type=float, default=0.1, help="of that task's traces that stay")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--min_speedup", type=float, default=1.3)
    parser.add_argument("--max_expert_bytes_ratio", type=float, help="none by default")
    parser.add_argument("--costs", default="roofline", help="as a search takes them")
    parser.add_argument("--restrict", type=json.loads, default=[], help="space.restrict, as JSON")
    parser.add_argument("--max_kl", type=json.loads, default={"times_mean": {"tasks": 1.5}}, help="floors, as JSON")
    parser.add_argument("--swaps", type=int, default=3, help="of experts, in refinement")
    parser.add_argument("--problems", type=int, default=100, help="per task, asked at every effort")
    parser.add_argument("--out", type=Path, default=Path("runs/floors"))
    parser.add_argument("--json", type=Path, help="where to write everything")
    return parser.parse_args()


if __name__ == "__main__":
    main()
