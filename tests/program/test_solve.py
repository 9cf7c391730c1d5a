"""The integer program against exhaustive enumeration, and its message when nothing fits."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_jax.errors import InfeasibleError, PuzzleError
from puzzle_jax.program.explain import InfeasibleProgram
from puzzle_jax.program.library import Limit, Program
from puzzle_jax.program.solve import assess, elastic_solve, solve
from tests.support import present

NUMBERS = st.one_of(st.integers(0, 5), st.floats(0, 3, allow_nan=False).map(lambda x: round(x, 3)))
ALTERNATIVE = st.fixed_dictionaries(
    {"metrics": st.fixed_dictionaries({"kl": NUMBERS}), "stats": st.fixed_dictionaries({"mib": NUMBERS, "ms": NUMBERS})}
)
LIBRARIES = st.lists(st.lists(ALTERNATIVE, min_size=1, max_size=4), min_size=1, max_size=4).map(
    lambda groups: {f"g{i}": {f"a{j}": a for j, a in enumerate(group)} for i, group in enumerate(groups)}
)


def choices(library):
    for names in itertools.product(*library.values()):
        yield dict(zip(library, names, strict=True))


def enumerated(program):
    """All choices within the limits, best first."""
    met = [assess(program, choice) for choice in choices(program.library)]
    return sorted((s for s in met if not s.violated), key=lambda s: s.score)


def distance(a, b):
    return sum(a.choice[group] != b.choice[group] for group in a.choice)


@settings(max_examples=60, deadline=None)
@given(
    library=LIBRARIES,
    at_most=st.integers(0, 12),
    at_least=st.floats(0, 4).map(lambda x: round(x, 3)),
    min_distance=st.integers(1, 2),
)
def test_pool_is_what_enumeration_finds(library, at_most, at_least, min_distance):
    limits = (Limit("stats.mib", at_most=at_most), Limit("stats.ms", at_least=at_least))
    program = Program(library, "metrics.kl", limits)
    feasible = enumerated(program)
    if not feasible:
        with pytest.raises(InfeasibleProgram):
            solve(program)
        return
    pool = solve(program, num_solutions=3, min_distance=min_distance, gap=0.0)
    assert pool[0].score == pytest.approx(feasible[0].score, abs=1e-9)
    for solution in pool:
        assert solution.costs["stats.mib"] <= at_most and solution.costs["stats.ms"] >= at_least
        assert solution.status == "optimal" and solution.violated == () and present(solution.gap) < 1e-6
        assert solution.score == pytest.approx(assess(program, solution.choice).score)
    for a, b in itertools.combinations(pool, 2):
        assert distance(a, b) >= min_distance
    for earlier, solution in zip(itertools.accumulate(pool, lambda s, p: [*s, p], initial=[]), pool, strict=False):
        others = [s for s in feasible if all(distance(s, e) >= min_distance for e in earlier)]
        assert solution.score == pytest.approx(others[0].score, abs=1e-9)
    if len(pool) < 3:
        assert all(any(distance(s, e) < min_distance for e in pool) for s in feasible)


@settings(max_examples=60, deadline=None)
@given(library=LIBRARIES, at_most=st.integers(0, 12), wide=st.integers(0, 15), classified=st.integers(1, 3))
def test_with_classes_every_solution_is_the_best_of_its_pattern(library, at_most, wide, classified):
    """Alternatives of the first groups are in one of two classes, by the bits of `wide`."""
    program = Program(library, "metrics.kl", (Limit("stats.mib", at_most=at_most),))
    groups = list(library)[:classified]
    classes = {group: {name: bool(wide >> int(name[1:]) & 1) for name in library[group]} for group in groups}

    def pattern(solution):
        return tuple(classes[group][solution.choice[group]] for group in groups)

    best = {}
    for solution in enumerated(program):
        best.setdefault(pattern(solution), solution.score)
    if not best:
        return
    found = solve(program, num_solutions=20, gap=0.0, classes=classes)
    assert {pattern(solution): pytest.approx(solution.score, abs=1e-9) for solution in found} == best
    assert len(found) == len(best)  # no pattern comes twice
    assert [s.score for s in found] == pytest.approx(sorted(best.values()), abs=1e-9)
    if len(best) > 1:
        two = solve(program, num_solutions=2, gap=0.0, classes=classes)
        assert [s.score for s in two] == pytest.approx(sorted(best.values())[:2], abs=1e-9)


def test_classes_must_cover_groups_of_the_library():
    library = {"g0": {"a0": {"kl": 1.0}, "a1": {"kl": 2.0}}}
    program = Program(library, "kl")
    with pytest.raises(PuzzleError, match="classes of group 'g0' lack 'a1'"):
        solve(program, classes={"g0": {"a0": 1}})
    with pytest.raises(PuzzleError, match="classes of group 'g7' are given, but the library has no such group"):
        solve(program, classes={"g7": {}})


@settings(max_examples=40, deadline=None)
@given(library=LIBRARIES, at_most=st.integers(0, 3), at_least=st.integers(4, 12))
def test_infeasible_names_the_conflict_and_reachable_values(library, at_most, at_least):
    limits = (Limit("stats.mib", at_most=at_most), Limit("stats.ms", at_least=at_least))
    program = Program(library, "metrics.kl", limits)
    if enumerated(program):
        return
    with pytest.raises(InfeasibleProgram) as caught:
        solve(program)
    totals = [assess(program, choice).costs for choice in choices(library)]
    least, most = min(t["stats.mib"] for t in totals), max(t["stats.ms"] for t in totals)
    for conflict in caught.value.conflicts:
        assert repr(conflict.limit.key) in str(caught.value)
        assert conflict.alone == pytest.approx({"stats.mib": least, "stats.ms": most}[conflict.limit.key])
        if conflict.given_others is not None:  # that value, used as the limit, is feasible
            side = "at_most" if conflict.limit.at_most is not None else "at_least"
            moved = tuple(
                Limit(limit.key, **{side: conflict.given_others}) if limit is conflict.limit else limit
                for limit in limits
            )
            assert solve(Program(library, "metrics.kl", moved))
    together = least <= at_most and most >= at_least
    assert len(caught.value.conflicts) == 2 if together else True
    assert isinstance(caught.value, InfeasibleError)


@settings(max_examples=40, deadline=None)
@given(library=LIBRARIES, at_most=st.integers(1, 6), at_least=st.integers(1, 8))
def test_an_elastic_solve_violates_limits_least(library, at_most, at_least):
    limits = (Limit("stats.mib", at_most=at_most), Limit("stats.ms", at_least=at_least))
    program = Program(library, "metrics.kl", limits)

    def excess(solution):
        over = max(0.0, solution.costs["stats.mib"] / at_most - 1)
        return over + max(0.0, 1 - solution.costs["stats.ms"] / at_least)

    every = [assess(program, choice) for choice in choices(library)]
    least = min(map(excess, every))
    found = elastic_solve(program)
    assert excess(found) == pytest.approx(least, abs=1e-5)
    best = min(s.score for s in every if excess(s) <= least + 1e-9)
    assert found.score <= best * (1 + 1e-3) + 1e-9
    assert bool(found.violated) == (least > 0)


def test_limits_hold_to_the_last_digit():
    """A point that breaks its limit by less than the solver's tolerance is refused, one that meets it is not."""
    library = {
        "a": {"over": {"kl": 0, "bytes": 61_000_000_001}, "met": {"kl": 1, "bytes": 61_000_000_000}},
        "b": {"only": {"kl": 0, "bytes": 0}},
    }
    [solution] = solve(Program(library, "kl", (Limit("bytes", at_most=61_000_000_000),)))
    assert solution.choice == {"a": "met", "b": "only"} and solution.costs["bytes"] == 61_000_000_000


