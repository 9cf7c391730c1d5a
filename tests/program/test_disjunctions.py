"""Disjunctions of sets of limits against trying every set on every choice."""

import itertools

import numpy as np
import pytest

from puzzle_jax.errors import PuzzleError
from puzzle_jax.program import minimise as solver
from puzzle_jax.program.explain import InfeasibleProgram
from puzzle_jax.program.library import Disjunction, Limit, Program
from puzzle_jax.program.solve import assess, elastic_solve, solve

KEYS = ("ms", "mib", "kv")


def drawn(seed):
    random = np.random.default_rng(seed)
    library = {
        f"g{group}": {
            f"a{a}": {"kl": int(random.integers(0, 9)), **{key: int(random.integers(0, 9)) for key in KEYS}}
            for a in range(random.integers(1, 5))
        }
        for group in range(random.integers(1, 5))
    }

    def limit():
        side = "at_most" if random.random() < 0.8 else "at_least"
        return Limit(str(random.choice(KEYS)), **{side: int(random.integers(1, 6)) * len(library)})

    def one_of(name):
        sets = {str(b): tuple(limit() for _ in range(random.integers(1, 3))) for b in range(random.integers(1, 4))}
        return Disjunction(name, sets)

    limits: list[Limit | Disjunction] = [limit() for _ in range(random.integers(0, 2))]
    limits[:0] = [one_of(name) for name in ("batch", "length")[: random.integers(1, 3)]]
    return Program(library, "kl", tuple(limits))


def meets(program, costs, limits):
    return all((costs[x.key] <= x.at_most) if x.at_most is not None else (costs[x.key] >= x.at_least) for x in limits)


def feasible(program):
    """Scores of all choices that meet the limits, best first."""
    found = []
    for names in itertools.product(*program.library.values()):
        choice = dict(zip(program.library, names, strict=True))
        costs = {key: sum(program.library[g][a][key] for g, a in choice.items()) for key in ("kl", *KEYS)}
        plain = meets(program, costs, program.plain_limits)
        if plain and all(any(meets(program, costs, s) for s in one.sets.values()) for one in program.disjunctions):
            found.append(costs["kl"])
    return sorted(found)


@pytest.mark.parametrize("by", ["enumeration", "HiGHS"])
def test_as_good_as_trying_everything(by, monkeypatch):
    if by == "HiGHS":
        monkeypatch.setattr(solver, "_MOST_CASES", 0)
    possible, programs = 0, 200 if by == "enumeration" else 80
    for seed in range(programs):
        program = drawn(seed)
        scores = feasible(program)
        if not scores:
            if seed % 10 == 0:  # explanations take long
                with pytest.raises(InfeasibleProgram):
                    solve(program)
            continue
        possible += 1
        pool = solve(program, num_solutions=2, gap=0.0)
        assert [s.score for s in pool] == scores[:2]
        for solution in pool:
            assert not solution.violated and set(solution.selected) == {one.name for one in program.disjunctions}
            for one in program.disjunctions:
                assert meets(program, solution.costs, one.sets[solution.selected[one.name]])
    assert programs / 4 < possible < programs


def test_an_elastic_solve_violates_the_limits_of_one_set_least():
    """Sets are compared by summed relative excess: 6 over 4 is nearer than 6 over 3."""
    library = {"a": {"x": {"kl": 1, "ms": 6, "mib": 6}, "y": {"kl": 0, "ms": 7, "mib": 6}}}
    one = Disjunction("batch", {"1": (Limit("ms", at_most=3),), "2": (Limit("ms", at_most=4), Limit("mib", at_most=6))})
    found = elastic_solve(Program(library, "kl", (one,)))
    assert found.selected == {"batch": "2"} and found.choice == {"a": "x"}
    assert found.violated == (Limit("ms", at_most=4),)
    assert assess(Program(library, "kl", (one,)), {"a": "x"}).selected == {"batch": "2"}


def test_the_batch_of_a_deployment():
    """A larger batch may take longer for each step but needs more memory: the solver finds the one that suits."""
    library = {
        f"layer {i}": {
            "whole": {"kl": 0.0, "memory": {"8": 12, "16": 18}, "seconds": {"8": 1.0, "16": 1.5}},
            "half": {"kl": 1.0 + i, "memory": {"8": 8, "16": 14}, "seconds": {"8": 0.7, "16": 1.0}},
        }
        for i in range(3)
    }
    sets = {
        batch: (Limit(f"seconds.{batch}", at_most=int(batch) / 5), Limit(f"memory.{batch}", at_most=50))
        for batch in ("8", "16")
    }
    [solution] = solve(Program(library, "kl", (Disjunction("batch", sets),)))
    # Batch 8 allows 1.6 s, but even three halves take 2.1 s; batch 16 allows 3.2 s, but two take 3.5 s.
    assert solution.selected == {"batch": "16"} and solution.score == 6.0


def test_the_message_says_for_each_set_what_conflicts():
    library = {"a": {"x": {"kl": 0, "ms": 5, "mib": 1}, "y": {"kl": 0, "ms": 1, "mib": 5}}}
    sets = {"8": (Limit("ms", at_most=0),), "16": (Limit("ms", at_most=2), Limit("mib", at_most=2))}
    with pytest.raises(InfeasibleProgram) as caught:
        solve(Program(library, "kl", (Disjunction("batch", sets),)))
    message = str(caught.value)
    assert "batch '8': 'ms' at most 0 cannot be met: the best possible value is 1" in message
    assert "batch '16': 'ms' at most 2 and 'mib' at most 2 cannot hold together" in message
    assert {conflict.limit for conflict in caught.value.conflicts} == {*sets["8"], *sets["16"]}


def test_limits_that_hold_in_any_case_are_explained_alone():
    library = {"a": {"x": {"kl": 0, "ms": 5}}}
    one = Disjunction("batch", {"8": (Limit("ms", at_most=9),), "16": (Limit("ms", at_most=1),)})
    with pytest.raises(InfeasibleProgram, match="'kl' at least 1 cannot be met") as caught:
        solve(Program(library, "kl", (one, Limit("kl", at_least=1))))
    assert "batch" not in str(caught.value)


def test_bad_sets_are_refused():
    library = {"a": {"x": {"kl": 0}}}
    with pytest.raises(PuzzleError, match="'batch' has no sets of limits"):
        Disjunction("batch", {})
    one = Disjunction("batch", {"8": (Limit("kl", at_most=1),)})
    with pytest.raises(PuzzleError, match="must differ"):
        Program(library, "kl", (one, one))
    with pytest.raises(PuzzleError, match="has no 'ms'"):
        Program(library, "kl", (Disjunction("batch", {"8": (Limit("ms", at_most=1),)}),))
