"""Held-out KL of children that refinement finds from the integer program's, at about equal work.

    python benchmarks/refinement.py SEARCH [SEARCH ...] [--ratios 0.75 0.5 0.4] [--methods NAME ...] [--json PATH]

Each SEARCH is the directory of a finished search of the embedded parent, whose traces, ranking, scores and costs are
used; all are only read. Ratios are bytes of experts relative to the parent's; windows stay the parent's, so that a
method with one budget can take part. Methods:

    program   the integer program's child, from which all differences are taken
    swaps     single swaps of experts by exact scores (`search.refine.proposals`), until one is refused
    guided    the same, but experts to swap are proposed by gradients, around the child before each proposal
    rco       RCO as published (arXiv 2605.00649), from uniform logits
    pool      the best of the program's N best solutions on validation traces

Work is counted in forward passes of one trace: a backward pass counts as two, a pass through the top layers as their
share; the parent's own passes, which can be kept, are left out. N of the pool is such that its
work is RCO's: 300 steps of 4 samples of 4 traces, three forward passes each. Swaps end when they are refused, and then
begin again with twice as many experts on either side if less than half of that work is done. RCO may keep any number
of experts of at least k in a layer (`rco.py`); the others keep those that the search offers.

Left out: rounds of rescoring, and training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rco import WORK, Keep, rco
from rich.console import Console
from rich.table import Table

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.consoles import plain_console
from puzzle_jax.costs.scenario import Target
from puzzle_jax.evaluate.models import Model
from puzzle_jax.generate.batches import MicroBatch
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.child import Child, ChildBlock
from puzzle_jax.search.artifacts import RANKING, REFINED_COSTS, SCORES, TRACES
from puzzle_jax.search.parent import read_parent
from puzzle_jax.search.recipe import EMBEDDED_PARENT, TRACE_SETS, ScoreSettings
from puzzle_jax.search.refine.accept import Difference, Pool, refine
from puzzle_jax.search.refine.expert_values import MOST_TRACES, ExpertValues
from puzzle_jax.search.refine.gradients import FORWARDS
from puzzle_jax.search.refine.proposals import Refinement
from puzzle_jax.search.score.replace_one import ReplaceOne, child_choices
from puzzle_jax.search.score.scores_file import scores_from_json
from puzzle_jax.search.score.space_scorer import SpaceScorer
from puzzle_jax.search.score.whole_children import Measurements, score_children
from puzzle_jax.search.solve.problem import Candidate, Problem, Scores
from puzzle_jax.search.space import Space

METHODS = ("swaps", "guided", "rco", "pool")


@dataclass
class Work:
    """Forward passes of one trace so far."""

    passes: float = 0.0


@dataclass(frozen=True)
class Counted(ReplaceOne):
    """Replace-one passes whose work is counted."""

    work_done: Work = field(default_factory=Work)

    def __call__(self, batch: MicroBatch, wanted: Any, on_done: Any = None) -> Float[np.ndarray, "alternatives rows _"]:
        self.work_done.passes += (batch.ids >= 0).sum() * self.work(wanted) / self.config.num_layers
        return super().__call__(batch, wanted, on_done)


@dataclass(frozen=True)
class Case:
    """One search's files and one limit."""

    directory: Path
    ratio: float
    parent: Model
    work: Work = field(default_factory=Work)
    known: dict[Any, Measurements] = field(default_factory=dict)

    @cached_property
    def files(self) -> tuple[Space, Scores]:
        layers = SCORES.read(self.directory)["layers"]
        space, scores = Space.from_json(self.parent.config, layers), scores_from_json(layers)
        own = replace(space, windows=tuple(windows[:1] for windows in space.windows))
        return own, Scores(scores.experts, tuple(of_layer[:1] for of_layer in scores.attention))

    def problem(self, space: Space, scores: Scores) -> Problem:
        return Problem(space, scores, self.costs, Target(max_expert_bytes_ratio=self.ratio))

    @cached_property
    def costs(self) -> Any:
        return REFINED_COSTS.read(self.directory)

    @cached_property
    def traces(self) -> dict[str, Sequence[Trace]]:
        return {name: TRACES[name].read(self.directory) for name in TRACE_SETS}

    def child(self, kept: Sequence[Sequence[int]]) -> Child:
        blocks = zip(kept, self.parent.config.blocks, strict=True)
        return Child(self.parent.config, tuple(ChildBlock(tuple(own), block.window) for own, block in blocks))

    def measure(self, candidates: Sequence[Candidate], traces: Sequence[Trace]) -> Measurements:
        self.work.passes += len(candidates) * len(traces)
        children = [self.child(candidate.kept) for candidate in candidates]
        return score_children(self.parent.params, self.parent.config, children, traces)

    def heldout(self, kept: Sequence[Sequence[int]]) -> Measurements:
        return score_children(self.parent.params, self.parent.config, [self.child(kept)], self.traces["heldout"])

    def runner(self, candidate: Candidate) -> Counted:
        choices = child_choices(self.child(candidate.kept))
        return Counted(self.parent.params, self.parent.config, choices, work_done=self.work)

    # Methods -------------------------------------------------------------------------------------------------------

    def program(self) -> Candidate:
        return self.problem(*self.files).solve()[0]

    def pool(self, solutions: int) -> Candidate:
        found = self.problem(*self.files).solve(num_solutions=solutions)
        return found[Pool(found, *self.measure(found, self.traces["validation"])).best]

    def swaps(self, child: Candidate, scratch: Path, guide: ExpertValues | None = None) -> Candidate:
        def values(around: Candidate) -> Float[np.ndarray, "layers experts"]:
            assert guide is not None
            self.work.passes += FORWARDS * min(MOST_TRACES, len(guide.traces))
            return guide(around)

        def scorer(around: Candidate) -> SpaceScorer:
            run, traces = self.runner(around), self.traces["calibration"]
            return SpaceScorer(run, traces, ScoreSettings(), self.problem, plain_console(width=80), 0, around.score)

        for swaps in (4, 8):
            found = Refinement(
                space=self.files[0],
                removal_error=RANKING.read(self.directory).scores["removal_error"],
                swaps=swaps,
                scorer=scorer,
                pool=_unasked,
                measure=lambda candidates, name: self.measure(candidates, self.traces[name]),
                table=scratch / "table",
                kept=scratch,
                identity="swaps",
                values=None if guide is None else values,
            )
            child, _ = refine(child, 0, _unasked, 16, found.swapped, found.confirm)
            if self.work.passes >= WORK / 2:
                break
        return child

    def guided(self, child: Candidate, scratch: Path, seed: int) -> Candidate:
        guide = ExpertValues(self.files[0], self.problem, self.runner, self.traces["calibration"], seed=seed)
        return self.swaps(child, scratch, guide)

    def rco(self, budget: int, seed: int) -> Keep:
        self.work.passes += WORK
        return rco(self.parent.params, self.parent.config, self.traces["calibration"], budget, seed)


