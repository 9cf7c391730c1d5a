"""What a pretrained parent can do: accuracy and tokens per task and effort, greedy and sampled, on held-out
problems, and accuracy of `recall` by distance.

Left out: confidence intervals beyond the number of problems; `puzzle_jax.evaluate` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from puzzle_jax.config import ModelConfig
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.spec import Params
from puzzle_jax.tasks import DISTANCE_BUCKETS, EFFORTS, Chat

MAX_TOKENS = {"low": 32, "medium": 64, "high": 128}
_TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


def measure(
    params: Params, config: ModelConfig, chat: Chat, tasks: Sequence[str], per_task: int, seed: int = 0
) -> dict[str, Any]:
    """Accuracies of `per_task` held-out problems of each task at each effort.

    Returns:
      "greedy" and "sampled" (temperature 1), each {effort: {"mean": {accuracy, tokens}, task: {...}}} with the
      mean taken over tasks, and "recall_by_distance", {effort: {label: {accuracy, problems}}} of the sampled
      answers, when `recall` is among the tasks.
    """
    questions = QuestionSet(tuple(tasks), EFFORTS, per_task, "accuracy", seed)
    report: dict[str, Any] = {}
    answers: list[Trace] = []
    for name, temperature in _TEMPERATURES.items():
        answers = answer_questions(params, config, chat, questions, max_tokens=MAX_TOKENS, temperature=temperature)
        report[name] = {effort: _by_task([a for a in answers if a.effort == effort]) for effort in EFFORTS}
    if "recall" in tasks:
        report["recall_by_distance"] = {
            effort: by_distance([a for a in answers if a.effort == effort and a.task == "recall"]) for effort in EFFORTS
        }
    return report


def by_distance(answers: Sequence[Trace]) -> dict[str, dict[str, float]]:
    """Accuracy of answers to `recall` by the distance of the farthest asked entry."""
    report = {}
    for label, least, greatest in DISTANCE_BUCKETS:
        near = [a for a in answers if least <= a.details["distance"] <= greatest]
        if near:
            report[label] = {"accuracy": round(_accuracy(near), 4), "problems": len(near)}
    return report


def _by_task(answers: Sequence[Trace]) -> dict[str, dict[str, float]]:
    report = {}
    for task in dict.fromkeys(answer.task for answer in answers):
        members = [answer for answer in answers if answer.task == task]
        tokens = sum(len(answer.completion) for answer in members) / len(members)
        report[task] = {"accuracy": _accuracy(members), "tokens": tokens}
    mean = {key: sum(row[key] for row in report.values()) / len(report) for key in ("accuracy", "tokens")}
    return {
        name: {key: round(value, 4) for key, value in row.items()} for name, row in {"mean": mean, **report}.items()
    }


def _accuracy(answers: Sequence[Trace]) -> float:
    return sum(answer.correct for answer in answers) / len(answers)
