"""Training a child's routers alone, alone at first, and with everything else, for equally many steps.

    python benchmarks/router_first.py --child RUN/search/child --traces RUN/traces --out DIR [--steps 200]

Router KD (arXiv 2603.02217) trains nothing but the routers of a model whose experts were removed. Here a child of the
embedded parent is distilled on the same answers in three ways: everything that `run-tiny` trains for all steps; routers
alone for half of the steps and then everything for the other half; and routers alone for all steps. KL is on held-out
answers, accuracy on problems that nothing else uses, answered greedily. Finished runs in DIR are not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions
from puzzle_jax.evaluate.models import Model
from puzzle_jax.evaluate.statistics import by_effort
from puzzle_jax.search.recipe import EMBEDDED_PARENT
from puzzle_jax.train.distill.objectives import LossSettings
from puzzle_jax.train.distill.recipe import DistillRecipe
from puzzle_jax.train.distill.run import distill
from puzzle_jax.train.loop import LoopSettings
from puzzle_jax.train.optimizer import OptimizerSettings
from puzzle_jax.train.traces.settings import DataSettings

EFFORTS = ("low", "medium", "high")
LIMITS = {"low": 32, "medium": 64, "high": 128}
WHOLE = ("router", "experts")
RATE = 0.002


def main() -> None:
    options = parse()
    enable_compilation_cache()
    console = Console(width=150)
    half, rows = options.steps // 2, []

    def trained(name: str, child: Path, steps: int, routers_alone: bool) -> Path:
        """Trains a child, unless that is done, and adds its row; returns the trained child."""
        out = options.out / name
        recipe = DistillRecipe(
            parent=EMBEDDED_PARENT,
            child=child,
            traces=options.traces,
            out=out,
            train=("router",) if routers_alone else WHOLE,
            dense=not routers_alone,
            remat=False,
            data=DataSettings(heldout=256),
            loss=LossSettings(vocab_chunk=128),
            optimizer=OptimizerSettings(learning_rate=RATE, warmup_steps=steps // 10, final_fraction=0.05),
            loop=LoopSettings(steps=steps, evaluate_every=steps, save_every=steps),
        )
        distill(recipe, console)
        found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        measured = {line["step"]: line["evaluation/kl"] for line in found if "evaluation/kl" in line}
        seconds = found[-1]["seconds_per_step"]
        rows.append((name, measured[0], measured[steps], seconds, accuracy(out / "child", options.problems)))
        console.print(rows[-1], highlight=False)
        return out / "child"

    trained("everything", options.child, options.steps, False)
    routed = trained("routers first", options.child, half, True)
    trained("then everything", routed, half, False)
    trained("routers", options.child, options.steps, True)
    cut = accuracy(options.child, options.problems)
    table = Table("", "KL before", "KL after", "s per step", *EFFORTS)
    table.add_row("parent", "", "", "", *accuracy(EMBEDDED_PARENT, options.problems))
    table.add_row("cut", "", f"{rows[0][1]:.4f}", "", *cut)
    for name, before, after, seconds, right in rows:
        table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{seconds:.2f}", *right)
    console.print(table)


def accuracy(directory: Path, problems: int) -> list[str]:
    """A model's greedy accuracy at every effort."""
    model = Model.open("model", directory)
    questions = QuestionSet(("chain", "add", "recall"), EFFORTS, problems, "evaluation", 0)
    answers = answer_questions(model.params, model.config, model.chat, questions, max_tokens=LIMITS)
    return [f"{found.accuracy:.3f} ±{found.accuracy_se:.3f}" for found in by_effort(answers, EFFORTS).values()]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", type=Path, required=True, help="a search's child of the embedded parent")
    parser.add_argument("--traces", type=Path, required=True, help="the parent's answers")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--problems", type=int, default=100, help="problems of each task, asked at every effort")
    return parser.parse_args()


if __name__ == "__main__":
    main()
