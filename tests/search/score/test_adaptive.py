"""Adaptive scoring on made-up scores, for which it is known which alternatives are contested."""

import numpy as np
import pytest

from puzzle_jax.generate.traces import Trace
from puzzle_jax.program.library import Disjunction, Limit, Program
from puzzle_jax.search.score.adaptive import RelaxedProgram, contested, in_random_order, score_adaptively
from puzzle_jax.search.score.measurements import ScoreTable
from puzzle_jax.search.score.replace_one import Alternative
from puzzle_jax.search.score.space_scorer import traces_for_window

NOTHING = (0, Alternative(np.ones(3, bool), None))


def traces(count):
    kinds = [(task, effort) for task in ("a", "b") for effort in ("low", "high")]
    return [Trace(*kinds[n % 4], n, {}, (1, 2), (3,), 1.0, False) for n in range(count)]


def two_groups():
    """In each of two groups the parent costs 4 and alternatives 1; the sum is at most 5, so one group must change."""
    library = {
        group: {
            "own": {"score": 0.0, "cost": 4},
            "first": {"score": 0.0, "cost": 1},
            "second": {"score": 0.0, "cost": 1},
        }
        for group in ("x", "y")
    }
    owner = {"x": {"own": None, "first": 0, "second": 1}, "y": {"own": None, "first": 2, "second": 3}}
    return RelaxedProgram(Program(library, "score", (Limit("cost", at_most=5),)), owner)


def filled(means, spread, count=40, seed=0):
    source = np.random.default_rng(seed)
    table = ScoreTable.empty([NOTHING] * len(means), traces(count))
    noise = source.normal(0.0, 1.0, (len(means), count))
    noise -= noise.mean(axis=1, keepdims=True)
    table.values[..., 0] = np.asarray(means)[:, None] + noise * np.asarray(spread)[:, None]
    return table


def test_the_relaxed_choice_is_the_cheapest_by_score():
    program = two_groups()
    scores = np.array([3.0, 2.0, 9.0, 8.0])
    chosen = program.choice(scores)
    assert chosen.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]  # second in x, own in y
    assert program.total(scores, chosen) == 2.0 and program.total(2 * scores, chosen) == 4.0
    assert (
        not RelaxedProgram(Program({"x": {"own": {"score": 0.0, "cost": 4}}}, "score", (Limit("cost", at_most=3),)), {})
        .choice(np.zeros(0))
        .any()
    )


def test_of_several_sets_of_limits_the_cheapest_counts():
    library = {"x": {"own": {"score": 0.0, "cost": 4}, "first": {"score": 0.0, "cost": 1}}}
    sets = Disjunction("batch", {"8": (Limit("cost", at_most=0),), "4": (Limit("cost", at_most=1),)})
    program = RelaxedProgram(Program(library, "score", (sets,)), {"x": {"own": None, "first": 0}})
    assert program.choice(np.array([3.0])).tolist() == [0.0, 1.0]


def test_only_what_could_change_the_choice_is_contested():
    program = two_groups()
    assert contested([program], filled([3.0, 2.0, 9.0, 8.0], [0.1] * 4)) == []
    # 0 and 1 are close compared with their spread; what lies far above is left alone, however uncertain.
    assert contested([program], filled([2.05, 2.0, 90.0, 80.0], [3.0, 3.0, 5.0, 5.0])) == [0, 1]
    # The best of the two groups are close, so that which group changes is open.
    assert contested([program], filled([9.0, 2.0, 9.0, 2.02], [3.0] * 4)) == [1, 3]
    # Equally close, but known so well that it does not matter which is taken; next to a KL of 60, the wider spread does
    # not matter either.
    assert contested([program], filled([2.05, 2.0, 90.0, 80.0], [0.5, 0.5, 5.0, 5.0])) == []
    assert contested([program], filled([2.05, 2.0, 90.0, 80.0], [3.0, 3.0, 5.0, 5.0]), base_kl=60.0) == []


def test_rounds_double_and_stop_when_the_choice_is_settled():
    truth = filled([2.3, 2.0, 90.0, 80.0], [3.0, 3.0, 0.1, 0.1], count=400)
    table, asked = ScoreTable.empty([NOTHING] * 4, truth.traces), []

    def score(alternatives, numbers):
        asked.append((list(alternatives), len(numbers)))
        table.values[np.ix_(alternatives, numbers)] = truth.values[np.ix_(alternatives, numbers)]

    used = score_adaptively(table, score, [two_groups()], first=8)
    assert asked[0] == ([0, 1, 2, 3], 8) and all(alternatives == [0, 1] for alternatives, _ in asked[1:])
    assert [count for _, count in asked[:3]] == [8, 8, 16] and used < 400
    assert table.scored[2].sum() == 8 and table.scored[1].sum() == used


def test_scoring_ends_with_the_traces():
    truth = filled([2.0, 2.0, 2.0, 2.0], [1.0] * 4, count=20)
    table, asked = ScoreTable.empty([NOTHING] * 4, truth.traces), []

    def score(alternatives, numbers):
        asked.append(len(numbers))
        table.values[np.ix_(alternatives, numbers)] = truth.values[np.ix_(alternatives, numbers)]

    assert score_adaptively(table, score, [two_groups()], first=16) == 20 and asked == [16, 4]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_traces_hold_every_task_and_effort(seed):
    order = in_random_order(traces(41), seed)
    assert sorted(order) == list(range(41))
    for stop in (4, 8, 24):
        kinds = [n % 4 for n in order[:stop]]
        assert np.bincount(kinds, minlength=4).tolist() == [stop // 4] * 4


def test_windows_are_scored_on_more_traces_some_of_them_longer():
    contexts = np.array([40, 90, 30, 20, 70, 50, 95, 10, 80, 60, 100])
    assert traces_for_window(contexts, 64, first=1) == 9  # the fourth trace longer than 64 is the ninth
    assert traces_for_window(contexts, 16, first=1) == 8  # these eight hold four longer ones
    assert traces_for_window(contexts, 99, first=1) == 11  # only one is longer
    assert traces_for_window(contexts, 128, first=1) == 8  # none is
    assert traces_for_window(contexts, 16, first=3) == 11  # all there are
    assert traces_for_window(np.zeros(0, int), 16, first=3) == 0
