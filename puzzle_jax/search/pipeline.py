"""The search from parent to child, stage by stage.

    cost          bytes and seconds of every alternative
    trace         the parent's own answers, in sets that share no problem
    rank          every expert's score by every rule
    refine_costs  the roofline's seconds with the expert loads that the traces showed
    score         the space of alternatives and the KL of each
    solve         the integer program's pool with its real KL on fresh traces, the chosen child, the baselines
    finalists     if asked for: children that see far in other layers, trained for a while, and the one that learns best
    refine        attempts to lower that child's KL, and the final child
    assemble      the child's checkpoint, with scales for an FP8 cache
    evaluate      KL, accuracy, tokens and speed of parent, child and baselines on data that had no part in the choice
    report        the table, figures and a record of the stages

`STAGES` says what each stage reads, which settings it depends on, and which function produces its files; the files are
listed in `search.artifacts`. A stage can also be run alone, and is skipped when its inputs and settings have not
changed (`stages`). Costs come first, so that an unreachable target is refused before the long stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text

from puzzle_jax.commands import mendable
from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.costs.hardware import device_identity
from puzzle_jax.costs.routing import routing_profile
from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.calibrate import calibrate_cache
from puzzle_jax.generate.traces import read_traces
from puzzle_jax.model.child import identity_child
from puzzle_jax.model.sharding import on_mesh
from puzzle_jax.progress import progress
from puzzle_jax.search.artifacts import (
    AGREEMENT,
    CHILD,
    COSTS,
    EVALUATION,
    FINALISTS,
    RANKING,
    REFINED,
    REFINED_COSTS,
    ROUTING,
    SCORE_TABLE,
    SCORES,
    SOLUTIONS,
    TRACES,
    Artifact,
    expected_of_refined,
    final_candidates,
    find,
)
from puzzle_jax.search.context import Search, decided_candidates, warn_of_windows
from puzzle_jax.search.copies import Copies, run_stage
from puzzle_jax.search.costing import check_target, cost, cost_inputs, cost_settings, refine_costs
from puzzle_jax.search.finalists.stage import contest_of
from puzzle_jax.search.hours.left import Reported, by_stage, present_hardware, time_left_of, work_of
from puzzle_jax.search.hours.measured import MeasuredSearch, StageHours
from puzzle_jax.search.rank.ranking import rank_experts
from puzzle_jax.search.rank.rows import packed_traces
from puzzle_jax.search.rank.rules import RULES
from puzzle_jax.search.rank.statistics import KeptSums
from puzzle_jax.search.recipe import TRACE_SETS, TRAINING, Recipe
from puzzle_jax.search.refine.stage import refined_child
from puzzle_jax.search.report_page import show_report, write_report
from puzzle_jax.search.score.measurements import longest_context
from puzzle_jax.search.score.scores_file import scores_to_json
from puzzle_jax.search.solve.baselines import all_baselines
from puzzle_jax.search.solve.floors import check_members
from puzzle_jax.search.solve.frontier import frontier, uniform_frontier
from puzzle_jax.search.space import narrower_windows
from puzzle_jax.search.traces import ask_parent, ended, split_traces
from puzzle_jax.stages import Stage, StageResult, edited_output


def run_stages(search: Search, name: str = "all") -> list[StageResult]:
    """Runs the stage of that name, or all stages in order; those that are up to date are skipped.

    Returns:
      The stages' results; an empty list in processes other than the primary one.

    Raises `PuzzleError` when an earlier stage has not been run.
    """
    copies, reported = Copies(search.run), Reported(partial(time_left_of, search))
    results: list[StageResult] = []
    for stage in stages_of(search.recipe):
        if name in ("all", stage.name):
            result = _run(stage, search, copies)
            if result is None:
                continue
            results.append(result)
            what = "unchanged, skipped" if result.skipped else f"{result.seconds:.1f} s"
            left = reported.finished(stage.name, None if result.skipped else result.seconds) if name == "all" else ""
            search.console.print(Text.assemble((f"{stage.name:<12}", "bold"), f" {what}{left}"))
    if name == "all" and search.primary and not all(result.skipped for result in results):
        measured_of(search, results).write(search.run)
    return results


def measured_of(search: Search, results: Sequence[StageResult]) -> MeasuredSearch:
    """The measured seconds of a search's stages on the devices present."""
    hardware = present_hardware()
    work = work_of(search, hardware)
    roofline = by_stage(work)
    stages = (
        StageHours(result.name, result.seconds, result.compile_seconds, roofline.get(result.name, 0.0))
        for result in results
    )
    return MeasuredSearch(hardware, work.prompt_tokens, work.answer_share, tuple(stages))


