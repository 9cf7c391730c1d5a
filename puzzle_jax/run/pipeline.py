"""The stages of a run, in order:

    search      the child that serves the deployment best, pruned but not trained
    traces      the parent's own answers
    distill     the child learns from them
    accuracy    reinforcement learning for correct answers, mostly at high effort
    length      reinforcement learning for correct answers that are short
    average     the mean of both policies' weights, and the scales of its FP8 cache
    control     the parent trained as in `accuracy`, so that the table shows what the training alone does
    evaluate    accuracy and speed of all of them, on problems used neither for selection nor for training
    export      the checkpoint to serve, with what was measured on its card
    report      one page

A stage's section of the settings is the recipe of its verb. The search has stages of its own in its own directory.
Every other one is a `stages.Stage`: it is skipped while its inputs and settings are unchanged, and resumes after a kill
from its own checkpoints or journals, which lie in a hidden directory until it is done.

Left out: stages that run in parallel, and several processes for answers and evaluation, which the primary process makes
alone.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from puzzle_jax.codec import to_plain
from puzzle_jax.costs.hardware import device_identity
from puzzle_jax.evaluate.command import evaluate as run_evaluation
from puzzle_jax.files import linked_tree
from puzzle_jax.generate.traces import read_traces
from puzzle_jax.processes.distributed import process_count
from puzzle_jax.processes.published import decided
from puzzle_jax.run.card import write_child
from puzzle_jax.run.page import write_page
from puzzle_jax.run.places import ANSWERS, CHILD, FINAL
from puzzle_jax.run.road import Road
from puzzle_jax.search.command import run_search
from puzzle_jax.stages import STAGE_FILE, Stage, StageResult
from puzzle_jax.tasks import get_task
from puzzle_jax.tasks.rewards.source import reward_file
from puzzle_jax.train.average.command import run as run_average
from puzzle_jax.train.distill.run import distill as run_distillation
from puzzle_jax.train.grpo.recipe import GrpoRecipe
from puzzle_jax.train.grpo.run import grpo as run_policy
from puzzle_jax.train.loop import Trained
from puzzle_jax.train.traces.command import run as run_answers

_PLACES = ("parent", "child", "traces", "model", "models", "out", "a", "b", "reference", "teacher_cache")
"""Settings that say where something lies; its content counts, not its path."""

_WITHOUT_RESULT = ("mesh", "weights", "batch_size")
"""Settings that change how a result is computed, but nothing in it beyond rounding."""


def run_road(road: Road) -> list[StageResult]:
    """Runs the requested stage, or all in order; those that are up to date are skipped.

    Returns:
      The results of the stages; an empty list in processes other than the primary one.

    Raises `PuzzleError` where an earlier stage has not been run, and `KeyboardInterrupt` where a signal ended a
    stage's training early; the same call resumes it.
    """
    results = []
    for name in road.settings.stages:
        if road.settings.stage not in ("all", name):
            continue
        road.console.print(Text(f"{name}", "bold"))
        result = _search(road) if name == "search" else _run(_STAGES[name], road)
        # Whatever a stage left on the devices is released before the next one starts.
        gc.collect()
        if result is not None:
            results.append(result)
            what = "unchanged, skipped" if result.skipped else f"{result.seconds:.1f} s"
            road.console.print(Text.assemble((f"{name:<12}", "bold"), f" {what}"))
    return results


def _search(road: Road) -> StageResult | None:
    """Runs the search, which skips and resumes its own stages."""
    results = run_search(road.settings.search, road.console)
    if not road.primary:
        return None
    seconds, compiling = (sum(getattr(each, of) for each in results) for of in ("seconds", "compile_seconds"))
    skipped = all(each.skipped for each in results)
    return StageResult("search", road.run / "search", "", seconds, skipped, "", compiling)


def _run(stage: Stage[Road], road: Road) -> StageResult | None:
    """Runs a stage in all processes, unless it is up to date; returns its result in the primary one."""
    if process_count() == 1:
        return stage.run(road.run, road)
    if not road.primary:
        place = decided(lambda: None)
        if place is not None:
            stage.produce(road, Path(place), Path(place))
        return None

    def produce(road: Road, out: Path, kept: Path) -> None:
        decided(lambda: str(kept))
        stage.produce(road, out, kept)

    result = replace(stage, produce=produce).run(road.run, road)
    if result.skipped:
        decided(lambda: None)
    return result


# What the stages do --------------------------------------------------------------------------------------------------


def _by_primary(produce: Callable[[Road, Path, Path], None]) -> Callable[[Road, Path, Path], None]:
    """Makes a stage's function one whose work the primary process does alone."""

    def alone(road: Road, out: Path, kept: Path) -> None:
        if road.primary:
            produce(road, out, kept)

    return alone


def _trained(train: Callable[[Road, Path], Trained]) -> Callable[[Road, Path, Path], None]:
    """A stage's function that trains in the directory `kept`, whose files become the stage's when training is done."""

    def produce(road: Road, out: Path, kept: Path) -> None:
        if train(road, kept).preempted:
            raise KeyboardInterrupt
        if road.primary:
            linked_tree(kept, out)

    return produce


def _plain(recipe: object) -> dict[str, Any]:
    """A recipe as JSON values, without paths and without what changes no result."""
    values: dict[str, Any] = to_plain(recipe)
    return {name: value for name, value in values.items() if name not in (*_PLACES, *_WITHOUT_RESULT)}


