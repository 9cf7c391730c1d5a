"""The page of a run: its result in a sentence and a table, and how it came about. One file that opens offline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from puzzle_jax.files import Json, read_object
from puzzle_jax.report import search_figures
from puzzle_jax.report.comparison import ComparisonTable
from puzzle_jax.report.figures import frontier_figure
from puzzle_jax.report.html import render
from puzzle_jax.run.places import CHILD, FINAL
from puzzle_jax.run.road import Road
from puzzle_jax.search.artifacts import EVALUATION, REFINED, SOLUTIONS
from puzzle_jax.stages import STAGE_FILE, read_stage_record

REPORT = "report.html"

SHOWN = ("parent", FINAL, "control", "cut", "distilled")
"""Models that a terminal has room for."""

COLUMNS = (*SHOWN, "accuracy", "length", "average")
"""All models, those that matter most first."""


def write_page(road: Road, out: Path) -> None:
    """Writes report.html, report.md, summary.json and the page's figures."""
    evaluation = read_object(road.run / "evaluate" / "evaluation.json")
    table, seconds = ComparisonTable(evaluation, COLUMNS), stage_seconds(road)
    verdict = table.verdict(FINAL)
    solutions, refined = SOLUTIONS.read(road.run / "search"), REFINED.read(road.run / "search")
    images = {"architecture.png": search_figures.architecture(*_layers(solutions, refined))}
    if evaluation["points"]:
        images["frontier.png"] = frontier_figure(evaluation["points"], evaluation["reference"])
    predicted = _predicted(road, evaluation)
    took = [[name, f"{spent:,.0f}"] for name, spent in seconds.items()]
    serve = _how_to_serve(road)
    section = table.section()
    page = render(
        "run",
        verdict=verdict,
        heading=section.heading,
        rows=section.rows,
        remarks=section.remarks,
        images=images,
        predicted=predicted,
        took=[*took, ["all", f"{sum(seconds.values()):,.0f}"]],
        serve=serve,
    )
    (out / "figures").mkdir()
    for name, content in images.items():
        (out / "figures" / name).write_bytes(content)
    (out / REPORT).write_text(page)
    (out / "report.md").write_text(f"{verdict}\n\n{section.markdown()}\n")
    (out / "summary.json").write_text(json.dumps({"verdict": verdict, "seconds": seconds}, indent=1) + "\n")


def show_page(run: Path, console: Console) -> None:
    """Prints the verdict and the table of a run that is done, and where its page and its child are."""
    table = ComparisonTable(read_object(run / "evaluate" / "evaluation.json"), SHOWN)
    console.print(table.section().table())
    for line in (table.verdict(FINAL), f"Page: {run / 'report' / REPORT}", f"The child to serve: {run / CHILD}"):
        console.print(line, highlight=False, soft_wrap=True)


def stage_seconds(road: Road) -> dict[str, float]:
    """Seconds of every stage that is done, in order."""
    found = {}
    for name in road.settings.stages:
        if name == "search":
            records = [read_stage_record(path.parent) for path in (road.run / name).glob(f"*/{STAGE_FILE}")]
        else:
            records = [read_stage_record(road.run / (CHILD if name == "export" else name))]
        if done := [record for record in records if record is not None]:
            found[name] = sum(record.seconds for record in done)
    return found


def _layers(solutions: Mapping[str, Json], refined: Mapping[str, Json]) -> tuple[Json, Json]:
    return solutions["parent"]["layers"], refined["child"]["layers"]


def _predicted(road: Road, evaluation: Mapping[str, Json]) -> list[list[str]]:
    """Rows of the search's predictions for its child, before any training, with what the search measured."""
    searched = EVALUATION.read(road.run / "search")
    own, theirs = searched["child"], searched["parent"]
    rows = [["KL to the parent", f"{own['predicted_kl']:.4f}", f"{own['heldout']['kl']:.4f}"]]
    for name, scenario in own["scenarios"].items():
        of_parent = theirs["scenarios"][name]
        predicted = scenario["predicted_tokens_per_second"] / of_parent["predicted_tokens_per_second"]
        measured = "-"
        if scenario["throughput"] and of_parent["throughput"]:
            ratio = scenario["throughput"]["tokens_per_second"] / of_parent["throughput"]["tokens_per_second"]
            measured = f"{ratio:.2f}x"
        rows.append([f"tokens/s over the parent's, {name}", f"{predicted:.2f}x", measured])
    return rows


def _how_to_serve(road: Road) -> str:
    return f"puzzle generate --model {road.run / CHILD} --effort high --cache_dtype float8_e4m3fn PROMPT"