def _unasked(*_: Any) -> Any:
    raise AssertionError("no rescoring was asked for")


# The comparison -------------------------------------------------------------------------------------------------------


def compare(case: Case, seed: int, names: Sequence[str] = METHODS) -> dict[str, Any]:
    """Each method's held-out KL, difference from the program's child, work and seconds."""
    start, found = case.program(), {}
    keep = np.zeros((case.parent.config.num_layers, case.parent.config.blocks[0].num_experts), bool)
    for layer, kept in enumerate(start.kept):
        keep[layer, list(kept)] = True
    kept_of: Any = lambda mask: [np.flatnonzero(row).tolist() for row in mask]  # noqa: E731
    base = case.heldout(start.kept)

    with tempfile.TemporaryDirectory() as scratch:
        methods: dict[str, Callable[[], Any]] = {
            "program": lambda: start.kept,
            "swaps": lambda: case.swaps(start, Path(scratch)).kept,
            "rco": lambda: kept_of(case.rco(int(keep.sum()), seed)),
            "guided": lambda: case.guided(start, Path(scratch) / "guided", seed).kept,
            "pool": lambda: case.pool(WORK // len(case.traces["validation"])).kept,
        }
        for name in ("program", *names):
            method = methods[name]
            case.work.passes, began = 0.0, time.monotonic()
            kept = method()
            seconds, work = time.monotonic() - began, case.work.passes
            measured = case.heldout(kept)
            difference = Difference.between(measured.kl[0], base.kl[0], base.tokens)
            found[name] = {
                "kl": measured.scores[0].kl,
                "kl_se": measured.scores[0].kl_se,
                "difference": difference.mean,
                "difference_se": difference.se,
                "work": work,
                "seconds": seconds,
                "kept": [list(of_layer) for of_layer in kept],
                "by_trace": [round(float(value), 6) for value in measured.kl[0]],
            }
            shown = ("kl", "difference", "difference_se", "work", "seconds")
            print(case.directory, case.ratio, name, *(f"{what} {found[name][what]:.4g}" for what in shown), flush=True)
    return found


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    names = ["program", *(name for name in METHODS if any(name in row["methods"] for row in rows))]
    table = Table("ratio", "search", *names)
    for row in rows:
        cells = [
            f"{m['kl']:.3f} ({m['difference']:+.3f} ±{m['difference_se']:.3f})" if m else "-"
            for m in map(row["methods"].get, names)
        ]
        table.add_row(f"{row['ratio']:g}", row["search"], *cells)
    for what in ("work", "seconds"):
        means = [np.mean([row["methods"][name][what] for row in rows if name in row["methods"]]) for name in names]
        table.add_row(what, "mean", *(f"{mean:,.0f}" for mean in means))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searches", nargs="+", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.5, 0.4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME")
    parser.add_argument("--json", type=Path, help="where to write everything; rows that it holds are not run again")
    options = parser.parse_args()
    enable_compilation_cache()
    rows = json.loads(options.json.read_text()) if options.json and options.json.is_file() else []
    known, parent = {(row["search"], row["ratio"]) for row in rows}, read_parent(EMBEDDED_PARENT)
    for seed, directory in enumerate(options.searches):
        for ratio in options.ratios:
            if (str(directory), ratio) in known:
                continue
            methods = compare(Case(directory, ratio, parent), seed, options.methods)
            rows.append({"ratio": ratio, "search": str(directory), "methods": methods})
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    show(sorted(rows, key=lambda row: (-row["ratio"], row["search"])), Console(width=150))


if __name__ == "__main__":
    main()
