"""The search from parent to child, stage by stage.

    cost      costs.json        bytes and seconds of every alternative
    trace     traces/*.parquet  the parent's own answers, in sets that share no problem
    rank      ranking.safetensors  every expert's score by every method; agreement.json, how much they agree;
              routing.json      how uneven the experts' loads are
    recost    costs.json        where the roofline gives the seconds, once more with those loads; else the same
    score     scores.json       the space of alternatives and the KL of each
    solve     solutions.json    the program's pool with its real KL on fresh traces, the chosen child, the baselines
    refine    refined.json      what was tried to get below that child, and the child in the end
    assemble  child/            the child's checkpoint, with scales for an FP8 cache
    evaluate  evaluation.json   KL, accuracy, tokens and speed of parent, child and baselines on what chose nothing
    report    report.html       the table, figures, stages; report.md is the table alone

Each stage reads files and writes files, so each runs alone, and one whose inputs and settings did not change is
skipped (`search.stages`). Costs come first: a target that cannot be reached is refused before long work.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.text import Text
from safetensors.numpy import load_file, save_file

from puzzle_jax.commands import mendable
from puzzle_jax.consoles import plain_console
from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.costs.compute import Offer, compute_costs
from puzzle_jax.costs.external import read_external
from puzzle_jax.costs.measured import Measured, device_identity
from puzzle_jax.costs.provider import Provider
from puzzle_jax.costs.roofline import Roofline
from puzzle_jax.costs.routing import routing_profile
from puzzle_jax.costs.table import Costs, read_costs
from puzzle_jax.costs.xla import Xla
from puzzle_jax.errors import ConfigError, PuzzleError, PuzzleWarning
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, unscored_note
from puzzle_jax.evaluate.journal import journaled_answers
from puzzle_jax.files import read_json
from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.calibrate import calibrate_cache
from puzzle_jax.generate.traces import Trace, read_traces, write_traces
from puzzle_jax.model.child import Child, ChildBlock, whole
from puzzle_jax.model.sharding import on_mesh
from puzzle_jax.progress import progress
from puzzle_jax.report.page import SearchPage, stage_records
from puzzle_jax.report.table import SearchReport
from puzzle_jax.runs import open_run
from puzzle_jax.search.evaluator import Judge
from puzzle_jax.search.processes import Team
from puzzle_jax.search.rank.ranking import METHODS, KeptSums, Ranking, rank_experts
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.search.refine.accept import Pool, refine
from puzzle_jax.search.refine.proposals import Refinement
from puzzle_jax.search.score.measurements import Measurements, longest_context
from puzzle_jax.search.score.replace_one import ReplaceOne, child_choices
from puzzle_jax.search.score.scores_file import scores_from_json, scores_to_json
from puzzle_jax.search.score.space_scorer import SpaceScorer
from puzzle_jax.search.solve.baselines import all_baselines
from puzzle_jax.search.solve.frontier import frontier, speedup, uniform_frontier
from puzzle_jax.search.solve.problem import Candidate, Problem, Scores
from puzzle_jax.search.space import (
    ExpertChoice,
    Space,
    candidate_counts,
    candidate_windows,
    distinct_choices,
    narrower_windows,
    restrict,
)
from puzzle_jax.search.split import split_traces
from puzzle_jax.search.stages import Stage, edited_output, run_stage
from puzzle_jax.search.worker import open_parent
from puzzle_jax.tasks import get_task

STAGES = ("cost", "trace", "rank", "recost", "score", "solve", "refine", "assemble", "evaluate", "report")
DIRECTORIES = {"trace": "traces", "assemble": "child"}
"""Of the stages that do not write into one of their own name."""

Windows = tuple[tuple[int | None, ...], ...]
"""Of every layer, the parent's own first."""

TRACE_SETS = ("calibration", "validation", "confirmation", "heldout")


