"""Parent, child and baselines side by side on what chose nothing: KL on held-out traces, accuracy and tokens per
effort on problems of their own, tokens per second.

Quality is that of views on the parent; speed is that of cut models, the child's as it was exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.table import tensor_bytes
from puzzle_jax.costs.table import Costs
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, unscored_note
from puzzle_jax.evaluate.journal import journaled_answers
from puzzle_jax.evaluate.summary import by_effort
from puzzle_jax.evaluate.throughput import measure_throughput
from puzzle_jax.files import read_object, write_beside
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.child import Child, cut_params
from puzzle_jax.model.network import to_compute
from puzzle_jax.model.spec import count_params
from puzzle_jax.progress import progress
from puzzle_jax.search.parent import Parent
from puzzle_jax.search.processes import Team
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.search.score.measurements import Measurements, score_children
from puzzle_jax.search.solve.problem import Candidate


@dataclass(frozen=True)
class Judge:
    """Measures children of one parent.

    Attributes:
      parent: with its parameters.
      recipe: questions, limits of answers, scenarios, rounds.
      mesh: where the parameters are.
      console: where progress goes.
      team: processes that share the scoring of whole children.
      kept: directory of what a killed run had measured, which is not measured again.
      identity: of the parent and of all that its numbers depend on.
    """

    parent: Parent
    recipe: Recipe
    mesh: Mesh | None
    console: Console
    team: Team
    kept: Path
    identity: str

    def divergence(self, children: Sequence[Child], traces: Sequence[Trace], what: str) -> Measurements:
        """KL of whole children on traces."""
        with progress(self.console, f"KL, {what}", None) as advance:
            return score_children(
                self.parent.params,
                self.parent.config,
                children,
                traces,
                mesh=self.mesh,
                on_done=advance,
                team=self.team,
                kept=self.kept,
                identity=self.identity,
            )

    def accuracy(self, children: Mapping[str, Child]) -> dict[str, dict[str, Any]]:
        """Accuracy and tokens by model and effort, answers being greedy; nothing without tasks."""
        traces, settings = self.recipe.traces, self.recipe.evaluate
        if not traces.tasks:
            return {name: {} for name in children}
        questions = QuestionSet(traces.tasks, traces.efforts, settings.problems, "accuracy", settings.seed)
        found = {}
        with progress(self.console, "accuracy", len(children) * len(questions.questions())) as advance:
            for name, child in children.items():
                ask = partial(
                    answer_questions,
                    self.parent.params,
                    child.viewed,
                    self.parent.chat,
                    questions,
                    max_tokens=traces.max_tokens,
                    slots=traces.batch_size,
                    view=child.view,
                    mesh=self.mesh,
                )
                answers = journaled_answers(
                    self.kept / f"{name}.jsonl",
                    questions.questions(),
                    lambda skip, on_answer, ask=ask: ask(skip=skip, on_answer=on_answer),
                    on_answers=advance,
                )
                if note := unscored_note(answers):
                    self.console.print(f"{name}: {note}", highlight=False, soft_wrap=True)
                found[name] = {effort: asdict(value) for effort, value in by_effort(answers, questions.efforts).items()}
        return found

    def speeds(
        self, children: Mapping[str, Child], candidates: Mapping[str, Candidate], exported: Path
    ) -> dict[str, dict[str, Any]]:
        """Measured tokens per second on the devices present, by scenario and model; nothing without rounds.

        Args:
          exported: the checkpoint of the model named "child".
        """
        rounds, dtype = self.recipe.evaluate.rounds, self.parent.params["embedding"].dtype
        if not rounds:
            return {scenario.name: {} for scenario in self.recipe.scenarios}
        models = {name: (cut_params(self.parent.params, child), child.config) for name, child in children.items()}
        checkpoint = load_checkpoint(exported)
        models["child"] = (to_compute(checkpoint.params, dtype), checkpoint.config)
        found = {}
        with progress(self.console, "throughput", rounds * len(self.recipe.scenarios)) as advance:
            for scenario in self.recipe.scenarios:
                file = self.kept / f"speeds-{scenario.name}.json"
                if file.is_file():
                    found[scenario.name] = read_object(file)
                    continue
                speeds = measure_throughput(
                    models,
                    batch={name: candidate.batches[scenario.name] for name, candidate in candidates.items()},
                    input_tokens=scenario.input_tokens,
                    output_tokens=scenario.output_tokens,
                    rounds=rounds,
                    on_round=lambda: advance(1),
                )
                found[scenario.name] = {
                    name: {"tokens_per_second": s.median, "low": s.low, "high": s.high, "rounds": s.rounds}
                    for name, s in speeds.items()
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
        """Everything that the table shows, by model.

        Args:
          candidates, children: of every model; "child" is the chosen one.
          heldout: traces that chose nothing.
          costs: what was predicted.
          exported: the child's checkpoint.
        """
        scores = self.divergence(list(children.values()), heldout, "heldout").scores
        accuracy = self.accuracy(children)
        speeds = self.speeds(children, candidates, exported)
        form = self.parent.description.form

        def in_scenario(name: str, scenario: str) -> dict[str, Any]:
            blocks, batch = candidates[name].blocks, candidates[name].batches[scenario]
            return {
                "batch": batch,
                "kv_bytes": costs.kv_bytes(blocks, scenario),
                "predicted_tokens_per_second": costs.tokens_per_second(blocks, scenario, batch),
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
                "efforts": accuracy[name],
                "missed": list(candidates[name].missed),
                "layers": candidates[name].to_json()["layers"],
            }
            for (name, child), score in zip(children.items(), scores, strict=True)
        }
