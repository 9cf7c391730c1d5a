"""Measurement of a pretrained parent on held-out problems: accuracy, tokens and habits per task and effort, greedy and
sampled; accuracy by difficulty; and accuracy on `recall` by distance.

Left out: confidence intervals beyond the number of problems; `puzzle_jax.evaluate` has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from puzzle_jax.config import ModelConfig
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions
from puzzle_jax.evaluate.settings import MAX_TOKENS
from puzzle_jax.evaluate.statistics import by_task, summarise
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.spec import Params
from puzzle_jax.tasks import DISTANCE_BUCKETS, EFFORTS, Chat, worked_task
from puzzle_jax.train.pretrain.habits import CHECK

_TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


def measure(
    params: Params,
    config: ModelConfig,
    chat: Chat,
    tasks: Sequence[str],
    per_task: int,
    seed: int = 0,
    max_tokens: Mapping[str, int] = MAX_TOKENS,
) -> dict[str, Any]:
    """Accuracies on `per_task` held-out problems of each task at each effort.

    Returns:
      "greedy" and "sampled" (temperature 1), each {effort: {"mean": {accuracy, tokens, ended, checked}, task: {...}}}
      with the mean taken over tasks. `ended` is the share of answers that end within the limit, `checked` the share in
      which a step is written again. For the sampled answers also "by_level", {effort: {task: {level: accuracy}}}, a
      level being steps, digits or letters; and "recall_by_distance", {effort: {label: {accuracy, problems}}}, if
      `recall` is among the tasks.
    """
    questions = QuestionSet(tuple(tasks), EFFORTS, per_task, "accuracy", seed)
    report: dict[str, Any] = {}
    by_effort: dict[str, list[Trace]] = {}
    for name, temperature in _TEMPERATURES.items():
        answers = answer_questions(params, config, chat, questions, max_tokens=max_tokens, temperature=temperature)
        by_effort = {effort: [answer for answer in answers if answer.effort == effort] for effort in EFFORTS}
        report[name] = {effort: _by_task(found, chat) for effort, found in by_effort.items()}
    report["by_level"] = {
        effort: {task: by_level([a for a in found if a.task == task], worked_task(task).level) for task in tasks}
        for effort, found in by_effort.items()
    }
    if "recall" in tasks:
        report["recall_by_distance"] = {
            effort: by_distance([a for a in found if a.task == "recall"]) for effort, found in by_effort.items()
        }
    return report


def table(report: Mapping[str, Any]) -> Table:
    """The report of `measure` as a table for the terminal."""
    found = Table("task", *(f"{effort}: greedy / sampled (tokens)" for effort in EFFORTS))
    for task in report["sampled"][EFFORTS[0]]:
        cells = []
        for effort in EFFORTS:
            greedy, sampled = report["greedy"][effort][task], report["sampled"][effort][task]
            cells.append(f"{greedy['accuracy']:.2f} / {sampled['accuracy']:.2f} ({sampled['tokens']:.0f})")
        found.add_row(task, *cells)
    for label in report.get("recall_by_distance", {}).get(EFFORTS[0], {}):
        accuracies = (report["recall_by_distance"][effort][label]["accuracy"] for effort in EFFORTS)
        found.add_row(f"recall {label}", *(f"{accuracy:.2f}" for accuracy in accuracies))
    return found


def by_distance(answers: Sequence[Trace]) -> dict[str, dict[str, float]]:
    """Accuracy of answers to `recall` by the distance of the farthest asked entry."""
    report = {}
    for label, least, greatest in DISTANCE_BUCKETS:
        near = [a for a in answers if least <= a.details["distance"] <= greatest]
        if near:
            report[label] = {"accuracy": round(summarise(near).accuracy, 4), "problems": len(near)}
    return report


def by_level(answers: Sequence[Trace], level: str) -> dict[str, float]:
    """Accuracy of answers by a measure of their problem's difficulty."""
    levels = sorted({answer.details[level] for answer in answers})
    return {
        str(value): round(summarise([a for a in answers if a.details[level] == value]).accuracy, 4) for value in levels
    }


def _by_task(answers: Sequence[Trace], chat: Chat) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for task, of in by_task(answers).items():
        own = [answer for answer in answers if answer.task == task]
        rows[task] = {
            "accuracy": of.accuracy,
            "tokens": of.mean_tokens,
            "ended": sum(not answer.truncated for answer in own) / len(own),
            "checked": sum(CHECK in chat.decode(answer.completion) for answer in own) / len(own),
        }
    measures = next(iter(rows.values()))
    mean = {measure: sum(row[measure] for row in rows.values()) / len(rows) for measure in measures}
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in {"mean": mean, **rows}.items()}