def test_sums_are_of_decimals_as_written():
    library = {"a": {"x": {"kl": 0, "ms": 0.1}}, "b": {"x": {"kl": 0, "ms": 0.2}}}
    [solution] = solve(Program(library, "kl", (Limit("ms", at_most=0.3),)))
    assert solution.costs["ms"] == 0.3


def test_many_points_within_the_tolerance_of_a_limit():
    """2^8 choices whose sums lie a billionth above the limit: the solver cannot tell them from feasible ones."""
    library = {
        str(g): {
            "x": {"kl": 0, "ms": 1.0 + 1e-10 + 1e-13 * g},
            "y": {"kl": 0.1, "ms": 1.0 + 1e-10},
            "z": {"kl": 9, "ms": 1.0},
        }
        for g in range(8)
    }
    [solution] = solve(Program(library, "kl", (Limit("ms", at_most=8.0),)))
    assert set(solution.choice.values()) == {"z"}


def test_equal_alternatives_are_both_in_the_pool():
    library = {"a": {"x": {"kl": 1.0}, "y": {"kl": 1.0}, "z": {"kl": 2.0}}}
    pool = solve(Program(library, "kl"), num_solutions=5)
    assert [s.choice["a"] for s in pool[:2]] in (["x", "y"], ["y", "x"])
    assert [s.score for s in pool] == [1.0, 1.0, 2.0]


def test_negative_numbers_and_zero_limit():
    library = {"a": {"x": {"kl": -1.0, "c": 2}, "y": {"kl": -0.5, "c": -2}}, "b": {"x": {"kl": 0.0, "c": 1}}}
    [solution] = solve(Program(library, "kl", (Limit("c", at_most=0),)))
    assert solution.choice["a"] == "y" and solution.score == -0.5


