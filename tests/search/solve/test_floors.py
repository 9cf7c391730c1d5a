"""Floors against an enumeration of all architectures of a small space, and by measured KLs."""

import random as random_numbers
from dataclasses import replace

import numpy as np
import pytest

from puzzle_jax.costs.scenario import Group, KlLimit, Target
from puzzle_jax.errors import ConfigError, InfeasibleError
from puzzle_jax.generate.traces import Trace
from puzzle_jax.search.score.adaptive import RelaxedProgram
from puzzle_jax.search.solve.baselines import all_baselines
from puzzle_jax.search.solve.floors import ALL, Floor, MeasuredFloors, check_members, floors_of, tightened
from puzzle_jax.search.solve.frontier import frontier
from puzzle_jax.search.solve.problem import Candidate, Problem, Scores, window_name
from tests.search.solve.test_baselines import BOTH, CHOICES, COSTS, SPACE, every, problem_of

HIGH, RECALL = Group(None, "high"), Group("recall", None)


def limit(group, form, value):
    return KlLimit(group, form, value)


def grouped(limits, seed=0, target=BOTH, entropy=None, base=None):
    """A problem with random scores, and scores of two groups that differ from them."""
    problem, source = problem_of(target, seed), random_numbers.Random(seed + 100)

    def scaled(rows):
        return tuple(tuple(score * source.uniform(0.0, 3.0) for score in row) for row in rows)

    scores = problem.scores
    groups = {group.name: Scores(scaled(scores.experts), scaled(scores.attention)) for group in (HIGH, RECALL)}
    floors = floors_of(limits, entropy or {}, base)
    return replace(problem, scores=replace(scores, groups=groups), floors=floors)


def group_sum(problem, candidate, name):
    """The sum of a group's scores over an architecture, by hand."""
    scores = problem.scores if name == ALL else problem.scores.groups[name]
    total = 0.0
    for layer, (choice, block) in enumerate(zip(candidate.choices, candidate.blocks, strict=True)):
        total += scores.experts[layer][CHOICES.index(choice)]
        names = [window_name(window) for window in SPACE.windows[layer]]
        total += scores.attention[layer][names.index(window_name(block.window))]
    return total


CASES = [
    [limit(RECALL, "nats", 7.5)],
    [limit(RECALL, "times_mean", 1.1)],
    [limit(RECALL, "times_mean", 1.7), limit(HIGH, "times_mean", 2)],
    [limit(HIGH, "share_of_entropy", 0.25), limit(HIGH, "times_mean", 1.25)],
]


def holds(problem, candidate, limits, entropy):
    mean = group_sum(problem, candidate, ALL)
    bounds = {
        "nats": lambda each: each.value,
        "times_mean": lambda each: each.value * mean,
        "share_of_entropy": lambda each: each.value * entropy[each.group.name],
    }
    return all(group_sum(problem, candidate, each.group.name) <= bounds[each.form](each) + 1e-9 for each in limits)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("limits", CASES, ids=range(len(CASES)))
def test_the_solution_is_the_best_of_those_that_keep_the_floors(limits, seed):
    entropy = {"high": 36.0}
    problem = grouped(limits, seed, entropy=entropy)
    within = [c for c in every(problem_of(BOTH, seed)) if c.meets_target]
    met = [c for c in within if holds(problem, c, limits, entropy)]
    assert 0 < len(met) < len(within)  # the floors exclude something
    [best] = problem.solve(gap=0.0)
    assert best.score == pytest.approx(min(c.score for c in met))
    assert best.meets_target and holds(problem, best, limits, entropy)
    for group in {each.group.name for each in limits}:
        assert best.costs[f"kl.{group}"] == pytest.approx(group_sum(problem, best, group))
    assert not any(key.startswith("kl_above_mean") for key in best.costs)
    for name, baseline in all_baselines(problem, seed=seed).items():
        meets = any(c.meets_target and (c.blocks, c.kept) == (baseline.blocks, baseline.kept) for c in met)
        assert baseline.meets_target == meets, (name, baseline.violated)
        assert not meets or baseline.score >= best.score - 1e-9
    pool = problem.solve(num_solutions=5, gap=0.0)
    assert [c.score for c in pool] == pytest.approx(sorted(c.score for c in met)[:5])
    [point] = [point for point in frontier(problem) if point.label == "1.2x asked for"]
    assert point.score == pytest.approx(min(c.score for c in met))


def test_the_relaxation_keeps_floors_with_negative_numbers():
    problem = grouped([limit(RECALL, "times_mean", 1.1)], 1)
    owner = {group: dict.fromkeys(names) for group, names in problem.library.items()}
    scores, number = [], 0
    for group, names in problem.library.items():
        for name, numbers in names.items():
            owner[group][name], number = number, number + 1
            scores.append(numbers["score"])
    [best] = problem.solve(gap=0.0)
    program = RelaxedProgram(problem.program, owner)
    relaxed = program.total(np.array(scores), program.choice(np.array(scores)))
    without = RelaxedProgram(replace(problem, floors=()).program, owner)
    assert without.total(np.array(scores), without.choice(np.array(scores))) < relaxed <= best.score + 1e-9


def test_the_parent_keeps_every_floor():
    problem = grouped([limit(RECALL, "times_mean", 0.5), limit(HIGH, "nats", 1e-3)], target=Target(min_speedup=1.0))
    assert problem.parent().meets_target