def _identities(tasks: Iterable[str]) -> dict[str, str]:
    return {task: get_task(task).identity for task in tasks}


def _answers_settings(road: Road) -> Mapping[str, object]:
    settings = road.settings.traces
    return {**_plain(settings), "judged_by": _identities(settings.tasks)}


def _answer(road: Road, out: Path, kept: Path) -> None:
    run_answers(replace(road.settings.traces, out=out / ANSWERS), road.console, kept / "answers.jsonl")


def _distill(road: Road, kept: Path) -> Trained:
    return run_distillation(replace(road.settings.distill, out=kept), road.console)


def _policy_settings(recipe: GrpoRecipe) -> Mapping[str, object]:
    return {**_plain(recipe), "judged_by": _identities(recipe.prompts.task_weights)}


def _policy_inputs(recipe: GrpoRecipe, *inputs: Path) -> list[Path]:
    function = recipe.reward.function
    file = None if function is None else reward_file(function)
    return [*inputs, *([] if file is None else [file])]


def _policy(recipe: Callable[[Road], GrpoRecipe]) -> Callable[[Road, Path], Trained]:
    def train(road: Road, kept: Path) -> Trained:
        return run_policy(replace(recipe(road), out=kept), road.console)

    return train


def _length_recipe(road: Road) -> GrpoRecipe:
    """The length policy's recipe; budgets default to the mean lengths of the parent's correct answers."""
    recipe = road.settings.length
    if recipe.loss.length_budgets:
        return recipe
    return replace(recipe, loss=replace(recipe.loss, length_budgets=right_lengths(road.answers, road.settings.efforts)))


def right_lengths(answers: Path, efforts: Iterable[str]) -> dict[str, int]:
    """Mean tokens of correct answers in a file of traces, by effort; efforts without one are left out."""
    traces = read_traces(answers)
    found = {effort: [len(t.completion) for t in traces if t.effort == effort and t.correct] for effort in efforts}
    return {effort: max(1, round(float(np.mean(lengths)))) for effort, lengths in found.items() if lengths}


def _average_settings(road: Road) -> Mapping[str, object]:
    settings = road.settings.average
    # Here `weights` are those of the averages to try, not how a model is held.
    return {**_plain(settings), "weights": list(settings.weights), "judged_by": _identities(settings.tasks)}


def _average(road: Road, out: Path, kept: Path) -> None:
    run_average(replace(road.settings.average, out=out / CHILD), road.console)


def _evaluate_settings(road: Road) -> Mapping[str, object]:
    settings = road.settings.evaluate
    device = device_identity() if settings.throughput else None
    return {**_plain(settings), "judged_by": _identities(settings.tasks), "models": list(road.models), "device": device}


def _evaluate(road: Road, out: Path, kept: Path) -> None:
    run_evaluation(replace(road.settings.evaluate, out=kept), road.console)
    linked_tree(kept, out)


def _export(road: Road, out: Path, kept: Path) -> None:
    shutil.rmtree(out)
    linked_tree(road.child_of("average"), out)
    write_child(out, road.settings.parent, road.run / "evaluate" / "evaluation.json", FINAL)


def _records(road: Road) -> list[Path]:
    """The records of the stages before the report."""
    names = [name for name in road.settings.stages if name not in ("search", "report")]
    return [road.run / (CHILD if name == "export" else name) / STAGE_FILE for name in names]


def _report(road: Road, out: Path, kept: Path) -> None:
    write_page(road, out)


# The stages ----------------------------------------------------------------------------------------------------------

_STAGES: Mapping[str, Stage[Road]] = {
    stage.name: stage
    for stage in (
        Stage[Road]("traces", lambda r: [r.settings.parent], _answers_settings, _by_primary(_answer)),
        Stage[Road](
            "distill",
            lambda r: [r.settings.parent, r.child_of("search"), r.answers],
            lambda r: _plain(r.settings.distill),
            _trained(_distill),
        ),
        Stage[Road](
            "accuracy",
            lambda r: _policy_inputs(r.settings.accuracy, r.child_of("distill")),
            lambda r: _policy_settings(r.settings.accuracy),
            _trained(_policy(lambda r: r.settings.accuracy)),
        ),
        Stage[Road](
            "length",
            lambda r: _policy_inputs(r.settings.length, r.child_of("distill"), r.answers),
            lambda r: _policy_settings(_length_recipe(r)),
            _trained(_policy(_length_recipe)),
        ),
        Stage[Road](
            "average",
            lambda r: [r.child_of("accuracy"), r.child_of("length"), r.settings.parent],
            _average_settings,
            _by_primary(_average),
        ),
        Stage[Road](
            "control",
            lambda r: _policy_inputs(r.settings.accuracy, r.settings.parent),
            lambda r: _policy_settings(r.settings.control_recipe),
            _trained(_policy(lambda r: r.settings.control_recipe)),
        ),
        Stage[Road](
            "evaluate", lambda r: list(dict.fromkeys(r.models.values())), _evaluate_settings, _by_primary(_evaluate)
        ),
        Stage[Road](
            "export",
            lambda r: [r.settings.parent, r.child_of("average"), r.run / "evaluate" / "evaluation.json"],
            lambda r: {},
            _by_primary(_export),
            directory=CHILD,
        ),
        Stage[Road](
            "report",
            lambda r: [r.run / "search" / "report", *_records(r)],
            lambda r: {},
            _by_primary(_report),
        ),
    )
}