@pytest.mark.parametrize("time_limit", [0.01, 2.0])
def test_time_limit_accepts_a_feasible_point_or_says_so(time_limit):
    """Which of the three happens depends on the machine; each must be reported as what it is."""
    rng = np.random.default_rng(0)
    library = {
        str(g): {str(a): {"kl": rng.random(), **{f"c{i}": rng.random() for i in range(6)}} for a in range(48)}
        for g in range(24)
    }
    program = Program(library, "kl", tuple(Limit(f"c{i}", at_most=24 * 0.4) for i in range(6)))
    try:
        [solution] = solve(program, time_limit=time_limit, gap=0.0)
    except PuzzleError as error:
        assert "raise the time limit" in str(error)
    else:
        assert not solution.violated
        assert solution.status in ("time limit", "optimal")
        assert solution.gap is not None and 0 <= solution.gap < (1e-6 if solution.status == "optimal" else math.inf)


def test_keys_with_dots_and_unused_text():
    library = {"a": {"x": {"kl.mean": 1.0, "note": "text", "flag": True, "stats": {"nan": math.nan, "ms": 2}}}}
    [solution] = solve(Program(library, "kl.mean", (Limit("stats.ms", at_most=2),)))
    assert solution.costs == {"kl.mean": 1.0, "stats.ms": 2.0}


ONE = {"a": {"x": {"kl": 1.0, "ms": 2.0}}}


@pytest.mark.parametrize(
    ("library", "minimize", "limits", "words"),
    [
        ({}, "kl", (), "the library is empty"),
        ({"a": {}}, "kl", (), "group 'a' of the library has no alternatives"),
        ({"a": 3}, "kl", (), "group 'a' of the library has no alternatives"),
        (ONE, "kl_div", (), "'x' in group 'a' has no 'kl_div'; keys that all alternatives have: kl, ms"),
        ({"a": {"x": {"kl": math.nan}}}, "kl", (), "'kl' of 'x' in group 'a' is nan, but must be a finite number"),
        ({"a": {"x": {"kl": math.inf}}}, "kl", (), "is inf, but must be"),
        ({"a": {"x": {"kl": "1"}}}, "kl", (), "is '1', but must be"),
        ({"a": {"x": {"kl": True}}}, "kl", (), "is True, but must be"),
        ({"a": {"x": 3}}, "kl", (), "has no 'kl'"),
    ],
)
def test_bad_libraries_are_refused(library, minimize, limits, words):
    with pytest.raises(PuzzleError, match=re.escape(words)):
        Program(library, minimize, limits)


@pytest.mark.parametrize("bound", [math.nan, math.inf])
def test_bad_limits_are_refused(bound):
    with pytest.raises(PuzzleError, match="the limit on 'ms' is"):
        Limit("ms", at_most=bound)
    with pytest.raises(PuzzleError, match="one of at_most and at_least"):
        Limit("ms")


@pytest.mark.parametrize(
    "setting", [{"num_solutions": 0}, {"min_distance": 0}, {"time_limit": 0}, {"gap": -1.0}, {"gap": math.nan}]
)
def test_bad_settings_are_refused(setting):
    with pytest.raises(PuzzleError, match=next(iter(setting))):
        solve(Program(ONE, "kl"), **setting)


def test_unknown_choice_is_refused():
    with pytest.raises(PuzzleError, match="'nothing' for group 'a'"):
        assess(Program(ONE, "kl"), {"a": "nothing"})


def test_contradiction_on_one_key():
    library = {"a": {"x": {"kl": 0, "ms": 1}, "y": {"kl": 0, "ms": 3}}}
    limits = (Limit("ms", at_least=2), Limit("ms", at_most=2))
    with pytest.raises(InfeasibleProgram, match="'ms' at least 2 and 'ms' at most 2 cannot hold together") as caught:
        solve(Program(library, "kl", limits))
    assert [c.given_others for c in caught.value.conflicts] == [1.0, 3.0]


def test_a_limit_that_has_no_part_in_the_conflict_is_not_named():
    library = {"a": {"x": {"kl": 0, "ms": 1, "b": 2, "c": 0}, "y": {"kl": 0, "ms": 3, "b": 0, "c": 0}}}
    limits = (Limit("ms", at_most=1), Limit("c", at_most=5), Limit("b", at_most=1))
    with pytest.raises(InfeasibleProgram) as caught:
        solve(Program(library, "kl", limits))
    assert [conflict.limit.key for conflict in caught.value.conflicts] == ["ms", "b"]
    assert "'c'" not in str(caught.value)