def test_around_a_child_its_own_kls_are_added():
    base = {"recall": 2.0, "high": 4.0, ALL: 3.0}
    limits = [limit(RECALL, "nats", 9.5), limit(HIGH, "times_mean", 1.25)]
    problem = grouped(limits, 1, base=base)
    met = [
        c
        for c in every(problem_of(BOTH, 1))
        if c.meets_target
        and group_sum(problem, c, "recall") + 2.0 <= 9.5
        and group_sum(problem, c, "high") + 4.0 <= 1.25 * (group_sum(problem, c, ALL) + 3.0)
    ]
    [best] = problem.solve(gap=0.0)
    assert best.score == pytest.approx(min(c.score for c in met))
    assert best.costs["kl.recall"] == pytest.approx(group_sum(problem, best, "recall") + 2.0)


def test_floors_that_conflict_are_explained():
    with pytest.raises(InfeasibleError) as told:
        grouped([limit(RECALL, "nats", 0.001)]).solve()
    assert "the target cannot be met" in str(told.value) and "predicted KL of recall 0.001" in str(told.value)
    with pytest.raises(InfeasibleError, match=r"predicted KL of high above 0\.001 times the mean 0"):
        grouped([limit(HIGH, "times_mean", 0.001)]).solve()


def test_scores_of_limited_groups_are_needed():
    problem = problem_of(BOTH)
    floors = floors_of([limit(RECALL, "nats", 0.5)], {})
    with pytest.raises(ConfigError, match="the KL of recall is limited, but the scores are not known for it"):
        replace(problem, floors=floors)
    short = replace(problem.scores, groups={"recall": Scores(((0.0,),) * 3, ((0.0,),) * 3)})
    with pytest.raises(ConfigError, match=r"scores.experts has \[1, 1, 1\]"):
        Problem(SPACE, short, COSTS, BOTH, floors)
    with pytest.raises(ConfigError, match="limits recall, on which the parent's entropy is 0"):
        floors_of([limit(RECALL, "share_of_entropy", 0.5)], {"recall": 0.0})


# Measured KLs -------------------------------------------------------------------------------------------------------


def trace(task, effort, tokens):
    return Trace(task, effort, 0, {}, (1, 2), tuple(range(tokens)), 1.0, False)


TRACES = [trace("recall", "low", 2), trace("recall", "high", 6), trace("chain", "high", 12)]
LIMITS = [limit(RECALL, "nats", 0.5), limit(HIGH, "times_mean", 1.25), limit(RECALL, "share_of_entropy", 0.125)]
FLOORS = floors_of(LIMITS, {"recall": 3.2})


def test_floors_hold_or_not_by_means_over_tokens():
    measured = MeasuredFloors.on(FLOORS, TRACES, "validation")
    kls = measured.kls(np.array([1.0, 0.2, 0.1]))
    # (2 x 1 + 6 x 0.2) / 8, (6 x 0.2 + 12 x 0.1) / 18, (2 + 1.2 + 1.2) / 20
    assert kls == {ALL: pytest.approx(0.22), "recall": pytest.approx(0.4), "high": pytest.approx(2.4 / 18)}
    assert [floor.ratio(kls) for floor in FLOORS] == pytest.approx([0.8, 2.4 / 18 / 0.275, 1.0])
    kls = measured.kls(np.array([0.0, 0.9, 0.0]))
    assert [floor.ratio(kls) for floor in FLOORS] == pytest.approx([0.675 / 0.5, 0.3 / 0.27 / 1.25, 0.675 / 0.4])
    assert measured.words(kls) == (
        "KL of recall on validation traces is 0.675, asked for at most 0.5",
        "KL of recall on validation traces is 0.675, asked for at most 0.125 of the parent's entropy",
    )
    assert measured.excess(kls) == pytest.approx(0.35 + 0.6875)
    # What a violated limit was is lowered by bound over measured KL; others stay.
    lower = tightened(FLOORS, measured, kls)
    assert [floor.value for floor in lower] == pytest.approx([0.5 / 1.35, 1.25, 0.4 / 1.6875])
    assert [floor.ratio(kls) for floor in lower] == [floor.ratio(kls) for floor in FLOORS]
    assert FLOORS[1].words({"high": 0.5, ALL: 0.25}, "validation") == (
        "KL of high on validation traces is 0.5 (mean 0.25), asked for at most 1.25 times the mean"
    )


def test_only_floors_that_held_can_be_broken():
    measured = MeasuredFloors.on(FLOORS[:2], TRACES, "confirmation")
    bad, good = np.array([0.0, 0.9, 0.0]), np.array([0.2, 0.2, 0.2])
    assert len(measured.broken(bad, good)) == 1 and measured.broken(bad, bad) == () and measured.broken(good, bad) == ()


def test_a_kl_of_zero_keeps_every_floor():
    measured = MeasuredFloors.on(FLOORS, TRACES, "validation")
    assert measured.violated(measured.kls(np.zeros(3))) == ()
    assert Floor(limit(RECALL, "times_mean", 2)).ratio({"recall": 0.1, ALL: 0.0}) == np.inf


def test_groups_without_traces_are_refused():
    check_members(LIMITS, TRACES, "calibration")
    with pytest.raises(ConfigError, match="nats limits recall, but the calibration traces have none of it"):
        check_members(LIMITS, TRACES[2:], "calibration")


def test_measured_kls_are_kept_in_json():
    [best] = grouped([limit(RECALL, "nats", 7.5)]).solve()
    measured = replace(best, measured_kl={ALL: 0.5, "recall": 0.25})
    assert Candidate.from_json(measured.to_json()) == measured and "measured_kl" not in best.to_json()