def _run(stage: Stage[Search], search: Search, copies: Copies) -> StageResult | None:
    try:
        return run_stage(stage, search, copies)
    except PuzzleError:
        raise
    except Exception as error:
        # Edited files are used as they are, so one that cannot be used is not a bug of ours.
        edited = edited_output(search.run)
        if edited is None or mendable(error) is not None:
            raise
        raise PuzzleError(
            f"stage {stage.name!r} cannot use {edited}, which was changed after its stage wrote it "
            f"({type(error).__name__}: {error}); move {edited.parent} away to run that stage again"
        ) from error


def _inputs(search: Search, *inputs: Artifact[Any]) -> list[Path]:
    """The parent and some files of the run."""
    return [search.parent.directory, *(each.find(search.run) for each in inputs)]


def _sections(search: Search, *names: str) -> dict[str, Any]:
    return {name: search.recipe.section(name) for name in names}


# The work of the stages: each function writes the files of its stage into `out`; `kept` survives a killed process. All
# processes of a search call it, but only what the primary one writes counts.


def by_primary(produce: Callable[[Search, Path, Path], None]) -> Callable[[Search, Path, Path], None]:
    """Wraps the function of a stage whose work only the primary process needs to do."""

    def alone(search: Search, out: Path, kept: Path) -> None:
        if search.primary:
            produce(search, out, kept)

    return alone


def trace_inputs(search: Search) -> list[Path]:
    file = search.recipe.traces.file
    return [search.parent.directory] if file is None else [file, search.parent.directory]


def trace_settings(search: Search) -> dict[str, Any]:
    if search.recipe.traces.file is None:
        asked = {name: problems for name, problems in search.recipe.trace_sets.items() if name == TRAINING}
        return {**search.recipe.section("traces"), **asked, "judged_by": search.task_identities}
    of_file = search.recipe.traces
    return {**search.recipe.trace_sets, "seed": of_file.seed, "ended_only": of_file.ended_only}


def trace(search: Search, out: Path, kept: Path) -> None:
    settings = search.recipe.traces
    if settings.file is None:
        sets = ask_parent(search.parent, search.recipe, kept, search.console)
    elif not search.primary:
        return
    else:
        traces = read_traces(settings.file, search.parent.chat)
        sets = split_traces(
            traces, search.recipe.trace_sets, search.parent.config, settings.file, settings.seed
        ).items()
    for name, traces in sets:
        TRACES[name].write(out, ended(traces, name) if settings.ended_only and name != "heldout" else traces)


def check_traces(search: Search) -> None:
    """Warns of windows that no trace exceeds, checks that the target can be reached without them, and that there are
    traces of every group whose KL it limits."""
    for name in TRACE_SETS[:3]:
        check_members(search.kl_limits, search.traces(name) if search.kl_limits else (), name)
    longest = longest_context(search.traces("calibration"))
    evidenced, left_out = narrower_windows(search.windows, longest)
    warn_of_windows(
        left_out,
        f"the longest calibration trace has only {longest + 1} tokens, which is no evidence of what such a window "
        "costs",
    )
    if evidenced != search.windows:
        check_target(search)


