"""A search as one HTML page that opens offline: tables, embedded figures, and the seconds of every stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from puzzle_jax.errors import PuzzleError
from puzzle_jax.files import Json, read_object
from puzzle_jax.report import search_figures as figures
from puzzle_jax.report.html import render
from puzzle_jax.report.table import SearchReport


@dataclass(frozen=True)
class SearchPage:
    """The content of the page, from the files of a finished run.

    Attributes:
      scores, solutions, refined: contents of the stages' files.
      finalists: content of finalists.json; None where no finalists were trained.
      seconds: one request's share of its batch, by scenario, model and part.
      child: predicted speed-up and score of the chosen child.
      stages: name and stage.json of every stage.
    """

    report: SearchReport
    scores: Mapping[str, Json]
    solutions: Mapping[str, Json]
    refined: Mapping[str, Json]
    seconds: Mapping[str, Mapping[str, Mapping[str, float]]]
    child: Mapping[str, float]
    stages: Mapping[str, Mapping[str, Json]]
    finalists: Mapping[str, Json] | None = None

    def figures(self) -> dict[str, bytes]:
        """PNG files by name."""
        found = {
            "scores.png": figures.score_map(self.scores["layers"]),
            "architecture.png": figures.architecture(
                self.solutions["parent"]["layers"], self.refined["child"]["layers"]
            ),
            "frontier.png": figures.frontier(self.solutions, self.child),
            "predicted.png": figures.predicted_and_real(self.solutions["pool"]),
        }
        for scenario, seconds in self.seconds.items():
            found[f"costs-{scenario}.png"] = figures.costs_by_part(seconds)
        return found

    def html(self, images: Mapping[str, bytes]) -> str:
        """The page with the images embedded."""
        heading, rows = self.report.rows()
        correlation = self.solutions["rank_correlation"]
        agree = "" if correlation is None else f" Spearman's rank correlation is {correlation:.2f}."
        pool = [
            [
                entry["name"].replace("_", " "),
                f"{entry['score']:.4f}",
                "{kl:.4f} ±{kl_se:.4f}".format(**entry["validation"]),
                f"{entry['expected']:.4f}",
                "{mean:+.4f} ±{se:.4f}".format(**entry["above_best"]),
            ]
            for entry in self.solutions["pool"]
        ]
        chosen = pool[self.solutions["chosen"]][0]
        return render(
            "search",
            heading=heading,
            rows=rows,
            remarks=[self.report.caption(), *self.report.misses()],
            groups=self.report.groups(),
            images=images,
            pool=pool,
            choices=[
                f"The search took {chosen}.{agree}",
                *self._of_finalists(),
                *map(_outcome, self.refined["tried"]),
            ],
            scenarios=list(self.seconds),
            stages=[[name, f"{record['seconds']:.1f}", record["jax"]] for name, record in self.stages.items()],
        )

    def _of_finalists(self) -> list[str]:
        """A sentence on the finalist that was chosen, if there were any."""
        if self.finalists is None:
            return []
        steps, name = self.finalists["steps"], self.finalists["finalists"][self.finalists["chosen"]]["name"]
        count = len(self.finalists["finalists"])
        return [f"After {steps} steps of training, {name} had the lowest KL of {count} finalists and went on."]

    def write(self, out: Path) -> None:
        """Writes report.html, report.md and figures/*.png."""
        images = self.figures()
        (out / "figures").mkdir()
        for name, content in images.items():
            (out / "figures" / name).write_bytes(content)
        (out / "report.html").write_text(self.html(images))
        (out / "report.md").write_text(self.report.markdown())


def stage_records(run: Path, directories: Sequence[tuple[str, str]]) -> dict[str, Mapping[str, Json]]:
    """The stage.json of every stage that has one, by name; `directories` are pairs (stage, directory)."""
    paths = {name: run / directory / "stage.json" for name, directory in directories}
    found: dict[str, Mapping[str, Json]] = {name: read_object(path) for name, path in paths.items() if path.is_file()}
    for name, record in found.items():
        if not isinstance(record.get("seconds"), int | float) or "jax" not in record:
            raise PuzzleError(f"{paths[name]} has no seconds or no jax, but is the record of a stage; run it again")
    return found


def _outcome(step: Mapping[str, Json]) -> str:
    if step["confirmation"] is None:
        return f"{step['step']}: nothing better was found."
    found = step["confirmation"]
    verdict = "accepted" if step["accepted"] else "refused"
    because = f", since {'; '.join(step['broken'])}" if step.get("broken") else ""
    return f"{step['step']}: KL {found['mean']:+.4f} ±{found['se']:.4f} on confirmation traces, {verdict}{because}."
