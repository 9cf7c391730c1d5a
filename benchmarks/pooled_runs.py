"""The final table of `puzzle run`, pooled over several runs that differ in their seeds.

    python benchmarks/pooled_runs.py RUN [RUN ...] [--models NAME,NAME] [--greedy] [--json PATH]

A run's seed also draws its problems, so answers of several runs can be pooled: accuracies, intervals, tokens and curves
are computed as `puzzle evaluate` does, on the problems of all runs, and speeds on the rounds of all runs. With
`--greedy`, the parent, the control and the final child also answer each run's problems greedily (only once; the answers
are kept in RUN/greedy), for a second table. Two more tables show the share of answers that check a step (a policy for
length can omit such checks), for models with the embedded parent's chat, and each run's speeds in its scenarios.

Not measured: anything that the runs did not; speeds of different machines are pooled as if they were one.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.evaluate.__main__ import VERBS
from puzzle_jax.evaluate.comparison import analyse
from puzzle_jax.evaluate.run import Evaluation
from puzzle_jax.evaluate.settings import Settings
from puzzle_jax.evaluate.throughput import Spread
from puzzle_jax.files import read_object
from puzzle_jax.generate.traces import Trace, read_traces
from puzzle_jax.report.comparison import ComparisonTable
from puzzle_jax.report.tables import Section
from puzzle_jax.run.page import COLUMNS
from puzzle_jax.run.places import FINAL, STAGE_SETTINGS
from puzzle_jax.settings.verbs import parse
from puzzle_jax.tasks import Chat
from puzzle_jax.tasks.chat.embedded import is_embedded
from puzzle_jax.train.pretrain.habits import CHECK

GREEDY = ("parent", FINAL, "control")

Answers = Mapping[str, Sequence[Trace]]


def main() -> None:
    options = arguments()
    enable_compilation_cache()
    console, runs = Console(width=150), options.runs
    found = {"sampled": pooled([run / "evaluate" for run in runs], options.models)}
    if options.greedy:
        found["greedy"] = pooled([greedy(run, console) for run in runs], [n for n in options.models if n in GREEDY])
    for name, evaluation in found.items():
        table = ComparisonTable(evaluation, options.models)
        console.print(table.section(f"{name}, {len(runs)} runs").table())
        for model in evaluation["comparisons"]:
            console.print(table.verdict(model), highlight=False)
        console.print(table.section(name).markdown(), highlight=False, soft_wrap=True)
    for section in (checks(runs, options.models), scenarios(runs)):
        console.print(section.table())
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(COLUMNS), metavar="NAME,NAME")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def pooled(evaluations: Sequence[Path], models: Sequence[str]) -> dict[str, Any]:
    """Content of an evaluation.json that pools all evaluations, for those of `models` that all of them have."""
    contents = [read_object(path / "evaluation.json") for path in evaluations]
    names = [name for name in contents[0]["models"] if name in models and all(name in c["models"] for c in contents)]
    efforts = list(contents[0]["summaries"][names[0]])
    answers = {name: [trace for path in evaluations for trace in ordered(path, name)] for name in names}
    if len({(t.task, t.problem_seed, t.effort) for t in answers[names[0]]}) < len(answers[names[0]]):
        raise SystemExit("Some of these runs asked the same problems; give runs of different seeds.")
    rates = None
    if all(content["throughput"] for content in contents):
        rounds = [by_workload(path) for path in evaluations]
        rates = {e: {name: [rate for of in rounds for rate in of[e][name]] for name in names} for e in efforts}
    draws = contents[0]["settings"]["bootstrap"]
    return {
        "reference": names[0],
        "settings": contents[0]["settings"],
        **asdict(analyse(answers, efforts, rates, draws=draws, seed=0)),
        "throughput": rates
        and {
            "device": contents[0]["throughput"]["device"],
            "workloads": {
                effort: {name: {"tokens_per_second": asdict(Spread.of(of))} for name, of in by_model.items()}
                for effort, by_model in rates.items()
            },
        },
    }


def ordered(evaluation: Path, model: str) -> list[Trace]:
    """A model's answers, in the same order for all models."""
    answers = read_traces(evaluation / "answers" / f"{model}.jsonl")
    return sorted(answers, key=lambda trace: (trace.task, trace.problem_seed, trace.effort))


def by_workload(evaluation: Path) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of the rounds of an evaluation, by workload and model."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in (evaluation / "throughput.jsonl").read_text().splitlines():
        row = json.loads(line)
        for model, rate in row["tokens_per_second"].items():
            found[row["workload"]][model].append(rate)
    return found


def greedy(run: Path, console: Console) -> Path:
    """Asks what was not asked yet, and returns the directory of the evaluation."""
    settings = evaluation_settings(run)
    models = {name: path for name, path in settings.models.items() if name in GREEDY}
    kept = {name: dtype for name, dtype in settings.cache_dtypes.items() if name in models}
    out = run / "greedy"
    Evaluation(
        replace(settings, models=models, cache_dtypes=kept, temperature=0.0, throughput=False, out=out), console
    ).run()
    return out


def evaluation_settings(run: Path) -> Settings:
    """Settings of a run's last evaluation."""
    settings = parse(VERBS[""], ["--recipe", str(run / STAGE_SETTINGS / "evaluate.yaml")])
    assert isinstance(settings, Settings)
    return settings


def checks(runs: Sequence[Path], models: Sequence[str]) -> Section:
    """Shares of answers in which a step is checked, by model and effort."""
    rows: list[list[str]] = []
    settings = evaluation_settings(runs[0])
    chat = Chat.load(settings.models[settings.reference])
    for name in [name for name in models if name in settings.models and is_embedded(chat)]:
        traces = [trace for run in runs for trace in ordered(run / "evaluate", name)]
        by_effort = {e: [CHECK in chat.decode(t.completion) for t in traces if t.effort == e] for e in settings.efforts}
        rows.append([name, *(f"{sum(found) / len(found):.1%}" for found in by_effort.values())])
    return Section("Answers that check a step", ["", *settings.efforts], rows)


def scenarios(runs: Sequence[Path]) -> Section:
    """Tokens per second over the parent's in the scenarios of fixed lengths, by run."""

    def row(run: Path) -> Iterator[str]:
        throughput = read_object(run / "evaluate" / "evaluation.json")["throughput"]
        for name in throughput["scenarios"]:
            for model, entry in throughput["workloads"][name].items():
                yield f"{name}, {model}: {entry['relative']['median']:.2f}x"

    rows = [[str(run), "; ".join(row(run))] for run in runs]
    return Section("Tokens per second over the parent's", ["run", ""], rows)


if __name__ == "__main__":
    main()
