"""The child that keeps the floors by measured KLs, on made-up KLs."""

from dataclasses import replace

import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.costs.scenario import Group, KlLimit
from puzzle_jax.search.refine.accept import Difference, Pool, refine
from puzzle_jax.search.refine.floors import ROUNDS, pool_within
from puzzle_jax.search.refine.proposals import Refinement
from puzzle_jax.search.score.whole_children import Measurements
from puzzle_jax.search.solve.floors import ALL, MeasuredFloors, floors_of
from puzzle_jax.search.space import Space
from tests.search.refine.test_refine import CHILD, score, unasked

FLOORS = floors_of([KlLimit(Group("recall", None), "nats", 0.5)], {})
TOKENS = np.array([30, 10])
CHECK = MeasuredFloors(FLOORS, "validation", TOKENS, {"recall": np.array([False, True])})


def child(number):
    return replace(CHILD, name=f"child {number}", blocks=(BlockConfig(3, number + 1), BlockConfig(2, None)))


def pool_of(candidates, rows, check: MeasuredFloors | None = CHECK):
    """A pool from the KL of each child on the other trace and on that of recall."""
    kl = np.array(rows)
    scores = [score(float(np.average(row, weights=TOKENS))) for row in kl]
    return Pool.measured(candidates, Measurements(scores, kl, TOKENS), check)


def test_the_best_is_the_least_kl_of_those_that_keep_the_floors():
    pool = pool_of([child(0), child(1), child(2)], [[0.1, 0.6], [0.3, 0.5], [0.4, 0.3]])
    assert pool.best == 1
    assert pool.candidates[0].measured_kl == {ALL: pytest.approx(0.225), "recall": pytest.approx(0.6)}
    assert pool.candidates[0].violated == ("KL of recall on validation traces is 0.6, asked for at most 0.5",)
    assert pool.candidates[1].meets_target and not pool.candidates[0].meets_target
    assert pool_of([child(0), child(1)], [[0.1, 0.9], [0.3, 0.6]]).best == 1  # the nearest
    without = pool_of([child(0), child(1)], [[0.1, 0.9], [0.3, 0.6]], None)
    assert without.best == 0 and without.candidates[0].meets_target and not without.candidates[0].measured_kl


KLS = {0: [0.1, 1.0], 1: [0.2, 0.8], 2: [0.3, 0.625], 3: [0.4, 0.45], 4: [0.4, 0.7], 5: [0.4, 0.8], 6: [0.4, 0.9]}


def searched(numbers):
    """The pool from child 0 on, where solving gives the children of the numbers in turn, and the limits asked for."""
    asked, left = [], list(numbers)

    def solve(floors):
        asked.append(floors[0].value)
        return [child(left.pop(0))] if left else []

    def measure(candidates):
        numbers = [candidate.blocks[0].window - 1 for candidate in candidates]
        return pool_of(candidates, [KLS[number] for number in numbers])

    return pool_within(measure([child(0)]), FLOORS, solve, measure), asked


def test_limits_are_tightened_by_what_was_measured_until_they_hold():
    pool, asked = searched([1, 2, 3, 4])
    assert asked == pytest.approx([0.5 * 0.5, 0.25 * 0.5 / 0.8, 0.15625 * 0.5 / 0.625])
    assert len(asked) == ROUNDS and pool.best == 3
    assert pool.candidates[3].name == "child 3, floors tightened 3x" and pool.candidates[3].meets_target


def test_what_holds_at_once_is_not_tightened():
    pool = pool_of([child(0)], [[0.1, 0.5]])
    assert pool_within(pool, FLOORS, unasked, unasked) is pool


def test_the_nearest_is_taken_and_its_floor_named():
    pool, asked = searched([4, 5, 6])
    assert len(asked) == ROUNDS and pool.candidates[pool.best].blocks == child(4).blocks
    assert pool.candidates[pool.best].violated[0].startswith("KL of recall on validation traces is 0.7,")
    # Solving ends where limits allow nothing, or nothing new.
    assert len(searched([])[1]) == 1 and len(searched([0, 1])[1]) == 1


@pytest.mark.parametrize("breaks", [(), ("KL of recall on confirmation traces is 0.7, asked for at most 0.5",)])
def test_a_refinement_that_breaks_a_floor_is_refused(breaks):
    better = child(7)

    def confirm(new, old):
        return Difference(-0.3, 0.1), Difference(-0.4, 0.1)

    found, [step, *_] = refine(
        CHILD, 0, unasked, 1, lambda _: pool_of([better], [[0.1, 0.4]]), confirm, lambda new, old: breaks
    )
    assert (found.blocks == better.blocks) is (not breaks) and step.accepted is (not breaks)
    assert ("refused, since KL of recall on confirmation" in str(step)) is bool(breaks)
    assert step.to_json().get("broken") == (list(breaks) or None)


def test_a_proposal_breaks_a_floor_on_either_set_of_traces(tmp_path):
    """Nothing is broken on validation traces, where the floor did not hold before, but on confirmation traces it is."""
    rows = {"validation": [[0.1, 0.9], [0.3, 0.7]], "confirmation": [[0.1, 0.6], [0.3, 0.4]]}

    def measure(candidates, name):
        return Measurements([score(0.1) for _ in candidates], np.array(rows[name]), TOKENS)

    refinement = Refinement(
        space=Space.__new__(Space),  # which is not used here
        removal_error=np.zeros((2, 6)),
        swaps=0,
        scorer=unasked,
        pool=unasked,
        measure=measure,
        table=tmp_path / "table",
        kept=tmp_path,
        identity="parent",
        floors=lambda name: replace(CHECK, where=name),
    )
    assert refinement.breaks(child(1), child(0)) == (
        "KL of recall on confirmation traces is 0.6, asked for at most 0.5",
    )
    assert replace(refinement, floors=lambda name: None).breaks(child(1), child(0)) == ()
