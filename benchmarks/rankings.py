"""Every ranking rule's children beside each other: exact KL and accuracy after cutting a quarter and a half of experts.

    python benchmarks/rankings.py [--recipe tiny] [--seeds 0 1 2] [--problems 40] [--json FILE]

For each seed the parent answers its calibration and held-out questions, one pass over the calibration traces scores the
experts by every rule (`puzzle_jax.search.rank.rules`), and every rule makes four children, all with the parent's
windows:

    uniform  each layer keeps the same share of its experts, the best by the rule
    free     the integer program chooses each layer's count under the same limit on expert bytes, from exact scores of
             the rule's sets on calibration traces

KL(parent || child) is measured on held-out traces, accuracy on other problems, answered greedily at every effort. The
row "best of all" takes every layer's sets from whichever rule scores best, as a search does with `rank.rules`; "random"
is the mean of one draw per seed. The table of docs/rankings.md is what this prints; a child is trained nowhere here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.costs.scenario import Target
from puzzle_jax.model.child import Child, ChildBlock
from puzzle_jax.search.__main__ import SEARCH
from puzzle_jax.search.artifacts import RANKING
from puzzle_jax.search.context import Search
from puzzle_jax.search.pipeline import run_stages
from puzzle_jax.search.rank.ranking import Ranking, ranked_space
from puzzle_jax.search.rank.rules import RULES
from puzzle_jax.search.recipe import EvaluateSettings, Recipe, SpaceSettings
from puzzle_jax.search.score.adaptive import in_random_order
from puzzle_jax.search.score.alternatives import IndexedAlternatives
from puzzle_jax.search.score.measurements import Fill, ScoreTable
from puzzle_jax.search.solve.baselines import uniform
from puzzle_jax.search.solve.problem import Problem, Scores
from puzzle_jax.search.space import Space
from puzzle_jax.settings import verbs

CONSOLE = Console(width=140)

CUTS = {"25%": 0.75, "50%": 0.5}
"""Share of the experts that stays, by the cut's name."""

BEST = "best of all"

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", help="a search's recipe: its parent, traces and scenario are used")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--problems", type=int, default=40, help="problems per task, asked at every effort")
    parser.add_argument("--scored", type=int, default=96, help="calibration traces of the exact scores")
    parser.add_argument("--json", type=Path, help="file for the results of every seed")
    options = parser.parse_args()
    enable_compilation_cache()
    found = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as run:
            found.append(_of_seed(options.recipe, seed, options.problems, options.scored, Path(run)))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    CONSOLE.print(f"{options.recipe}: {len(found)} seeds")
    print(table(found))


def _of_seed(name: str, seed: int, problems: int, scored: int, run: Path) -> Row:
    """KL and accuracy of every rule's children with the traces and problems of one seed."""
    given = verbs.parse(SEARCH, ["--recipe", name])
    recipe = Recipe(
        parent=given.parent,
        run=run,
        scenario=given.scenario,
        target=Target(max_expert_bytes_ratio=1.0),
        traces=replace(given.traces, seed=seed, validation=1, confirmation=1),
        space=SpaceSettings(fractions=(1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25), windows=()),
        evaluate=EvaluateSettings(problems=problems, seed=seed),
        costs="roofline",
    )
    search = Search(recipe, CONSOLE)
    for stage in ("cost", "trace", "rank", "refine_costs"):
        run_stages(search, stage)
    ranking = RANKING.read(run)
    children = {("parent", "", ""): search.child(_problem(search, ranking, tuple(RULES), None).parent())}
    children |= _uniform(search, ranking) | _free(search, ranking, scored)
    distinct: dict[Any, Child] = {child.blocks: child for child in children.values()}
    evaluator, ways = search.evaluator(run / "kept"), list(distinct.values())
    kl = evaluator.divergence(ways, search.traces("heldout"), "heldout").scores
    right = evaluator.accuracy({str(number): child for number, child in enumerate(ways)})
    number_of = {blocks: number for number, blocks in enumerate(distinct)}

    def measured(child: Child) -> Row:
        number = number_of[child.blocks]
        efforts = right[str(number)]["efforts"].values()
        return {
            "kl": kl[number].kl,
            "accuracy": float(np.mean([effort["accuracy"] for effort in efforts])),
            "experts": [len(block.kept) for block in child.blocks],
        }

    return {"seed": seed, "children": {" / ".join(key): measured(child) for key, child in children.items()}}


