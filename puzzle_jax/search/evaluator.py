"""Compares parent, child and baselines on data that had no part in the choice: KL on held-out traces, accuracy and
tokens per effort on separate problems, and tokens per second.

Quality is measured on views of the parent, speed on cut models; the child's speed is that of its exported checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console

from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.load import load_weights
from puzzle_jax.convert_hf.table import tensor_bytes
from puzzle_jax.costs.table import Costs
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, unscored_note
from puzzle_jax.evaluate.comparison import analyse
from puzzle_jax.evaluate.journal import journaled_answers
from puzzle_jax.evaluate.models import Model
from puzzle_jax.evaluate.statistics import by_effort, by_task, weighted_mean
from puzzle_jax.evaluate.throughput import measure_throughput
from puzzle_jax.files import read_object, write_beside
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.child import Child, cut_params
from puzzle_jax.model.spec import count_params
from puzzle_jax.progress import progress
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.search.score.ending import ending_weights
from puzzle_jax.search.score.measurements import Score
from puzzle_jax.search.score.whole_children import Measurements, score_children
from puzzle_jax.search.solve.problem import Candidate

DRAWS = 2000
"""Bootstrap draws behind the intervals of comparisons with the parent."""


@dataclass(frozen=True)
class Evaluator:
    """Measures children of one parent.

    Results are cached: a child that was measured on the same traces before is not run again.

    Attributes:
      parent: the parent, with its parameters.
      recipe: provides questions, answer limits, scenarios and rounds.
      console: where progress is shown.
      kept: directory of a killed run's results, which are not measured again.
      identity: what results depend on besides children and traces.
    """

    parent: Model
    recipe: Recipe
    console: Console
    kept: Path
    identity: str
    _known: dict[tuple[Any, ...], tuple[Score, np.ndarray]] = field(default_factory=dict, repr=False)

    def divergence(self, children: Sequence[Child], traces: Sequence[Trace], name: str) -> Measurements:
        """KL of whole children on a set of traces; one name must always stand for the same traces.

        Tokens of the traces by which children are chosen have the weights of the recipe; others count alike.
        """
        settings = self.recipe.score
        chosen_by = name in ("validation", "confirmation")
        weight = settings.ending_weight if chosen_by else 1
        weigh = ending_weights(self.parent.chat, weight, settings.ending_tokens)
        keys = [(name, child.blocks, child.rope) for child in children]
        new = {key: child for key, child in zip(keys, children, strict=True) if key not in self._known}
        if new:
            with progress(self.console, f"KL, {name}", None) as advance:
                found = score_children(
                    self.parent.params,
                    self.parent.config,
                    list(new.values()),
                    traces,
                    mesh=self.parent.mesh,
                    on_done=advance,
                    kept=self.kept,
                    identity=self.identity,
                    weigh=weigh,
                )
            self._known.update(zip(new, zip(found.scores, found.kl, strict=True), strict=True))
        scores, kl = zip(*(self._known[key] for key in keys), strict=True)
        return Measurements(list(scores), np.stack(kl), np.array([weigh(trace).sum() for trace in traces]))

    def accuracy(self, children: Mapping[str, Child]) -> dict[str, dict[str, dict[str, Any]]]:
        """Accuracy and tokens of greedy answers, by model, by "efforts" and "tasks", and by the name of each; empty if
        the recipe has no tasks.

        Models that are the same child answer only once. Every model but the first has "compared" too, by effort: the
        share of its answers that ended by themselves less the first's ("ended"), and its tokens over the first's
        ("tokens"), each with a paired bootstrap interval over problems.
        """
        traces, settings = self.recipe.traces, self.recipe.evaluate
        if not traces.tasks:
            return {name: {"efforts": {}, "tasks": {}} for name in children}
        questions = QuestionSet(traces.tasks, traces.efforts, settings.problems, "accuracy", settings.seed)
        found: dict[str, dict[str, dict[str, Any]]] = {}
        given: dict[str, list[Trace]] = {}
        same = first_alike({name: (child.blocks, child.rope) for name, child in children.items()})
        with progress(self.console, "accuracy", len(set(same.values())) * len(questions.questions())) as advance:
            for name, child in children.items():
                if same[name] != name:
                    found[name], given[name] = found[same[name]], given[same[name]]
                    continue
                ask = partial(
                    answer_questions,
                    self.parent.params,
                    child.viewed,
                    self.parent.chat,
                    questions,
                    max_tokens=traces.max_tokens,
                    slots=traces.batch_size,
                    view=child.view,
                    mesh=self.parent.mesh,
                )
                answers = journaled_answers(
                    self.kept / f"{name}.jsonl",
                    questions.questions(),
                    lambda skip, on_answer, ask=ask: ask(skip=skip, on_answer=on_answer),
                    on_answers=advance,
                )
                if note := unscored_note(answers):
                    self.console.print(f"{name}: {note}", highlight=False, soft_wrap=True)
                given[name] = answers
                found[name] = {
                    "efforts": {k: asdict(value) for k, value in by_effort(answers, questions.efforts).items()},
                    "tasks": {k: asdict(value) for k, value in by_task(answers).items()},
                }
        compared = analyse(given, traces.efforts, None, draws=DRAWS, seed=settings.seed).comparisons
        for name, comparison in compared.items():
            of_efforts = {
                effort: {"ended": asdict(entry.ended), "tokens": asdict(entry.relative_tokens)}
                for effort, entry in comparison.efforts.items()
            }
            found[name] = {**found[name], "compared": of_efforts}
        return found

    def speeds(
        self, children: Mapping[str, Child], candidates: Mapping[str, Candidate], exported: Path
    ) -> dict[str, dict[str, Any]]:
        """Measured tokens per second on the devices present, by scenario and model; empty if `rounds` is 0, and with
        several processes, since the engine is timed in a single process.

        Models of the same architecture and batch are timed once: which experts they keep makes no difference.

        Args:
          children: models by name.
          candidates: the same models as candidates, which have the batches.
          exported: the checkpoint of the model named "child".
        """
        rounds = self.recipe.evaluate.rounds
        if not rounds or self.recipe.mesh.processes > 1:
            return {scenario.name: {} for scenario in self.recipe.scenarios}
        child = describe_checkpoint(exported)
        models = {"child": (load_weights(child, weights=self.parent.weights), child.config)}
        for name, child in children.items():
            models.setdefault(name, (cut_params(self.parent.params, child), child.config))
        found = {}
        with progress(self.console, "throughput", rounds * len(self.recipe.scenarios)) as advance:
            for scenario in self.recipe.scenarios:
                file = self.kept / f"speeds-{scenario.name}.json"
                if file.is_file():
                    found[scenario.name] = read_object(file)
                    continue
                batch = {name: candidates[name].batches[scenario.name] for name in models}
                same = first_alike({name: (config, batch[name]) for name, (_, config) in models.items()})
                timed = {name: model for name, model in models.items() if same[name] == name}
                speeds = measure_throughput(
                    timed,
                    batch={name: batch[name] for name in timed},
                    input_tokens=scenario.input_tokens,
                    output_tokens=scenario.output_tokens,
                    rounds=rounds,
                    on_round=lambda: advance(1),
                )
                found[scenario.name] = {
                    name: {"tokens_per_second": s.median, "low": s.low, "high": s.high, "rounds": s.rounds}
                    for name, s in ((name, speeds[same[name]]) for name in children)
                }
                self.kept.mkdir(exist_ok=True)
                write_beside(file, json.dumps(found[scenario.name]).encode())
        return found

    def compare(
        self,
        candidates: Mapping[str, Candidate],
        children: Mapping[str, Child],
        heldout: Sequence[Trace],
        costs: Costs,
        exported: Path,
    ) -> dict[str, Any]:
        """All measurements that the table shows, by model.

        Args:
          candidates, children: all models by name; "child" is the chosen one.
          heldout: traces that had no part in any choice.
          costs: the costs by which the child was chosen.
          exported: the child's checkpoint.
        """
        found = self.divergence(list(children.values()), heldout, "heldout")
        accuracy = self.accuracy(children)
        speeds = self.speeds(children, candidates, exported)
        form = self.parent.description.form

        def in_scenario(name: str, scenario: str) -> dict[str, Any]:
            blocks, batch = candidates[name].blocks, candidates[name].batches[scenario]
            return {
                "batch": batch,
                "kv_bytes": costs.kv_bytes(blocks, scenario),
                "predicted_tokens_per_second": costs.tokens_per_second(blocks, scenario, batch),
                "predicted_error": costs.speed_error(blocks, scenario, batch),
                "throughput": speeds[scenario].get(name),
            }

        return {
            name: {
                "parameters": count_params(child.config),
                "checkpoint_bytes": tensor_bytes(child.config, form),
                "expert_bytes": costs.expert_bytes(candidates[name].blocks),
                "scenarios": {scenario.name: in_scenario(name, scenario.name) for scenario in costs.scenarios},
                "predicted_kl": candidates[name].score,
                "heldout": asdict(score),
                "heldout_kl": kl_by_group(kl, heldout),
                **accuracy[name],
                "missed": list(candidates[name].violated),
                "layers": candidates[name].to_json()["layers"],
            }
            for (name, child), score, kl in zip(children.items(), found.scores, found.kl, strict=True)
        }


def kl_by_group(kl: Float[np.ndarray, "traces"], traces: Sequence[Trace]) -> dict[str, dict[str, dict[str, float]]]:
    """KL per token and its standard error over traces, by "efforts" and "tasks", and by the name of each."""
    tokens = np.array([len(trace.completion) for trace in traces])

    def means(of_trace: Sequence[str]) -> dict[str, dict[str, float]]:
        rows = {name: [n for n, other in enumerate(of_trace) if other == name] for name in dict.fromkeys(of_trace)}
        found = {name: weighted_mean(kl[those], tokens[those]) for name, those in rows.items()}
        return {name: {"kl": mean, "kl_se": error} for name, (mean, error) in found.items()}

    return {"efforts": means([trace.effort for trace in traces]), "tasks": means([trace.task for trace in traces])}


def first_alike(models: Mapping[str, Hashable]) -> dict[str, str]:
    """Maps every name to the first name with an equal value."""
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(value, name) for name, value in models.items()}