def rank(search: Search, out: Path, kept: Path) -> None:
    config, batches = search.parent.config, packed_traces(search.traces("calibration"))
    with progress(search.console, "ranking experts", len(batches)) as advance:
        ranking = rank_experts(
            search.parent.params,
            config,
            batches,
            on_batch=lambda: advance(1),
            mesh=search.parent.mesh,
            kept=KeptSums(kept / "sums.safetensors"),
        )
    agreement = ranking.agreement([max(config.blocks[0].num_experts // 2, config.experts_per_token)])
    RANKING.write(out, ranking)
    AGREEMENT.write(out, {f"{one}, {other}": share for (one, other), share in agreement.items()})
    ROUTING.write(out, routing_profile(ranking.routed))


def score_inputs(search: Search) -> list[Path]:
    adaptive = [REFINED_COSTS] if search.recipe.score.method == "adaptive" else []
    return _inputs(search, TRACES["calibration"], RANKING, *adaptive)


def score_settings(search: Search) -> dict[str, Any]:
    limited = not search.recipe.target.max_kl.is_empty
    return {
        **search.recipe.section("score"),
        "rules": search.recipe.rank.rules,
        "counts": search.counts,
        "windows": search.evidenced_windows,
        "seed": search.recipe.traces.seed,
        "target": search.recipe.section("target") if search.recipe.score.method == "adaptive" or limited else None,
    }


def score(search: Search, out: Path, kept: Path) -> None:
    space = search.ranked_space()
    search.console.print(space.describe())
    entropies = search.entropies()
    scored = search.scorer(entropy=entropies)(space, search.run / SCORE_TABLE, search.identity)
    pairs, listed, traces = int(scored.table.scored.sum()), len(scored.indexed.listed), len(scored.table.traces)
    search.console.print(
        f"{listed} of {scored.proposed} alternatives scored, on {pairs / max(listed, 1):.0f} of {traces} traces in the "
        "mean",
        highlight=False,
    )
    found = {"layers": scores_to_json(scored), "pairs": pairs, "all_pairs": scored.proposed * traces}
    SCORES.write(out, {**found, "entropy": entropies} if search.kl_limits else found)


def solve(search: Search, out: Path, kept: Path) -> None:
    problem = search.problem()
    baselines = {found.name: found for found in decided_candidates(lambda: list(all_baselines(problem).values()))}
    others = [baselines[name] for name in ("greedy", "experts_only", "windows_only")]
    pool = search.pool(problem, search.evaluator(kept), others)
    if not search.primary:
        return
    for sentence in pool.candidates[pool.best].violated:
        search.console.print(f"no solution keeps every limit of target.max_kl: {sentence}", highlight=False)
    solutions = {
        "chosen": pool.best,
        "rank_correlation": pool.rank_correlation,
        "pool": pool.to_json(),
        "parent": problem.parent().to_json(),
        "baselines": [baseline.to_json() for baseline in baselines.values()],
        "frontier": [asdict(point) for point in frontier(problem)],
        "uniform": [asdict(point) for point in uniform_frontier(problem)],
    }
    SOLUTIONS.write(out, solutions)


def finalists(search: Search, out: Path, kept: Path) -> None:
    contest = contest_of(search, kept)
    search.console.print(contest.table())
    FINALISTS.write(out, contest.to_json())


def refine_child(search: Search, out: Path, kept: Path) -> None:
    child, expected, tried = refined_child(search, kept)
    for step in tried:
        search.console.print(f"{step}", highlight=False)
    tries = [step.to_json() for step in tried]
    REFINED.write(out, {"child": child.to_json(), "expected": expected, "tried": tries})


def assemble(search: Search, out: Path, kept: Path) -> None:
    chosen = final_candidates(search.run)["child"]
    provenance = {
        "parent": str(search.parent.directory),
        "predicted": {"kl": chosen.score, **chosen.costs},
        "methods": [choice.method for choice in chosen.choices],
    }
    child, batches = search.child(chosen), search.batches("calibration")
    calibrating = progress(search.console, "calibrating the FP8 cache", len(batches))
    with calibrating as advance, on_mesh(search.parent.mesh):
        scales = calibrate_cache(
            search.parent.params, child.viewed, batches, view=child.view, on_batch=lambda: advance(1)
        )
    if search.primary:
        export_child(search.parent.directory, out, child.config, child.kept, provenance=provenance, kv_scales=scales)


def evaluate_settings(search: Search) -> dict[str, Any]:
    traces = search.recipe.section("traces")
    return {
        **search.recipe.section("evaluate"),
        "questions": {name: traces[name] for name in ("tasks", "efforts", "max_tokens", "batch_size")},
        "judged_by": search.task_identities,
        "scenarios": search.scenarios,
        "own": search.recipe.section("child"),
        "device": device_identity(),
    }


def evaluate(search: Search, out: Path, kept: Path) -> None:
    shown = ("parent", "child", *search.recipe.evaluate.baselines)
    candidates = {name: found for name, found in final_candidates(search.run).items() if name in shown}
    children = {name: search.child(found) for name, found in candidates.items()}
    children["parent"] = identity_child(search.parent.config)  # without the child's own rotary settings
    found = search.evaluator(kept).compare(
        candidates, children, search.traces("heldout"), search.costs, search.run / CHILD
    )
    found["child"]["expected_kl"] = expected_of_refined(search.run)
    EVALUATION.write(out, found)


def report(search: Search, out: Path, kept: Path) -> None:
    write_report(search, out, [(each.name, each.directory or each.name) for each in stages_of(search.recipe)])


# The stages ----------------------------------------------------------------------------------------------------------

STAGES: tuple[Stage[Search], ...] = (
    Stage("cost", cost_inputs, cost_settings, by_primary(cost), finish=check_target),
    Stage("trace", trace_inputs, trace_settings, trace, directory="traces", finish=check_traces),
    Stage("rank", lambda s: _inputs(s, TRACES["calibration"]), lambda _: {"rules": list(RULES)}, rank),
    Stage("refine_costs", lambda s: _inputs(s, COSTS, ROUTING), lambda _: {}, by_primary(refine_costs)),
    Stage("score", score_inputs, score_settings, score),
    Stage(
        "solve",
        lambda s: _inputs(s, SCORES, REFINED_COSTS, TRACES["validation"]),
        lambda s: {**_sections(s, "solve", "target", "child"), "ending": s.recipe.score.ending},
        solve,
    ),
    Stage(
        "refine",
        lambda s: (
            _inputs(s, SOLUTIONS, SCORES, RANKING, REFINED_COSTS, *(TRACES[n] for n in TRACE_SETS[:3]))
            + ([FINALISTS.find(s.run)] if s.recipe.finalists.count else [])
        ),
        lambda s: {**_sections(s, "refine", "score", "solve", "target", "child"), "seed": s.recipe.traces.seed},
        refine_child,
    ),
    Stage(
        "assemble",
        lambda s: _inputs(s, SOLUTIONS, REFINED, TRACES["calibration"]),
        lambda s: _sections(s, "child"),
        assemble,
        directory=CHILD,
    ),
    Stage(
        "evaluate",
        lambda s: [
            *_inputs(s, SOLUTIONS, REFINED, REFINED_COSTS, TRACES["heldout"]),
            find(s.run, CHILD),
        ],
        evaluate_settings,
        evaluate,
    ),
    Stage(
        "report",
        lambda s: [find(s.run, f"{stage.directory or stage.name}/stage.json") for stage in stages_of(s.recipe)[:-1]],
        lambda _: {},
        by_primary(report),
        finish=show_report,
    ),
)

STAGE_NAMES = tuple(stage.name for stage in STAGES)

FINALISTS_STAGE = Stage[Search](
    "finalists",
    lambda s: _inputs(s, SOLUTIONS, SCORES, REFINED_COSTS, TRACES["validation"], TRACES[TRAINING]),
    lambda s: {
        **_sections(s, "finalists", "solve", "target", "child"),
        "ending": s.recipe.score.ending,
        "seed": s.recipe.traces.seed,
    },
    finalists,
)


def stages_of(recipe: Recipe) -> tuple[Stage[Search], ...]:
    """The stages of a search with these settings, in order."""
    if not recipe.finalists.count:
        return STAGES
    before = STAGE_NAMES.index("refine")
    return (*STAGES[:before], FINALISTS_STAGE, *STAGES[before:])
