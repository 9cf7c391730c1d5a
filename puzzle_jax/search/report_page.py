"""The report stage: tables and figures from what the earlier stages have written."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from puzzle_jax.report.page import SearchPage, stage_records
from puzzle_jax.report.table import SearchReport
from puzzle_jax.search.artifacts import CHILD, EVALUATION, FINALISTS, REFINED, SCORES, SOLUTIONS, final_candidates
from puzzle_jax.search.context import Search
from puzzle_jax.search.solve.frontier import speedup
from puzzle_jax.search.solve.problem import Candidate


def write_report(search: Search, out: Path, stages: list[tuple[str, str]]) -> None:
    """Writes report.html, report.md and figures; `stages` holds the names and directories of all stages."""
    candidates = final_candidates(search.run)
    compared = {name: candidates[name] for name in ("parent", "child", "uniform")}
    child = candidates["child"]
    page = SearchPage(
        _report(search),
        scores=SCORES.read(search.run),
        solutions=SOLUTIONS.read(search.run),
        refined=REFINED.read(search.run),
        seconds={
            scenario.name: {name: _seconds_per_request(search, c, scenario.name) for name, c in compared.items()}
            for scenario in search.costs.scenarios
        },
        child={"speedup": speedup(search.problem(), child), "score": child.score},
        stages=stage_records(search.run, stages),
        finalists=FINALISTS.read(search.run) if search.recipe.finalists.count else None,
    )
    page.write(out)


def show_report(search: Search) -> None:
    """Prints the table and the path of the page."""
    _report(search).show(search.console)
    where = Text.assemble("Figures and stages: ", (str(search.recipe.run / "report/report.html"), "bold"))
    search.console.print(where, highlight=False)


def _report(search: Search) -> SearchReport:
    evaluation, efforts = EVALUATION.read(search.run), search.recipe.traces.efforts
    return SearchReport(evaluation, efforts, search.scenarios, search.recipe.run / CHILD)


def _seconds_per_request(search: Search, candidate: Candidate, scenario: str) -> dict[str, float]:
    batch = candidate.batches[scenario]
    seconds = search.costs.seconds_by_part(candidate.blocks, scenario, batch)
    return {part: of_batch / batch for part, of_batch in seconds.items()}
