"""A search as one HTML page that opens offline: tables, figures inside the file, every stage and its seconds."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle_jax.errors import PuzzleError
from puzzle_jax.files import read_object
from puzzle_jax.report import search_figures as figures
from puzzle_jax.report.table import SearchReport

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 0.8rem 0; } td, th { padding: 0.2rem 0.7rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) td { background: #f6f6f6; }
th { border-bottom: 1px solid #999; } img { max-width: 100%; } p.note { color: #555; max-width: 46rem; }
"""


@dataclass(frozen=True)
class SearchPage:
    """What the page shows, from the files of a finished run.

    Attributes:
      report: tables of the evaluation.
      scores, solutions, refined: contents of the stages' files.
      seconds: of one request's share of its batch, by scenario, model and part.
      child: predicted speed-up and score of the chosen child.
      stages: name and stage.json of every stage.
    """

    report: SearchReport
    scores: Mapping[str, Any]
    solutions: Mapping[str, Any]
    refined: Mapping[str, Any]
    seconds: Mapping[str, Mapping[str, Mapping[str, float]]]
    child: Mapping[str, float]
    stages: Mapping[str, Mapping[str, Any]]

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
        """The page with the images inside."""
        heading, rows = self.report.rows()
        pool = self.solutions["pool"]
        correlation = self.solutions["rank_correlation"]
        agree = "" if correlation is None else f" Spearman's rank correlation is {correlation:.2f}."
        chosen = pool[self.solutions["chosen"]]["name"].replace("_", " ")
        parts = [
            "<h1>From parent to child</h1>",
            _table(heading, rows),
            _note(self.report.caption(), *self.report.misses()),
            "<h2>The child</h2>",
            _image(images["architecture.png"], "experts and window of every layer"),
            "<h2>Speed against quality</h2>",
            _image(images["frontier.png"], "predicted KL against predicted speed-up"),
            "<h2>What each alternative costs in quality</h2>",
            _image(images["scores.png"], "KL of every alternative alone in its layer"),
            _note("Of every expert count the best set is shown. Empty fields are not offered in that layer."),
            "<h2>Predicted and real</h2>",
            _image(images["predicted.png"], "predicted against real KL of the pool"),
            _table(
                ["candidate", "predicted KL", "KL on validation traces", "above the best"],
                [
                    [
                        entry["name"].replace("_", " "),
                        f"{entry['score']:.4f}",
                        f"{entry['validation']['kl']:.4f} ±{entry['validation']['kl_se']:.4f}",
                        f"{entry['above_best']['mean']:.4f} ±{entry['above_best']['se']:.4f}",
                    ]
                    for entry in pool
                ],
            ),
            _note(f"Taken was: {chosen}.{agree}", *map(_told, self.refined["tried"])),
            "<h2>Where the time goes</h2>",
        ]
        for scenario in self.seconds:
            parts += [f"<h3>{html.escape(scenario)}</h3>", _image(images[f"costs-{scenario}.png"], "seconds by part")]
        stages = [[name, f"{record['seconds']:.1f}", str(record["jax"])] for name, record in self.stages.items()]
        parts += ["<h2>Stages</h2>", _table(["stage", "seconds", "JAX"], stages)]
        body = "\n".join(parts)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>puzzle_jax search</title>'
            f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
        )

    def write(self, out: Path) -> None:
        """report.html, report.md and figures/*.png."""
        images = self.figures()
        (out / "figures").mkdir()
        for name, content in images.items():
            (out / "figures" / name).write_bytes(content)
        (out / "report.html").write_text(self.html(images))
        (out / "report.md").write_text(self.report.markdown())


def stage_records(run: Path, directories: Sequence[tuple[str, str]]) -> dict[str, Mapping[str, Any]]:
    """stage.json of every stage that has one, by name; `directories` are (stage, directory)."""
    paths = {name: run / directory / "stage.json" for name, directory in directories}
    found: dict[str, Mapping[str, Any]] = {name: read_object(path) for name, path in paths.items() if path.is_file()}
    for name, record in found.items():
        if not isinstance(record.get("seconds"), int | float) or "jax" not in record:
            raise PuzzleError(f"{paths[name]} has no seconds or no jax, but is the record of a stage; run it again")
    return found


def _told(step: Mapping[str, Any]) -> str:
    if step["confirmation"] is None:
        return f"{step['step']}: nothing better was found."
    found = step["confirmation"]
    verdict = "accepted" if step["accepted"] else "refused"
    return f"{step['step']}: KL {found['mean']:+.4f} ±{found['se']:.4f} on confirmation traces, {verdict}."


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in heading)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _note(*sentences: str) -> str:
    return "".join(f'<p class="note">{html.escape(sentence)}</p>' for sentence in sentences)


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'
