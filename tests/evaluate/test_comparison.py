"""Every number of a comparison against hand computations on scripted answers."""

import json
from dataclasses import asdict, replace

import pytest

from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate.comparison import analyse
from puzzle_jax.generate.traces import Trace
from tests.support import present

EFFORTS = ("low", "high")


def answers(right: dict[str, str], tokens: dict[str, int], shift: int = 0) -> list[Trace]:
    """ "10" stands for a correct and an incorrect answer; the first two problems are of `chain`, the rest of `add`."""
    found = []
    for effort, marks in right.items():
        for seed, mark in enumerate(marks):
            length = tokens[effort] + (1 if seed % 2 else -1)
            task = "chain" if seed < 2 else "add"
            found.append(Trace(task, effort, seed + shift, {}, (1, 2), (3,) * length, float(mark), False))
    return found


PARENT = answers({"low": "100100", "high": "111101"}, {"low": 10, "high": 30})
CHILD = answers({"low": "100110", "high": "011101"}, {"low": 12, "high": 33})
RATES = {
    "low": {"parent": [100.0, 110.0, 90.0], "child": [180.0, 198.0, 162.0]},
    "high": {"parent": [60.0, 66.0, 54.0], "child": [120.0, 132.0, 108.0]},
}


@pytest.fixture(scope="module")
def analysis():
    return analyse({"parent": PARENT, "child": CHILD}, EFFORTS, RATES, draws=400, seed=1)


def test_summaries_are_by_model_effort_and_task(analysis):
    high = analysis.summaries["child"]["high"]
    assert high.all.accuracy == pytest.approx(4 / 6) and high.all.mean_tokens == 33
    assert {task: found.accuracy for task, found in high.tasks.items()} == {"chain": 0.5, "add": 0.75}
    assert analysis.overall["parent"].value == pytest.approx((2 / 6 + 5 / 6) / 2)
    assert analysis.comparisons["child"].overall.value == pytest.approx(0.0)


def test_differences_are_paired(analysis):
    low, high = (analysis.comparisons["child"].efforts[effort] for effort in EFFORTS)
    assert (low.all.won, low.all.lost, high.all.won, high.all.lost) == (1, 0, 0, 1)
    assert low.all.difference == pytest.approx(1 / 6) and low.all.low == 0.0
    assert (high.tasks["chain"].difference, high.tasks["add"].difference) == (-0.5, 0.0)
    assert (high.tasks["add"].low, high.tasks["add"].high) == (0.0, 0.0)
    assert high.retention.value == pytest.approx(4 / 5)
    assert low.retention.value == pytest.approx(3 / 2)


def test_ends_are_paired(analysis):
    """Shares of answers that ended by themselves, problem by problem."""
    cut = [replace(CHILD[0], truncated=True), *CHILD[1:]]
    ended = {
        name: analyse({"parent": PARENT, "child": answers}, EFFORTS, None, draws=50, seed=1)
        .comparisons["child"]
        .efforts
        for name, answers in (("whole", CHILD), ("cut", cut))
    }
    effort, of_effort = CHILD[0].effort, sum(answer.effort == CHILD[0].effort for answer in CHILD)
    before, after = ended["whole"][effort].ended, ended["cut"][effort].ended
    assert after.difference == pytest.approx(before.difference - 1 / of_effort)
    assert (
        after.lost == before.lost + 1
        and after.won == before.won
        and present(after.low) <= after.difference <= present(after.high)
    )


def test_the_relative_request_rate_divides_the_gain_by_the_growth_of_answers(analysis):
    """1.8 times the tokens per second with answers 12 / 10 as long make 1.5 times the requests."""
    low, high = (analysis.comparisons["child"].efforts[effort] for effort in EFFORTS)
    assert low.relative_tokens_per_second.value == pytest.approx(1.8)
    assert low.relative_tokens.value == pytest.approx(1.2)
    assert low.relative_request_rate.value == pytest.approx(1.5)
    assert high.relative_request_rate.value == pytest.approx(2 / 1.1)
    # The same rounds are drawn for both models, so that a slow round cancels.
    assert low.relative_tokens_per_second.low == pytest.approx(1.8) == low.relative_tokens_per_second.high
    assert low.relative_request_rate.low <= 1.5 <= low.relative_request_rate.high


