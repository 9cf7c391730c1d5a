"""Refinement on made-up KLs: what is taken and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.generate.batches import alike
from puzzle_jax.generate.traces import Trace
from puzzle_jax.search.recipe import ScoreSettings
from puzzle_jax.search.refine.accept import Difference, Pool, Swap, refine, swapped, together, with_choice
from puzzle_jax.search.refine.proposals import Refinement
from puzzle_jax.search.score.measurements import Score
from puzzle_jax.search.score.whole_children import Measurements
from puzzle_jax.search.solve.problem import Candidate
from puzzle_jax.search.space import ExpertChoice, Space
from tests.support import present

CHILD = Candidate(
    "child",
    (BlockConfig(3, 4), BlockConfig(2, None)),
    (ExpertChoice(3, (0, 2, 5), "reap"), ExpertChoice(2, (1, 4), "reap")),
    0.5,
    {},
    {"chat": 3},
    (),
    "optimal",
    0.0,
)
OTHER = replace(CHILD, name="other", blocks=(BlockConfig(3, 2), BlockConfig(2, None)))


def unasked(*_):
    raise AssertionError("nothing was to be asked")


def score(kl):
    return Score(kl, 0.1, 1.0, 1.0, 2, {})


def test_paired_differences():
    found = Difference.between(np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.5, 5.5]), np.array([7, 7, 7]))
    assert found.mean == pytest.approx(-1.0) and found.se == pytest.approx(0.5 / 3**0.5)
    assert found.proves_better and not Difference(-1.0, 0.5).proves_better
    by_token = Difference.between(np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.5, 5.5]), np.array([10, 30, 20]))
    # (10 x -1 + 30 x -0.5 + 20 x -1.5) / 60; residuals 10 x -1/12, 30 x 5/12, 20 x -7/12
    assert by_token.mean == pytest.approx(-55 / 60)
    assert by_token.se == pytest.approx((1.5 * (10**2 + 150**2 + 140**2)) ** 0.5 / 12 / 60)
    # One trace proves nothing.
    assert not Difference.between(np.array([1.0]), np.array([9.0]), np.array([5])).proves_better


def test_the_best_of_a_pool_is_by_real_kl():
    pool = Pool([CHILD, OTHER], [score(0.9), score(0.4)], np.array([[0.8, 1.0], [0.3, 0.5]]), np.array([4, 9]))
    assert pool.best == 1 and pool.rank_correlation is None  # both are predicted alike
    told = pool.to_json()
    assert told[0]["above_best"] == {"mean": pytest.approx(0.5), "se": pytest.approx(0.0)}
    assert replace(pool, candidates=[CHILD, replace(OTHER, score=0.3)]).rank_correlation == pytest.approx(1.0)


@pytest.mark.parametrize("gain,taken", [(-0.5, True), (-0.15, False), (0.3, False)])
def test_a_round_must_win_by_two_standard_errors_on_fresh_traces(gain, taken):
    asked = []

    def rescore(child):
        asked.append(child.name)
        return Pool([OTHER], [score(0.1)], np.zeros((1, 2)), np.array([4, 9]))

    def confirm(new, old):
        return Difference(-0.9, 0.1), Difference(gain, 0.1)

    child, tried = refine(CHILD, 2, rescore, 0, unasked, confirm)
    assert child.name == ("other" if taken else "child")
    assert child.score == pytest.approx(0.5 + gain if taken else 0.5)
    # After a refusal there is no second round; after an acceptance, the second round finds the same child again.
    assert asked == (["child", "other"] if taken else ["child"])
    assert [step.accepted for step in tried] == ([True, False] if taken else [False])
    assert ("accepted" in str(tried[0])) is taken and tried[0].to_json()["confirmation"]["mean"] == gain


def test_nothing_better_is_said_so():
    def same(child):
        return Pool([child], [score(0.5)], np.zeros((1, 2)), np.array([4, 9]))

    child, tried = refine(CHILD, 1, same, 3, lambda _: None, unasked)
    assert child is CHILD and [str(step) for step in tried] == [
        "rescore 1: nothing better was found",
        "swap 1: nothing better was found",
    ]


@pytest.mark.parametrize("most,gains,taken", [(9, [-0.5, -0.4, -0.1], 2), (2, [-0.5, -0.4, -0.3], 2), (0, [], 0)])
def test_swaps_go_on_until_one_is_refused(most, gains, taken):
    left = list(gains)

    def swap(child):
        number = int(child.name) + 1 if child.name.isdigit() else 1
        worse, better = (
            replace(CHILD, name=str(number), blocks=(BlockConfig(3, w), BlockConfig(2, number))) for w in (2, 4)
        )
        return Pool([worse, better], [score(0.4), score(0.3)], np.zeros((2, 2)), np.array([4, 9]))

    child, tried = refine(
        CHILD, 0, unasked, most, swap, lambda new, old: (Difference(-1.0, 0.1), Difference(left.pop(0), 0.1))
    )
    assert child.name == (str(taken) if taken else "child")
    assert child.score == pytest.approx(0.5 + sum(gains[:taken]))  # not what the pool predicted
    assert [step.step for step in tried] == [f"swap {n + 1}" for n in range(min(most, len(gains)))]
    assert sum(step.accepted for step in tried) == taken


def test_swaps_are_tried_alone_and_together():
    choices = [ExpertChoice(3, (0, 2, 6), "a"), ExpertChoice(2, (1, 5), "b")]
    swaps = [Swap(1, choices[1], -0.2), Swap(0, choices[0], -0.125)]
    found = together(CHILD, swaps)
    assert [candidate.kept for candidate in found] == [((0, 2, 5), (1, 5)), ((0, 2, 6), (1, 5))]
    assert [candidate.score for candidate in found] == [pytest.approx(0.3), pytest.approx(0.175)]
    sizes = [sum(one != other for one, other in zip(c.kept, many.kept, strict=True)) for many, c in wide(7)]
    assert sizes == [1, 2, 4, 7]
    assert together(CHILD, []) == []


def wide(layers):
    """A child of `layers` layers, paired with each candidate that `together` makes of a swap in every layer."""
    many = replace(CHILD, blocks=(BlockConfig(2, None),) * layers, choices=(ExpertChoice(2, (0, 1), "a"),) * layers)
    return [(many, c) for c in together(many, [Swap(n, ExpertChoice(2, (0, 3), "b"), -0.1) for n in range(layers)])]


def test_swaps_exchange_the_least_kept_for_the_best_lost():
    scores = np.array([5.0, 1.0, 0.5, 4.0, 2.0, 9.0])
    options = swapped(CHILD.choices[0], scores, 2)
    assert [option.kept for option in options] == [(0, 3, 5), (0, 4, 5), (2, 3, 5), (2, 4, 5)]
    assert options[0].method == "reap, 2 for 3"
    assert swapped(ExpertChoice(6, (0, 1, 2, 3, 4, 5), "parent"), scores, 2) == []
    assert with_choice(CHILD, 0, options[1], 0.25).kept == ((0, 4, 5), (1, 4))


class MadeUpScorer:
    """Scores a layer's alternatives by the gains that a test gives, whatever the trace."""

    seed = 0
    weigh = staticmethod(alike)

    def __init__(self, method, gain):
        self.settings, self.gain, self.asked = ScoreSettings(method=method, first=3), gain, []
        self.traces = [Trace("a", "low", number, {}, (1, 2), (3,), 1.0, False) for number in range(20)]

    def __call__(self, child):
        return self

    def fill(self, table, alternatives, traces, save):
        self.asked.append((len(alternatives), len(traces)))
        for number in alternatives:
            layer, choice = table.alternatives[number]
            kept = tuple(np.flatnonzero(choice.expert_mask).tolist())
            table.values[number, list(traces)] = self.gain.get((layer, kept), 0.1)


