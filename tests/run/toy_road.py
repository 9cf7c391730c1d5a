"""A whole run at the smallest size: a parent that says digits at random, and a file of prompts that want a 7."""

import json
from pathlib import Path

from puzzle_jax.files import Json
from puzzle_jax.run.__main__ import VERBS, main
from puzzle_jax.run.settings import RunSettings
from puzzle_jax.settings.verbs import parse
from tests.support import of_type
from tests.train.grpo.toy_grpo import make

SETTINGS = {
    "seed": 1,  # with this seed, one of the parent's answers at high effort is correct
    "max_tokens": "low=5,medium=7,high=9",
    "search.scenario": "name=toy,input_tokens=40,output_tokens=8,batch=3,hardware=h100",
    "search.traces.calibration": 3,
    "search.traces.validation": 2,
    "search.traces.confirmation": 2,
    "search.traces.heldout": 2,
    "search.traces.batch_size": 9,
    "search.space": "{fractions: [1, 0.75, 0.5], windows: [24]}",
    "search.score": "{method: exact, tokens_per_batch: 256}",
    "search.solve.solutions": 2,
    "search.refine": "rounds=0,swaps=0",
    "search.evaluate": "{baselines: [], problems: 2, rounds: 0}",
    "search.costs": "roofline",
    "traces.batch_size": 24,
    "distill.data": "row_length=60,rows=2,heldout=4,micro_batches=1",
    "distill.loss": "token_chunk=32,vocab_chunk=48",
    "distill.loop": "steps=3,save_every=1,evaluate_every=3",
    "distill.remat": "false",
    "accuracy.prompts": "prompts=4,min_answers=4",
    "accuracy.rollout": "group=6,slots=24",
    "accuracy.update": "row_length=60,rows=2,token_chunk=32,vocab_chunk=48",
    "accuracy.remat": "false",
    "accuracy.optimizer.learning_rate": 0.006,
    "accuracy.optimizer.warmup_steps": 0,
    "accuracy.loop": "steps=2,save_every=1,evaluate_every=2",
    "accuracy.monitoring": "problems=3,transcripts=2",
    "average.weights": "0.5,1",
    "average.problems": 2,
    "average.batch_size": 24,
    "evaluate.slots": 24,
    "evaluate.problems": 4,
    "evaluate.rounds": 1,
    "evaluate.bootstrap": 50,
    "evaluate.scenarios": "toy=40:8",
    "evaluate.cache_memory": "1MiB",
}
SETTINGS |= {
    name.replace("accuracy", "length"): value for name, value in SETTINGS.items() if name.startswith("accuracy.")
}


def arguments(root: Path, run: Path, **changes: object) -> list[str]:
    """Arguments of a command line; `changes` are settings, with __ for dots, and None leaves one out."""
    settings = {"parent": root / "parent", "tasks": root / "say.jsonl", **SETTINGS, "run": run}
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    given = {name: value for name, value in settings.items() if value is not None}
    return [f"--{name}={value}" for name, value in given.items()]


def settings(root: Path, run: Path, **changes: object) -> RunSettings:
    return of_type(RunSettings, parse(VERBS[""], arguments(root, run, **changes)))


def run_it(root: Path, run: Path, **changes: object) -> int:
    return main(arguments(root, run, **changes))


def parent_and_prompts(root: Path) -> Path:
    """Fills a directory: parent/ and say.jsonl."""
    return make(root)


def summary(run: Path) -> dict[str, Json]:
    return json.loads((run / "report/summary.json").read_text())