def _uniform(search: Search, ranking: Ranking) -> dict[tuple[str, str, str], Child]:
    config = search.parent.config
    return {
        (rule, "uniform", cut): Child(
            config,
            tuple(
                ChildBlock(ranking.keep(rule, layer, round(share * block.num_experts)), block.window)
                for layer, block in enumerate(config.blocks)
            ),
        )
        for rule in RULES
        for cut, share in CUTS.items()
    }


def _free(search: Search, ranking: Ranking, scored: int) -> dict[tuple[str, str, str], Child]:
    """Every rule's children with free counts, and the best of all rules' sets, uniform and free."""
    everything = _space(search, ranking, tuple(RULES))
    indexed = IndexedAlternatives.around(everything)
    table = ScoreTable.empty(indexed.listed, search.traces("calibration"))
    order = in_random_order(search.traces("calibration"), search.recipe.traces.seed)[:scored]
    run = search.scorer().run
    Fill(table, run, range(len(indexed.listed)), order)()
    scores = {
        (layer, choice.kept): 0.0 if number is None else table.means()[number]
        for layer, (choices, numbers) in enumerate(zip(everything.expert_choices, indexed.experts, strict=True))
        for choice, number in zip(choices, numbers, strict=True)
    }
    children = {}
    for name, rules in {**{rule: (rule,) for rule in RULES}, BEST: tuple(RULES)}.items():
        for cut, share in CUTS.items():
            problem = _problem(search, ranking, rules, scores, share)
            children[name, "free", cut] = search.child(problem.solve()[0])
            if name == BEST:
                children[name, "uniform", cut] = search.child(uniform(problem))
    return children


def _space(search: Search, ranking: Ranking, rules: Sequence[str]) -> Space:
    config = search.parent.config
    return ranked_space(config, search.counts, tuple((block.window,) for block in config.blocks), ranking, rules)


def _problem(
    search: Search,
    ranking: Ranking,
    rules: Sequence[str],
    scores: Mapping[tuple[int, tuple[int, ...]], float] | None,
    share: float = 1.0,
) -> Problem:
    space = _space(search, ranking, rules)
    known = scores or {}
    experts = tuple(
        tuple(known.get((layer, choice.kept), 0.0) for choice in choices)
        for layer, choices in enumerate(space.expert_choices)
    )
    attention = tuple((0.0,) for _ in space.windows)
    problem = search.problem_of(space, Scores(experts, attention))
    # Routers are cut with their experts, so a share of the experts is the same share of the bytes.
    return replace(problem, target=Target(max_expert_bytes_ratio=share))


def table(found: Sequence[Row]) -> str:
    """The results as Markdown: mean KL over seeds, and accuracy in percent."""
    columns = [(form, cut) for form in ("uniform", "free") for cut in CUTS]
    heads = [f"{what}, {form} {cut}" for what in ("KL", "accuracy") for form, cut in columns]
    lines = ["| rule | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]

    def mean(key: str, what: str) -> float:
        return float(np.mean([of_seed["children"][key][what] for of_seed in found]))

    lines.append(f"| parent | | | | | {100 * mean('parent /  / ', 'accuracy'):.1f} | | | |")
    for name in sorted((*RULES, BEST), key=lambda name: mean(f"{name} / free / 50%", "kl")):
        keys = [f"{name} / {form} / {cut}" for form, cut in columns]
        cells = [f"{mean(key, 'kl'):.3f}" for key in keys] + [f"{100 * mean(key, 'accuracy'):.1f}" for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
