"""Where the files of a run lie.

RUN/run.json, settings.yaml     the run, and all settings as they were resolved
RUN/settings/STAGE.yaml         the settings of one stage, to run its verb alone (`puzzle train grpo --recipe ...`)
RUN/plan.json                   what a dry run found
RUN/search/                     a search as `puzzle search` runs it, with stages of its own
RUN/traces/answers.parquet      the parent's answers that the child is distilled on
RUN/distill/, accuracy/, length/, control/   training runs, each with its checkpoints, report and child/
RUN/average/child/              the average of both policies, with the scales of its FP8 cache
RUN/evaluate/                   an evaluation as `puzzle evaluate` makes one
RUN/child/                      the checkpoint to serve, with what was measured on its card
RUN/report/                     the page of the run
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

STAGES = ("search", "traces", "distill", "accuracy", "length", "average", "control", "evaluate", "export", "report")
CHILD = "child"
ANSWERS = "answers.parquet"
SETTINGS_FILE, STAGE_SETTINGS = "settings.yaml", "settings"

FINAL = "final"
"""The name, in tables, of the average with an FP8 cache, which is the model to serve."""

MADE = {
    "cut": "search",
    "distilled": "distill",
    "accuracy": "accuracy",
    "length": "length",
    "average": "average",
    FINAL: "average",
}
"""The stage that made each child in the tables."""


def stage_paths(parent: Path, run: Path, *, control: bool) -> dict[str, Any]:
    """Where each stage finds the results of earlier ones and writes its own: settings by dotted name, as strings."""

    def child(stage: str) -> str:
        return str(run / stage / CHILD)

    answers = str(run / "traces" / ANSWERS)
    models = {"parent": str(parent), **({"control": child("control")} if control else {})}
    return {
        "search.parent": str(parent),
        "search.run": str(run / "search"),
        "traces.parent": str(parent),
        "traces.out": answers,
        "distill.parent": str(parent),
        "distill.child": child("search"),
        "distill.traces": answers,
        "distill.out": str(run / "distill"),
        "accuracy.model": child("distill"),
        "accuracy.out": str(run / "accuracy"),
        "length.model": child("distill"),
        "length.out": str(run / "length"),
        "average.a": child("accuracy"),
        "average.b": child("length"),
        "average.out": child("average"),
        "average.reference": str(parent),
        "evaluate.models": models | {name: child(stage) for name, stage in MADE.items()},
        "evaluate.out": str(run / "evaluate"),
    }
