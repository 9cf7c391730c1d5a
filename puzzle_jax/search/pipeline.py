"""The search from parent to child, stage by stage.

    cost      costs.json        bytes and seconds of every alternative
    trace     traces/*.parquet  the parent's own answers, in three sets that share no problem
    rank      ranking.safetensors  every expert's score by every method
    score     scores.json       the space of alternatives and the exact KL of each
    solve     solutions.json    the program's pool with its real KL on fresh traces, the chosen child, the baselines
    assemble  child/            the child's checkpoint, with scales for an FP8 cache
    evaluate  evaluation.json   KL, accuracy, tokens and speed of parent, child and baselines on what chose nothing
    report    report.md         the table

Each stage reads files and writes files, so each runs alone, and one whose inputs and settings did not change is
skipped (`search.stages`). Costs come first: a target that cannot be reached is refused before long work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors.numpy import load_file, save_file

from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.table import tensor_bytes
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions
from puzzle_jax.evaluate.summary import by_effort
from puzzle_jax.evaluate.throughput import Spread, measure_throughput
from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.calibrate import calibrate_cache
from puzzle_jax.generate.traces import read_traces, write_traces
from puzzle_jax.model.child import Child, ChildBlock, cut_params
from puzzle_jax.model.network import to_compute
from puzzle_jax.model.spec import count_params
from puzzle_jax.progress import progress
from puzzle_jax.report.table import SearchReport
from puzzle_jax.search.baselines import experts_only, uniform, windows_only
from puzzle_jax.search.costs import Costs, compute_costs, read_costs
from puzzle_jax.search.external import read_external
from puzzle_jax.search.measured import Measured, device_identity
from puzzle_jax.search.parent import Parent
from puzzle_jax.search.problem import Candidate, Problem, Scores
from puzzle_jax.search.rank import METHODS, Ranking, rank_experts
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.search.roofline import Roofline
from puzzle_jax.search.score import Alternative, replace_one_scores, score_children
from puzzle_jax.search.space import (
    ExpertChoice,
    Space,
    candidate_counts,
    candidate_windows,
    distinct_choices,
)
from puzzle_jax.search.stages import Stage, open_run, run_stage

STAGES = ("cost", "trace", "rank", "score", "solve", "assemble", "evaluate", "report")
TRACE_SETS = ("calibration", "validation", "heldout")


class Search:
    """One search in one run directory.

    Args:
      recipe: all settings.
      console: where progress and tables go.

    Raises `PuzzleError` at once for a parent that cannot be used, a run directory that holds something else, or a
    target that no architecture can reach by its bytes.
    """

    def __init__(self, recipe: Recipe, console: Console | None = None) -> None:
        self.recipe = recipe
        # Where the output is no terminal, nobody knows its width; the table needs about this much.
        self.console = console or Console(width=None if sys.stdout.isatty() else 150)
        self.parent = Parent.open(recipe.parent)
        self.counts = candidate_counts(
            self.parent.config.blocks[0].num_experts,
            self.parent.config.experts_per_token,
            recipe.space.fractions,
            recipe.space.divisor,
        )
        self.windows = candidate_windows(self.parent.config, recipe.space.windows)
        identity = {
            "kind": "search",
            "parent": str(recipe.parent.resolve()),
            "weights": self.parent.fingerprint,
        }
        self.run = open_run(recipe.run, identity)

    def execute(self, stage: str) -> Stage:
        """Runs one stage, or skips it when nothing changed.

        Raises `PuzzleError` when an earlier stage has not been run.
        """
        done: Stage = getattr(self, f"_{stage}")()
        what = "unchanged, skipped" if done.skipped else f"{done.seconds:.1f} s"
        self.console.print(f"[bold]{stage:<9}[/bold] {what}")
        return done

    def execute_all(self) -> None:
        """Runs what is not up to date, in order."""
        for stage in STAGES:
            self.execute(stage)

    # Stages ---------------------------------------------------------------------------------------------------------

    def _cost(self) -> Stage:
        measured, external = self.recipe.costs == "measured", self.recipe.external_costs
        if external and not external.is_file():
            raise PuzzleError(f"costs is {external}, but there is no such file")
        settings = {
            "provider": "external" if external else self.recipe.costs,
            "device": device_identity() if measured else None,
            "scenario": self.recipe.section("scenario"),
            "counts": self.counts,
            "windows": self.windows,
        }

        def produce(out: Path) -> None:
            space, form, scenario = self._nominal_space(), self.parent.description.form, self.recipe.scenario
            if external:
                read_external(external, space, scenario)
                (out / "costs.json").write_bytes(external.read_bytes())
                return
            with progress(self.console, "timing blocks", None) as advance:
                if measured:
                    timer = Measured(progress=lambda _, turns: advance(1, turns))
                    costs = compute_costs(space, [scenario], form, timer)
                else:
                    costs = compute_costs(space, [scenario], form, Roofline(), memory=Roofline())
            _write(out / "costs.json", costs.to_json())

        inputs = [self.parent.directory / "config.json", *([external] if external else [])]
        done = run_stage(self.run, "cost", settings, inputs, produce)
        self._check_target()
        return done

    def _trace(self) -> Stage:
        settings = self.recipe.traces

        def produce(out: Path) -> None:
            sets = {name: self._questions(name) for name in TRACE_SETS}
            with progress(self.console, "answering", sum(len(s.questions()) for s in sets.values())) as advance:
                for name, questions in sets.items():
                    answers = answer_questions(
                        self.parent.params,
                        self.parent.config,
                        self.parent.chat,
                        questions,
                        max_tokens=settings.max_tokens,
                        temperature=settings.temperature,
                        slots=settings.batch_size,
                        on_answer=lambda *_: advance(1),
                    )
                    write_traces(out / f"{name}.parquet", answers)

        return self._stage("trace", asdict(settings), [], produce, directory="traces")

    def _rank(self) -> Stage:
        def produce(out: Path) -> None:
            batches = self._batches("calibration")
            with progress(self.console, "ranking experts", len(batches)) as advance:
                ranking = rank_experts(self.parent.params, self.parent.config, batches, on_batch=lambda: advance(1))
            save_file({**ranking.scores, "routed": ranking.routed}, out / "ranking.safetensors")

        return self._stage("rank", {}, ["traces/calibration.parquet"], produce)

    def _score(self) -> Stage:
        def produce(out: Path) -> None:
            space = self._ranked_space()
            self.console.print(space.describe())
            config = self.parent.config
            experts = [
                [_mask(c, b.num_experts) for c in choices if c.count < b.num_experts]
                for choices, b in zip(space.expert_choices, config.blocks, strict=True)
            ]
            alternatives = [
                [Alternative(mask, block.window) for mask in masks]
                + [Alternative(np.ones(block.num_experts, bool), window) for window in windows[1:]]
                for masks, windows, block in zip(experts, space.windows, config.blocks, strict=True)
            ]
            batches = self._batches("calibration")
            depth = config.num_layers
            work = len(batches) * sum(len(a) * (depth - i) for i, a in enumerate(alternatives))
            with progress(self.console, "scoring", work) as advance:
                scores = replace_one_scores(self.parent.params, config, alternatives, batches, on_alternatives=advance)
            layers = []
            for entry, of_layer, masks in zip(space.to_json(), scores, experts, strict=True):
                numbers = [asdict(score) for score in of_layer]
                for choice, score in zip(entry["experts"][-len(masks) :] if masks else [], numbers, strict=False):
                    choice["score"] = score
                layers.append({**entry, "window_scores": [None, *numbers[len(masks) :]]})
            _write(out / "scores.json", {"layers": layers})

        settings = {"counts": self.counts, "windows": self.windows}
        inputs = ["traces/calibration.parquet", "rank/ranking.safetensors"]
        return self._stage("score", settings, inputs, produce)

    def _solve(self) -> Stage:
        settings = {**self.recipe.section("solve"), "target": self.recipe.section("target")}

        def produce(out: Path) -> None:
            problem = self._problem()
            options = self.recipe.solve
            pool = problem.solve(num_solutions=options.solutions, time_limit=options.time_limit, gap=options.gap)
            baselines = [uniform(problem), experts_only(problem), windows_only(problem)]
            batches = self._batches("validation")
            with progress(self.console, "measuring the pool", len(batches) * len(pool)) as advance:
                measured = score_children(
                    self.parent.params,
                    self.parent.config,
                    [self.child(c) for c in pool],
                    batches,
                    on_child=lambda: advance(1),
                )
            best = int(np.argmin([score.kl for score in measured]))
            _write(
                out / "solutions.json",
                {
                    "chosen": best,
                    "pool": [{**c.to_json(), "validation": asdict(s)} for c, s in zip(pool, measured, strict=True)],
                    "parent": problem.parent().to_json(),
                    "baselines": [baseline.to_json() for baseline in baselines],
                },
            )

        inputs = ["score/scores.json", "cost/costs.json", "traces/validation.parquet"]
        return self._stage("solve", settings, inputs, produce)

    def _assemble(self) -> Stage:
        def produce(out: Path) -> None:
            chosen = self.candidates()["child"]
            provenance = {
                "parent": str(self.parent.directory),
                "predicted": {"kl": chosen.score, **chosen.costs},
                "methods": [choice.method for choice in chosen.choices],
            }
            child = self.child(chosen)
            batches = self._batches("calibration")
            with progress(self.console, "calibrating the FP8 cache", len(batches)) as advance:
                scales = calibrate_cache(
                    self.parent.params, self.parent.config, batches, view=child.view, on_batch=lambda: advance(1)
                )
            export_child(self.parent.directory, out, child.config, child.kept, provenance=provenance, kv_scales=scales)

        inputs = ["solve/solutions.json", "traces/calibration.parquet"]
        return self._stage("assemble", {}, inputs, produce, directory="child")

    def _evaluate(self) -> Stage:
        settings = {
            **self.recipe.section("evaluate"),
            "traces": self.recipe.section("traces"),
            "scenario": self.recipe.section("scenario"),
            "device": device_identity(),
        }

        def produce(out: Path) -> None:
            _write(out / "evaluation.json", self._evaluation())

        inputs = ["solve/solutions.json", "cost/costs.json", "traces/heldout.parquet", "child"]
        return self._stage("evaluate", settings, inputs, produce)

    def _report(self) -> Stage:
        evaluation = self._needed("evaluate/evaluation.json")
        report = SearchReport(
            json.loads(evaluation.read_text()),
            self.recipe.traces.efforts,
            self.recipe.section("scenario"),
            self.recipe.run / "child",
        )

        def produce(out: Path) -> None:
            (out / "report.md").write_text(report.markdown())

        done = run_stage(self.run, "report", {}, [evaluation], produce)
        report.show(self.console)
        return done

    # What stages share ----------------------------------------------------------------------------------------------

    def child(self, candidate: Candidate) -> Child:
        """A chosen architecture as a view on the parent."""
        blocks = zip(candidate.kept, candidate.blocks, strict=True)
        return Child(self.parent.config, tuple(ChildBlock(kept, block.window) for kept, block in blocks))

    def candidates(self) -> dict[str, Candidate]:
        """Parent, chosen child and baselines by name, from solutions.json."""
        solutions = json.loads(self._needed("solve/solutions.json").read_text())
        found = {
            "parent": Candidate.from_json(solutions["parent"]),
            "child": Candidate.from_json(solutions["pool"][solutions["chosen"]]),
        }
        return found | {entry["name"]: Candidate.from_json(entry) for entry in solutions["baselines"]}

    def _evaluation(self) -> dict[str, Any]:
        config, params, scenario = self.parent.config, self.parent.params, self.recipe.scenario
        candidates = self.candidates()
        costs = read_costs(self._needed("cost/costs.json"))
        children = {name: self.child(candidate) for name, candidate in candidates.items()}
        batches = self._batches("heldout")
        with progress(self.console, "held-out KL", len(batches) * len(children)) as advance:
            scores = score_children(params, config, list(children.values()), batches, on_child=lambda: advance(1))
        questions = QuestionSet(
            self.recipe.traces.tasks,
            self.recipe.traces.efforts,
            self.recipe.evaluate.problems,
            "accuracy",
            self.recipe.evaluate.seed,
        )
        accuracy = {}
        with progress(self.console, "accuracy", len(children) * len(questions.questions())) as advance:
            for name, child in children.items():
                answers = answer_questions(
                    params,
                    config,
                    self.parent.chat,
                    questions,
                    max_tokens=self.recipe.traces.max_tokens,
                    slots=self.recipe.traces.batch_size,
                    view=child.view,
                    on_answer=lambda *_: advance(1),
                )
                accuracy[name] = {k: asdict(v) for k, v in by_effort(answers, questions.efforts).items()}
        dtype = params["embedding"].dtype
        exported = load_checkpoint(self._needed("child"))
        models = {name: (cut_params(params, child), child.config) for name, child in children.items()}
        models["child"] = (to_compute(exported.params, dtype), exported.config)
        rounds = self.recipe.evaluate.rounds
        with progress(self.console, "throughput", rounds) as advance:
            speeds = measure_throughput(
                models,
                batch=scenario.given_batch,
                input_tokens=scenario.input_tokens,
                output_tokens=scenario.output_tokens,
                rounds=rounds,
                on_round=lambda: advance(1),
            )
        form = self.parent.description.form
        return {
            name: {
                "parameters": count_params(children[name].config),
                "checkpoint_bytes": tensor_bytes(children[name].config, form),
                "expert_bytes": costs.expert_bytes(candidate.blocks),
                "kv_bytes": costs.kv_bytes(candidate.blocks),
                "predicted_tokens_per_second": costs.tokens_per_second(candidate.blocks),
                "throughput": _throughput(speeds[name]),
                "predicted_kl": candidate.score,
                "heldout": asdict(score),
                "efforts": accuracy[name],
                "missed": list(candidate.missed),
                "layers": candidate.to_json()["layers"],
            }
            for (name, candidate), score in zip(candidates.items(), scores, strict=True)
        }

    def _questions(self, split: str) -> QuestionSet:
        settings = self.recipe.traces
        return QuestionSet(settings.tasks, settings.efforts, getattr(settings, split), split, settings.seed)

    def _batches(self, split: str) -> list[Any]:
        return micro_batches(read_traces(self._needed(f"traces/{split}.parquet")))

    def _nominal_space(self) -> Space:
        """The space before any ranking: counts and windows are real, kept ids are not yet known."""
        blocks = self.parent.config.blocks
        choices = tuple(ExpertChoice(count, tuple(range(count)), "any") for count in self.counts)
        return Space(self.parent.config, (choices,) * len(blocks), self.windows)

    def _ranked_space(self) -> Space:
        """Every method's keep-set for every count, the parent's own first; equal sets are one."""
        tensors = load_file(self._needed("rank/ranking.safetensors"))
        ranking = Ranking({method: tensors[method] for method in METHODS}, tensors["routed"])
        layers = []
        for layer, block in enumerate(self.parent.config.blocks):
            everything = ExpertChoice(block.num_experts, tuple(range(block.num_experts)), "parent")
            kept = [
                ExpertChoice(count, ranking.keep(method, layer, count), method)
                for count in self.counts
                if count < block.num_experts
                for method in METHODS
            ]
            layers.append((everything, *distinct_choices(kept)))
        return Space(self.parent.config, tuple(layers), self.windows)

    @cached_property
    def _costs(self) -> Costs:
        return read_costs(self._needed("cost/costs.json"))

    def _problem(self) -> Problem:
        layers = json.loads(self._needed("score/scores.json").read_text())["layers"]
        space = Space.from_json(self.parent.config, layers)
        scores = Scores(
            experts=tuple(tuple(_kl(choice.get("score")) for choice in layer["experts"]) for layer in layers),
            attention=tuple(tuple(_kl(score) for score in layer["window_scores"]) for layer in layers),
        )
        return Problem(space, scores, self._costs, self.recipe.target)

    def _check_target(self) -> None:
        """Raises `InfeasibleError` now, in place of after scoring, when no architecture can meet the target."""
        space = self._nominal_space()
        zeros = Scores(
            experts=tuple(tuple(0.0 for _ in choices) for choices in space.expert_choices),
            attention=tuple(tuple(0.0 for _ in windows) for windows in space.windows),
        )
        Problem(space, zeros, self._costs, self.recipe.target).solve()

    def _stage(
        self,
        name: str,
        settings: dict[str, Any],
        inputs: list[str],
        produce: Callable[[Path], None],
        directory: str | None = None,
    ) -> Stage:
        paths = [self._needed(path) for path in inputs]
        return run_stage(self.run, name, settings, [self.parent.directory, *paths], produce, directory=directory)

    def _needed(self, path: str) -> Path:
        found = self.run / path
        if not found.exists():
            raise PuzzleError(f"{found} is missing; run the stages before it first (or all: `puzzle search`)")
        return found


def _throughput(speed: Spread) -> dict[str, float | int]:
    return {"tokens_per_second": speed.median, "low": speed.low, "high": speed.high, "rounds": speed.rounds}


def _mask(choice: ExpertChoice, experts: int) -> np.ndarray:
    mask = np.zeros(experts, bool)
    mask[list(choice.kept)] = True
    return mask


def _kl(score: dict[str, Any] | None) -> float:
    return 0.0 if score is None else score["kl"]


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