class Search:
    """One search in one run directory.

    Args:
      recipe: all settings.
      console: where progress and tables go.
      team: of which this is the primary process.

    Raises `PuzzleError` at once for a parent that cannot be used, a run directory that holds something else, or a
    target that no architecture can reach by its bytes.
    """

    def __init__(self, recipe: Recipe, console: Console | None = None, team: Team | None = None) -> None:
        self.recipe, self.team = recipe, team or Team()
        self.console = console or plain_console(width=150)
        self.parent = open_parent(recipe)
        config, space = self.parent.config, recipe.space
        counts = candidate_counts(
            config.blocks[0].num_experts, config.experts_per_token, space.fractions, space.divisor
        )
        windows = candidate_windows(config, space.windows)
        self.counts, self.windows = restrict([counts] * config.num_layers, windows, space.restrict)
        self._check_questions()
        longest = max(recipe.scenarios, key=lambda scenario: scenario.context_tokens)
        self.windows, left_out = narrower_windows(self.windows, longest.context_tokens)
        if left_out := sorted({*left_out, *(w for w in space.windows if w >= config.max_position)}, reverse=True):
            _warn(
                f"space.windows: {_listed(left_out)} left out, since scenario {longest.name!r} never has more than "
                f"{longest.context_tokens} tokens in a request, which such a window covers"
            )
        self.run = open_run(recipe.run, {"kind": "search", "parent": self.parent.fingerprint})
        self.kept = self.run  # of the stage that runs

    def _judged_by(self) -> dict[str, str]:
        """What problems and scores depend on, by task."""
        return {task: get_task(task).identity for task in self.recipe.traces.tasks}

    def _check_questions(self) -> None:
        """Raises `ConfigError` for tasks that do not exist, and where nothing says what the parent is asked."""
        for task in self.recipe.traces.tasks:
            get_task(task)
        if not self.recipe.traces.tasks and self.recipe.traces.file is None:
            raise ConfigError(
                "traces.tasks is empty and traces.file is null, but a search needs problems to ask the parent, or its "
                "answers"
            )

    def execute(self, stage: str) -> Stage:
        """Runs one stage, or skips it when nothing changed.

        Raises `PuzzleError` when an earlier stage has not been run.
        """
        try:
            done: Stage = getattr(self, f"_{stage}")()
        except PuzzleError:
            raise
        except Exception as error:
            # What was edited is taken as it is; where it cannot be used, that is no bug of ours.
            edited = edited_output(self.run)
            if edited is None or mendable(error) is not None:
                raise
            raise PuzzleError(
                f"stage {stage!r} cannot use {edited}, which was changed after its stage wrote it "
                f"({type(error).__name__}: {error}); move {edited.parent} away to run that stage again"
            ) from error
        what = "unchanged, skipped" if done.skipped else f"{done.seconds:.1f} s"
        self.console.print(Text.assemble((f"{stage:<9}", "bold"), f" {what}"))
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
            "scenarios": self._scenarios,
            "counts": self.counts,
            "windows": self.windows,
        }

        def produce(out: Path) -> None:
            if external:
                costs = read_external(external, self._offer, self.recipe.scenarios, self.parent.description.form)
            else:
                with progress(self.console, "timing blocks", None) as advance:
                    costs = self._computed(self._provider(lambda _, turns: advance(1, turns)))
            _write(out / "costs.json", costs.to_json())

        inputs = [self.parent.directory / "config.json", *([external] if external else [])]
        done = self._run("cost", settings, inputs, produce)
        self._check_target()
        return done

    def _trace(self) -> Stage:
        file = self.recipe.traces.file
        done = self._asked_traces() if file is None else self._given_traces(file)
        longest = longest_context(self.traces("calibration"))
        evidenced, left_out = narrower_windows(self.windows, longest)
        if left_out:
            _warn(
                f"space.windows: {_listed(left_out)} left out, since the longest calibration trace has only "
                f"{longest + 1} tokens, which is no evidence of what such a window costs"
            )
        if evidenced != self.windows:
            self._check_target()
        return done

    def _asked_traces(self) -> Stage:
        """The sets of traces from problems that the parent is asked."""
        settings = self.recipe.traces

        def produce(out: Path) -> None:
            sets = {name: self._questions(name) for name in TRACE_SETS}
            with progress(self.console, "answering", sum(len(s.questions()) for s in sets.values())) as advance:
                for name, questions in sets.items():
                    ask = partial(
                        answer_questions,
                        self.parent.params,
                        self.parent.config,
                        self.parent.chat,
                        questions,
                        max_tokens=settings.max_tokens,
                        temperature=settings.temperature,
                        slots=settings.batch_size,
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
                    write_traces(out / f"{name}.parquet", answers)

        asked = {**self.recipe.section("traces"), "judged_by": self._judged_by()}
        return self._stage("trace", asked, [], produce, directory="traces")

    def _given_traces(self, file: Path) -> Stage:
        """The sets of traces from the user's own file."""
        settings = self.recipe.traces
        shares = {name: getattr(settings, name) for name in TRACE_SETS}

        def produce(out: Path) -> None:
            traces = read_traces(file, self.parent.chat)
            for name, of_set in split_traces(traces, shares, self.parent.config, file, settings.seed).items():
                write_traces(out / f"{name}.parquet", of_set)

        return self._run("trace", {**shares, "seed": settings.seed}, [file, self.parent.directory], produce, "traces")

    def _rank(self) -> Stage:
        def produce(out: Path) -> None:
            batches = self._batches("calibration")
            with progress(self.console, "ranking experts", len(batches)) as advance:
                ranking = rank_experts(
                    self.parent.params,
                    self.parent.config,
                    batches,
                    on_batch=lambda: advance(1),
                    mesh=self.parent.mesh,
                    kept=KeptSums(self.kept / "sums.safetensors"),
                )
            save_file({**ranking.scores, "routed": ranking.routed}, out / "ranking.safetensors")
            half = self.parent.config.blocks[0].num_experts // 2
            agreement = ranking.agreement([max(half, self.parent.config.experts_per_token)])
            _write(out / "agreement.json", {f"{one}, {other}": share for (one, other), share in agreement.items()})
            _write(out / "routing.json", routing_profile(ranking.routed))

        return self._stage("rank", {"methods": METHODS}, ["traces/calibration.parquet"], produce)

    def _recost(self) -> Stage:
        def produce(out: Path) -> None:
            costs = read_costs(self._needed("cost/costs.json"))
            if costs.provider == "roofline" and self.recipe.external_costs is None:
                loads = read_json(self._needed("rank/routing.json"))
                costs = self._computed(Roofline(profile=tuple(loads)))
            _write(out / "costs.json", costs.to_json())

        return self._stage("recost", {}, ["cost/costs.json", "rank/routing.json"], produce)

    def _score(self) -> Stage:
        adaptive = self.recipe.score.method == "adaptive"

        def produce(out: Path) -> None:
            space = self.ranked_space()
            self.console.print(space.describe())
            scored = self.scorer(None)(space, self.run / "score-book.safetensors", self.identity)
            pairs, listed = int(scored.book.scored.sum()), len(scored.numbered.listed)
            everything = scored.proposed * len(scored.book.traces)
            self.console.print(
                f"{listed} of {scored.proposed} alternatives scored, on {pairs / max(listed, 1):.0f} of "
                f"{len(scored.book.traces)} traces in the mean",
                highlight=False,
            )
            _write(out / "scores.json", {"layers": scores_to_json(scored), "pairs": pairs, "all_pairs": everything})

        settings = {
            **self.recipe.section("score"),
            "counts": self.counts,
            "windows": self.evidenced_windows,
            "seed": self.recipe.traces.seed,
            "target": self.recipe.section("target") if adaptive else None,
        }
        inputs = ["traces/calibration.parquet", "rank/ranking.safetensors"]
        return self._stage("score", settings, [*inputs, *(["recost/costs.json"] if adaptive else [])], produce)

    def _solve(self) -> Stage:
        settings = {name: self.recipe.section(name) for name in ("solve", "target", "child")}

        def produce(out: Path) -> None:
            problem = self.problem()
            baselines = all_baselines(problem)
            pool = self.pool(problem, [baselines[name] for name in ("greedy", "experts_only", "windows_only")])
            _write(
                out / "solutions.json",
                {
                    "chosen": pool.best,
                    "rank_correlation": pool.rank_correlation,
                    "pool": pool.to_json(),
                    "parent": problem.parent().to_json(),
                    "baselines": [baseline.to_json() for baseline in baselines.values()],
                    "frontier": [asdict(point) for point in frontier(problem)],
                    "uniform": [asdict(point) for point in uniform_frontier(problem)],
                },
            )

        inputs = ["score/scores.json", "recost/costs.json", "traces/validation.parquet"]
        return self._stage("solve", settings, inputs, produce)

    def _refine(self) -> Stage:
        settings = {name: self.recipe.section(name) for name in ("refine", "score", "solve", "target", "child")}

        def produce(out: Path) -> None:
            solutions = read_json(self._needed("solve/solutions.json"))
            chosen = Candidate.from_json(solutions["pool"][solutions["chosen"]])
            options = self.recipe.refine
            around = Refinement(self)
            proposals = options.proposals if options.swaps else 0
            child, tried = refine(chosen, options.rounds, around.rescored, proposals, around.swapped, around.confirm)
            for step in tried:
                self.console.print(f"{step}", highlight=False)
            _write(out / "refined.json", {"child": child.to_json(), "tried": [step.to_json() for step in tried]})

        inputs = ["solve/solutions.json", "score/scores.json", "rank/ranking.safetensors", "recost/costs.json"]
        return self._stage(
            "refine", settings, [*inputs, *(f"traces/{name}.parquet" for name in TRACE_SETS[:3])], produce
        )

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
            calibrating = progress(self.console, "calibrating the FP8 cache", len(batches))
            with calibrating as advance, on_mesh(self.parent.mesh):
                scales = calibrate_cache(
                    self.parent.params, child.viewed, batches, view=child.view, on_batch=lambda: advance(1)
                )
            export_child(self.parent.directory, out, child.config, child.kept, provenance=provenance, kv_scales=scales)

        inputs = ["solve/solutions.json", "refine/refined.json", "traces/calibration.parquet"]
        return self._stage("assemble", {"child": self.recipe.section("child")}, inputs, produce, directory="child")

    def _evaluate(self) -> Stage:
        traces = self.recipe.section("traces")
        settings = {
            **self.recipe.section("evaluate"),
            "questions": {name: traces[name] for name in ("tasks", "efforts", "max_tokens", "batch_size")},
            "judged_by": self._judged_by(),
            "scenarios": self._scenarios,
            "own": self.recipe.section("child"),
            "device": device_identity(),
        }

        def produce(out: Path) -> None:
            shown = ("parent", "child", *self.recipe.evaluate.baselines)
            candidates = {name: found for name, found in self.candidates().items() if name in shown}
            children = {name: self.child(found) for name, found in candidates.items() if name != "parent"}
            children = {"parent": whole(self.parent.config), **children}
            heldout, exported = self.traces("heldout"), self._needed("child")
            _write(out / "evaluation.json", self.judge.compare(candidates, children, heldout, self._costs, exported))

        inputs = ["solve/solutions.json", "refine/refined.json", "recost/costs.json", "traces/heldout.parquet", "child"]
        return self._stage("evaluate", settings, inputs, produce)

    def _report(self) -> Stage:
        report = SearchReport(
            read_json(self._needed("evaluate/evaluation.json")),
            self.recipe.traces.efforts,
            self._scenarios,
            self.recipe.run / "child",
        )
        inputs = [f"{DIRECTORIES.get(stage, stage)}/stage.json" for stage in STAGES[: STAGES.index("report")]]

        def produce(out: Path) -> None:
            self._page(report).write(out)

        done = self._run("report", {}, [self._needed(path) for path in inputs], produce)
        report.show(self.console)
        where = Text.assemble("Figures and stages: ", (str(self.recipe.run / "report/report.html"), "bold"))
        self.console.print(where, highlight=False)
        return done

    def _page(self, report: SearchReport) -> SearchPage:
        contents = {
            name: read_json(self._needed(path))
            for name, path in (
                ("scores", "score/scores.json"),
                ("solutions", "solve/solutions.json"),
                ("refined", "refine/refined.json"),
            )
        }
        candidates = self.candidates()
        compared = {name: candidates[name] for name in ("parent", "child", "uniform")}
        seconds = {
            scenario.name: {name: self._seconds_per_request(c, scenario.name) for name, c in compared.items()}
            for scenario in self._costs.scenarios
        }
        child = {"speedup": speedup(self.problem(), candidates["child"]), "score": candidates["child"].score}
        records = stage_records(self.run, [(stage, DIRECTORIES.get(stage, stage)) for stage in STAGES])
        return SearchPage(report, **contents, seconds=seconds, child=child, stages=records)

    def _seconds_per_request(self, candidate: Candidate, scenario: str) -> dict[str, float]:
        batch = candidate.batches[scenario]
        seconds = self._costs.seconds_by_part(candidate.blocks, scenario, batch)
        return {part: of_batch / batch for part, of_batch in seconds.items()}

    # What stages share ----------------------------------------------------------------------------------------------

    def child(self, candidate: Candidate) -> Child:
        """A chosen architecture as a view on the parent."""
        kept = zip(candidate.kept, candidate.blocks, strict=True)
        blocks = tuple(ChildBlock(of_layer, block.window) for of_layer, block in kept)
        factor, rope = self.recipe.child.yarn_factor, self.parent.config.rope
        return Child(self.parent.config, blocks, rope=None if factor is None else replace(rope, factor=factor))

    def candidates(self) -> dict[str, Candidate]:
        """Parent, child and baselines by name, from solutions.json and refined.json."""
        solutions = read_json(self._needed("solve/solutions.json"))
        refined = read_json(self._needed("refine/refined.json"))
        found = {"parent": Candidate.from_json(solutions["parent"]), "child": Candidate.from_json(refined["child"])}
        return found | {entry["name"]: Candidate.from_json(entry) for entry in solutions["baselines"]}

    def _questions(self, split: str) -> QuestionSet:
        settings = self.recipe.traces
        return QuestionSet(settings.tasks, settings.efforts, getattr(settings, split), split, settings.seed)

    def _batches(self, split: str) -> list[Any]:
        return micro_batches(read_traces(self._needed(f"traces/{split}.parquet")))

    def traces(self, split: str) -> list[Trace]:
        return list(read_traces(self._needed(f"traces/{split}.parquet")))

    @property
    def judge(self) -> Judge:
        return Judge(self.parent, self.recipe, self.parent.mesh, self.console, self.team, self.kept, self.identity)

    def measure(self, children: Sequence[Child], split: str) -> Measurements:
        """KL of whole children on a set of traces."""
        return self.judge.divergence(children, self.traces(split), split)

    @property
    def evidenced_windows(self) -> Windows:
        """Windows that some calibration trace is longer than; before there are traces, all that are of use."""
        if not (self.run / "traces/calibration.parquet").exists():
            return self.windows
        return narrower_windows(self.windows, longest_context(self.traces("calibration")))[0]

    def _nominal_space(self, windows: Windows) -> Space:
        """The space before any ranking: counts and windows are real, kept ids are not yet known."""
        choices = tuple(
            tuple(ExpertChoice(count, tuple(range(count)), "any") for count in counts) for counts in self.counts
        )
        return Space(self.parent.config, choices, windows)

    @cached_property
    def ranking(self) -> Ranking:
        tensors = load_file(self._needed("rank/ranking.safetensors"))
        return Ranking({method: tensors[method] for method in METHODS}, tensors["routed"])

    def ranked_space(self) -> Space:
        """Every method's keep-set for every count, the parent's own first where it is allowed; equal sets are one."""
        layers = []
        for layer, (block, counts) in enumerate(zip(self.parent.config.blocks, self.counts, strict=True)):
            everything = ExpertChoice(block.num_experts, tuple(range(block.num_experts)), "parent")
            kept = [
                ExpertChoice(count, self.ranking.keep(method, layer, count), method)
                for count in counts
                if count < block.num_experts
                for method in METHODS
            ]
            whole = [everything] if block.num_experts in counts else []
            layers.append((*whole, *distinct_choices(kept)))
        return Space(self.parent.config, tuple(layers), self.evidenced_windows)

    @property
    def identity(self) -> str:
        """What scores depend on besides alternatives and traces."""
        return json.dumps([self.parent.fingerprint, jax.__version__])

    def scorer(self, base: Child | None) -> SpaceScorer:
        """Scores alternatives around the parent or around a child of it."""
        settings = self.recipe.score
        run = ReplaceOne(
            self.parent.params,
            self.parent.config,
            None if base is None else child_choices(base),
            None if base is None else base.rope,
            per_call=settings.per_call,
            keep_every=settings.keep_every,
            mesh=self.parent.mesh,
        )
        traces, seed = self.traces("calibration"), self.recipe.traces.seed
        return SpaceScorer(run, traces, settings, self.problem_of, self.console, seed, self.team)

    def pool(self, problem: Problem, others: Sequence[Candidate] = ()) -> Pool:
        """The program's solutions, and others that meet the target, run whole on the validation traces.

        The program's are best by the sum of scores, which is not quite the whole model's KL; that of other choices may
        be lower.
        """
        options = self.recipe.solve
        found = problem.solve(num_solutions=options.solutions, time_limit=options.time_limit, gap=options.gap)
        known = {(candidate.blocks, candidate.kept) for candidate in found}
        found += [other for other in others if other.meets_target and (other.blocks, other.kept) not in known]
        return self.measured_pool(found)

    def measured_pool(self, candidates: Sequence[Candidate]) -> Pool:
        """Candidates run whole on the validation traces."""
        return Pool(candidates, *self.measure([self.child(c) for c in candidates], "validation"))

    @cached_property
    def _costs(self) -> Costs:
        return read_costs(self._needed("recost/costs.json"))

    @property
    def _scenarios(self) -> list[dict[str, Any]]:
        return [scenario.to_json() for scenario in self.recipe.scenarios]

    def _provider(self, progress: Callable[[int, int], None]) -> Provider:
        """Where the recipe has seconds come from; `progress` is called with turns done and all turns."""
        if self.recipe.costs == "measured":
            return Measured(progress=progress)
        return Xla(progress=progress) if self.recipe.costs == "xla" else Roofline()

    def _computed(self, provider: Provider) -> Costs:
        return compute_costs(
            self._offer, self.recipe.scenarios, self.parent.description.form, provider, memory=Roofline()
        )

    @property
    def _offer(self) -> Offer:
        return Offer(self.parent.config, self.counts, self.windows)

    def scored_layers(self) -> Any:
        """What scores.json holds of every layer."""
        return read_json(self._needed("score/scores.json"))["layers"]

    def problem(self) -> Problem:
        layers = self.scored_layers()
        return self.problem_of(Space.from_json(self.parent.config, layers), scores_from_json(layers))

    def problem_of(self, space: Space, scores: Scores) -> Problem:
        return Problem(space, scores, self._costs, self.recipe.target)

    def _check_target(self) -> None:
        """Raises `InfeasibleError` now, in place of after scoring, when no architecture can meet the target."""
        space = self._nominal_space(self.evidenced_windows)
        zeros = Scores(
            experts=tuple(tuple(0.0 for _ in choices) for choices in space.expert_choices),
            attention=tuple(tuple(0.0 for _ in windows) for windows in space.windows),
        )
        Problem(space, zeros, read_costs(self._needed("cost/costs.json")), self.recipe.target).solve()

    def _stage(
        self,
        name: str,
        settings: dict[str, Any],
        inputs: list[str],
        produce: Callable[[Path], None],
        directory: str | None = None,
    ) -> Stage:
        paths = [self._needed(path) for path in inputs]
        return self._run(name, settings, [self.parent.directory, *paths], produce, directory)

    def _run(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Sequence[Path],
        produce: Callable[[Path], None],
        directory: str | None = None,
    ) -> Stage:
        """Runs a stage unless it is up to date; while it runs, `kept` is what it may go on from."""

        def with_kept(out: Path, kept: Path) -> None:
            self.kept = kept
            produce(out)

        return run_stage(self.run, name, settings, inputs, with_kept, directory=directory)

    def _needed(self, path: str) -> Path:
        found = self.run / path
        if not found.exists():
            raise PuzzleError(f"{found} is missing; run the stages before it first (or all: `puzzle search`)")
        return found


def _listed(windows: Sequence[int]) -> str:
    return ", ".join(map(str, windows))


def _warn(message: str) -> None:
    warnings.warn(message, PuzzleWarning, stacklevel=2)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
