"""Where the files of a run lie.

RUN/run.json, settings.yaml     the run, and all settings as they were resolved
RUN/settings/STAGE.yaml         a stage's own, for its verb alone (`puzzle train grpo --recipe ...`)
RUN/plan.json                   what a dry run found
RUN/search/                     a search as `puzzle search` runs it, with stages of its own
RUN/traces/answers.parquet      the parent's answers that the child is distilled on
RUN/distill/, accuracy/, length/, control/   runs of training, each with its checkpoints, report and child/
RUN/average/child/              the average of both policies, with the scales of its FP8 cache
RUN/evaluate/                   an evaluation as `puzzle evaluate` makes one
RUN/child/                      the checkpoint to serve, with what was measured on its card
RUN/report/                     the page of the run
"""

from __future__ import annotations

STAGES = ("search", "traces", "distill", "accuracy", "length", "average", "control", "evaluate", "export", "report")
CHILD = "child"
ANSWERS = "answers.parquet"
SETTINGS_FILE, STAGE_SETTINGS = "settings.yaml", "settings"

FINAL = "final"
"""In tables, the average with an FP8 cache, which is what is served."""

MADE = {
    "cut": "search",
    "distilled": "distill",
    "accuracy": "accuracy",
    "length": "length",
    "average": "average",
    FINAL: "average",
}
"""The stage that has made each child of the tables."""
