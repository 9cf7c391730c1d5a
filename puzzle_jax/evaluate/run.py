"""An evaluation from settings to evaluation.json: check everything, answer, measure speed, compare.

    OUT/settings.json          what answers depend on: settings, models' fingerprints, the date that templates see
    OUT/answers/<model>.jsonl  one answer per line, as they come
    OUT/throughput.jsonl       one round of one workload per line
    OUT/evaluation.json, report.html, report.md, frontier.png

Answers and rounds are saved as they come; a run in a directory that already holds some asks and measures only what is
missing. A directory belongs to one set of settings and models, since old and new answers would mix. Answers do not
depend on what is generated beside them, so a resumed run gives the answers of a run that was never interrupted.

`problems` is the number per effort and model over all tasks, split evenly; where it does not divide evenly, the first
tasks get one more.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, check_context, unscored_note
from puzzle_jax.evaluate.comparison import analyse
from puzzle_jax.evaluate.journal import Key, journaled_answers, question_key
from puzzle_jax.evaluate.models import Model, fit_together
from puzzle_jax.evaluate.settings import Settings
from puzzle_jax.evaluate.speeds import Speeds, device, measure_speeds, plan_slots, plan_workloads
from puzzle_jax.evaluate.throughput import Spread
from puzzle_jax.files import read_object, write_beside
from puzzle_jax.generate.traces import Trace
from puzzle_jax.progress import progress
from puzzle_jax.runs import locked, open_run
from puzzle_jax.tasks import Problem

SETTINGS_FILE = "settings.json"


class Evaluation:
    """One evaluation. Construction opens and checks everything but writes nothing; progress goes to the console.

    Raises PuzzleError for anything that cannot be used: models, tasks, prompts that exceed a model's context, a cache
    memory that holds no request. `run` refuses an output directory that holds something else before it writes anything.
    """

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.date = _recorded_date(settings.out) or datetime.datetime.now().replace(microsecond=0)
        self.models = {
            name: Model.open(name, path, self.date, settings.weights) for name, path in settings.models.items()
        }
        per_task = -(-settings.problems // len(settings.tasks))
        self.questions = QuestionSet(settings.tasks, settings.efforts, per_task, settings.split, settings.seed)
        self.all = self.questions.questions()
        self.asked = _share(self.all, settings)
        self.longest = {name: self._longest_request(model) for name, model in self.models.items()}
        timed = self.models if settings.throughput else {}
        self.slots = {name: plan_slots(model, settings, self.longest[name]) for name, model in timed.items()}

    def run(self) -> dict[str, Any]:
        """Does what is missing, and returns the content of evaluation.json."""
        out = open_run(self.settings.out, self._identity(), SETTINGS_FILE, date=self.date.isoformat())
        with locked(out, SETTINGS_FILE):
            together = fit_together(self.models.values(), self.settings.cache_memory)
            answers = {}
            for name, model in self.models.items():
                answers[name] = self._answer(model)
                if not together:
                    model.release()
            content = self._results(answers, self._measure(answers))
            text = json.dumps(content, indent=1, allow_nan=False) + "\n"
            write_beside(out / "evaluation.json", text.encode())
        return content

    def _longest_request(self, model: Model) -> int:
        """Most positions that a request may need for its prompt and the limit of its answer."""
        limits = self.settings.max_tokens
        return check_context(self.asked.values(), model.chat, model.config, limits, f"model {model.name!r}")

    def _identity(self) -> dict[str, object]:
        """Everything that answers depend on."""
        questions = [[p.task, p.seed, p.prompt, p.answer, effort] for p, effort in self.asked.values()]
        return {
            **self.settings.asked(),
            "split": self.settings.split,
            "questions": hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:16],
            "judged_by": self.questions.task_identities,
            "models": {name: model.fingerprint for name, model in self.models.items()},
            "platform": jax.default_backend(),
            "puzzle_jax": metadata.version("puzzle-jax"),
        }

    def _answer(self, model: Model) -> list[Trace]:
        """Answers to all questions, in their order."""
        path = self.settings.out / "answers" / f"{model.name}.jsonl"

        settings = self.settings

        def ask(**changes: Any) -> None:
            answer_questions(
                model.params,
                model.config,
                model.chat,
                self.questions,
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                slots=settings.slots,
                context=self.longest[model.name],
                cache=model.cache_format(settings.cache_of(model.name)),
                **changes,
            )

        with progress(self.console, f"{model.name} answers", len(self.asked)) as advance:
            found = journaled_answers(path, self.all, ask, wanted=self.asked.keys(), on_answers=advance)
        if note := unscored_note(found):
            self.console.print(f"{model.name}: {note}", highlight=False, soft_wrap=True)
        return found

    def _measure(self, answers: Mapping[str, Sequence[Trace]]) -> Speeds | None:
        if not self.settings.throughput:
            return None
        workloads = plan_workloads(self.models, self.slots, self.settings, answers)
        path = self.settings.out / "throughput.jsonl"
        runs = len(workloads) * len(self.models) * (self.settings.rounds + 1)
        with progress(self.console, "throughput", runs) as advance:
            return measure_speeds(self.models, workloads, self.settings, self.settings.rounds, path, advance)

    def _results(self, answers: Mapping[str, Sequence[Trace]], speeds: Speeds | None) -> dict[str, Any]:
        settings = self.settings
        by_effort = {effort: speeds[effort] for effort in settings.efforts} if speeds else None
        analysis = analyse(answers, settings.efforts, by_effort, draws=settings.bootstrap, seed=settings.seed)
        return {
            "reference": settings.reference,
            "settings": {**settings.asked(), "split": settings.split, "bootstrap": settings.bootstrap},
            "models": {
                name: {"directory": str(settings.models[name]), "fingerprint": model.fingerprint}
                for name, model in self.models.items()
            },
            **asdict(analysis),
            "throughput": self._throughput(speeds) if speeds else None,
        }

    def _throughput(self, speeds: Speeds) -> dict[str, object]:
        def entry(workload: str, model: str) -> dict[str, object]:
            rates, reference = speeds[workload][model], speeds[workload][self.settings.reference]
            return {
                "batch": self.slots[model][workload][0],
                "tokens_per_second": asdict(Spread.of(rates)),
                "relative": asdict(Spread.of([rate / other for rate, other in zip(rates, reference, strict=True)])),
            }

        return {
            "device": device(),
            "cache_memory": self.settings.cache_memory,
            "scenarios": {name: list(lengths) for name, lengths in self.settings.scenarios.items()},
            "workloads": {name: {model: entry(name, model) for model in self.models} for name in speeds},
        }


def _recorded_date(out: Path) -> datetime.datetime | None:
    """The date of an evaluation that was begun in `out`; None where there is none."""
    path = out / SETTINGS_FILE
    if not path.exists():
        return None
    try:
        return datetime.datetime.fromisoformat(read_object(path)["date"])
    except (KeyError, TypeError, ValueError):
        raise PuzzleError(f"{path} is damaged: it holds no date") from None


def _share(questions: Sequence[tuple[Problem, str]], settings: Settings) -> dict[Key, tuple[Problem, str]]:
    """The questions to ask, with `problems` divided among the tasks."""
    each, more = divmod(settings.problems, len(settings.tasks))
    room = {task: each + (position < more) for position, task in enumerate(settings.tasks)}
    taken: dict[tuple[str, str], int] = {}
    asked: dict[Key, tuple[Problem, str]] = {}
    for problem, effort in questions:
        taken[problem.task, effort] = taken.get((problem.task, effort), 0) + 1
        if taken[problem.task, effort] <= room[problem.task]:
            asked[question_key((problem, effort))] = (problem, effort)
    return asked