@pytest.mark.parametrize(("method", "asked"), [("adaptive", [(15, 3), (3, 3), (2, 6)]), ("exact", [(15, 20)])])
def test_swaps_are_tried_on_few_traces_and_the_best_of_every_layer_on_more(tmp_path, method, asked):
    gain = {(0, (0, 2, 3)): -0.2, (0, (0, 2, 4)): -0.3, (1, (1, 5)): -0.4}
    scorer = MadeUpScorer(method, gain)
    removal_error = np.array([[9.0, 1.0, 8.0, 3.0, 2.0, 7.0], [1.0, 9.0, 2.0, 3.0, 8.0, 4.0]])
    measured = []

    def measure(candidates, name):
        measured.append((name, [candidate.kept for candidate in candidates]))
        count = len(candidates)
        return Measurements([score(0.1 * n) for n in range(count)], np.zeros((count, 2)), np.array([5, 7]))

    refinement = Refinement(
        space=Space.__new__(Space),  # which swaps do not use
        removal_error=removal_error,
        swaps=3,
        scorer=scorer,  # pyright: ignore[reportArgumentType]
        pool=unasked,
        measure=measure,
        table=tmp_path / "table",
        kept=tmp_path,
        identity="parent",
    )
    pool = refinement.swapped(CHILD)
    assert scorer.asked == asked
    # First the swap of the layer that gains most, then both swaps.
    assert measured == [("validation", [((0, 2, 5), (1, 5)), ((0, 2, 4), (1, 5))])]
    assert [candidate.score for candidate in present(pool).candidates] == pytest.approx([0.1, -0.2])
    # With all scores known, a second call asks for exactly what the first one did.
    refinement.swapped(CHILD)
    assert scorer.asked == 2 * asked


def test_swaps_are_proposed_by_values_around_the_child_if_there_are_any(tmp_path):
    asked = []

    def values(child):
        asked.append(child.name)
        return np.array([[3.0, 0.0, 2.0, 4.0, 1.0, 0.5], [9.0, 1.0, 0.0, 0.0, 2.0, 0.0]])

    def measure(candidates, name):
        count = len(candidates)
        return Measurements([score(0.1 * n) for n in range(count)], np.zeros((count, 2)), np.array([5, 7]))

    scorer = MadeUpScorer("exact", {(0, (0, 2, 3)): -0.2, (1, (0, 4)): -0.3})
    refinement = Refinement(
        space=Space.__new__(Space),  # which swaps do not use
        removal_error=np.full((2, 6), np.nan),
        swaps=1,
        scorer=scorer,  # pyright: ignore[reportArgumentType]
        pool=unasked,
        measure=measure,
        table=tmp_path / "table",
        kept=tmp_path,
        identity="parent",
        values=values,
    )
    found = present(refinement.swapped(CHILD)).candidates
    assert asked == ["child"] and scorer.asked == [(2, 20)]
    assert [candidate.kept for candidate in found] == [((0, 2, 5), (0, 4)), ((0, 2, 3), (0, 4))]