def test_points_are_in_units_of_the_reference_at_its_highest_effort(analysis):
    rates = {name: {e: p.rate.value for e, p in efforts.items()} for name, efforts in analysis.points.items()}
    assert rates["parent"] == pytest.approx({"low": (100 / 10) / (60 / 30), "high": 1.0})
    assert rates["child"] == pytest.approx({"low": 7.5, "high": (120 / 33) / 2})
    assert analysis.points["parent"]["high"].accuracy.value == pytest.approx(5 / 6)
    assert analysis.points["parent"]["high"].rate.low < 1.0 < analysis.points["parent"]["high"].rate.high


def test_the_curves_are_compared(analysis):
    """They overlap from 20/11 to 5: the parent falls from 5/6 at 1 to 2/6 at 5, the child from 4/6 to 3/6 at 7.5."""
    common = analysis.comparisons["child"].common
    parent_at = 5 / 6 - (20 / 11 - 1) / 4 * 0.5
    assert common.gap.low == pytest.approx(20 / 11) and common.gap.high == pytest.approx(5)
    assert common.gap.rate == pytest.approx(20 / 11)
    assert common.gap.accuracy == pytest.approx(4 / 6 - parent_at)
    assert common.lower_bound <= common.gap.accuracy and 0 < common.probability < 1
    reachable = analysis.comparisons["child"].reachable
    assert reachable.gap.accuracy == pytest.approx(-1 / 6) and reachable.gap.rate == pytest.approx(1)


def test_a_child_that_is_always_right_and_fast_lies_above_in_every_draw():
    child = answers({"low": "111111", "high": "111111"}, {"low": 10, "high": 30})
    analysis = analyse({"parent": PARENT, "child": child}, EFFORTS, RATES, draws=600, seed=1)
    reachable = present(analysis.comparisons["child"].reachable)
    assert present(reachable.gap).accuracy == pytest.approx(1 / 6)
    assert reachable.answered == 1.0 and reachable.lower_bound == 0.0
    # Draws without the one of four `add` problems that the parent gets wrong show no difference at its best accuracy.
    assert reachable.probability == pytest.approx(1 - 0.75**4, abs=0.08)


def test_a_reference_without_a_right_answer_has_no_retention():
    parent = answers({"low": "000000", "high": "100000"}, {"low": 10, "high": 30})
    analysis = analyse({"parent": parent, "child": CHILD}, EFFORTS, None, draws=200, seed=1)
    low, high = (analysis.comparisons["child"].efforts[effort].retention for effort in EFFORTS)
    assert (low.value, low.low, low.high) == (None, None, None)
    assert high.value == pytest.approx(4.0) and high.high is None
    json.dumps(asdict(analysis), allow_nan=False)


def test_without_speeds_there_is_no_rate():
    analysis = analyse({"parent": PARENT, "child": CHILD}, EFFORTS, None, draws=50, seed=1)
    comparison = analysis.comparisons["child"]
    assert analysis.points is None and comparison.common is None and comparison.reachable is None
    assert comparison.efforts["low"].relative_request_rate is None
    assert comparison.efforts["low"].relative_tokens.value == pytest.approx(1.2)


def test_one_model_alone_is_summarised():
    analysis = analyse(
        {"parent": PARENT}, EFFORTS, {e: {"parent": r["parent"]} for e, r in RATES.items()}, draws=9, seed=1
    )
    assert analysis.points is not None
    assert analysis.comparisons == {} and analysis.points["parent"]["low"].rate.value == pytest.approx(5)


def test_answers_to_other_problems_are_refused():
    other = answers({"low": "100110", "high": "011101"}, {"low": 12, "high": 33}, shift=7)
    with pytest.raises(PuzzleError, match="model 'child' answered other problems"):
        analyse({"parent": PARENT, "child": other}, EFFORTS, None, draws=9, seed=1)


def test_the_same_seed_gives_the_same_intervals():
    again = [analyse({"parent": PARENT, "child": CHILD}, EFFORTS, RATES, draws=50, seed=s) for s in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
