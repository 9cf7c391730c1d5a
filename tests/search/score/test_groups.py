"""Scores of groups from few traces, on made-up scores whose true ratios are known, and the parent's entropy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.costs.scenario import Group
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.network import forward
from puzzle_jax.search.score.alternatives import IndexedAlternatives
from puzzle_jax.search.score.groups import group_estimates, group_evidence, parent_entropies, shrunk_ratios
from puzzle_jax.search.score.measurements import ScoreTable
from puzzle_jax.search.score.replace_one import ReplaceOne
from puzzle_jax.search.space import ExpertChoice, Space
from tests.support import random_params, small_config

CONFIG = small_config((BlockConfig(7, 5), BlockConfig(7)), hidden_size=64, intermediate_size=32)
SETS = tuple(
    ExpertChoice(5, tuple(n for n in range(7) if n not in (lost, (lost + 1) % 7)), f"by {lost}") for lost in range(7)
)
WHOLE = ExpertChoice(7, tuple(range(7)), "parent")
SPACE = Space(CONFIG, ((WHOLE, *SETS),) * 2, ((5,), (None, 4, 3)))
INDEXED = IndexedAlternatives.around(SPACE)  # 14 expert sets and two windows
RARE, HIGH = Group("rare", None), Group(None, "high")
KINDS = [("rare", "high"), ("often", "high"), ("often", "low"), ("often", "low"), ("often", "low")]


def traces(count):
    return [Trace(*KINDS[n % 5], n, {}, (1, 2), (3,) * (4 + n % 3), 1.0, False) for n in range(count)]


def filled(count, spread, noise, scored, seed=0):
    """A table whose group "rare" costs about twice the rest, and the true KLs of that group."""
    source = np.random.default_rng(seed)
    table = ScoreTable.empty(INDEXED.listed, traces(count))
    rare = np.array([trace.task == "rare" for trace in table.traces])
    levels = np.exp(source.normal(0.0, 1.0, len(INDEXED.listed)))
    factors = 2.0 * np.exp(source.normal(0.0, spread, len(levels)))
    means = levels[:, None] * np.where(rare, factors[:, None], 1.0)
    values = means * source.gamma(1 / noise**2, noise**2, means.shape)
    for number in range(len(levels)):
        table.values[number, : scored[number], 0] = values[number, : scored[number]]
    return table, levels, levels * factors


def test_with_many_traces_a_group_keeps_its_own_mean():
    table, _, _ = filled(400, 0.5, 0.05, [400] * 16)
    overall = table.means()
    found = group_estimates(table, INDEXED, [RARE, HIGH], overall)
    for group in (RARE, HIGH):
        rows = [n for n, trace in enumerate(table.traces) if group.holds(trace.task, trace.effort)]
        own = np.average(table.values[:, rows, 0], axis=1, weights=table.tokens[rows])
        np.testing.assert_allclose(found[group.name], own, rtol=0.02)
    # Groups that make up all traces make up the mean.
    often = Group("often", None)
    parts = group_estimates(table, INDEXED, [RARE, often], overall)
    share = table.tokens[[trace.task == "rare" for trace in table.traces]].sum() / table.tokens.sum()
    np.testing.assert_allclose(share * parts["rare"] + (1 - share) * parts["often"], overall, rtol=0.02)


def test_with_few_traces_a_group_is_estimated_better_than_by_its_own_mean():
    better = []
    for seed in range(10):
        table, _, true = filled(400, 0.1, 1.0, [20] * 16, seed)
        rows = [n for n, trace in enumerate(table.traces[:20]) if trace.task == "rare"]
        own = np.average(table.values[:, rows, 0], axis=1, weights=table.tokens[rows])
        levels_known = true / 2.0  # the score on all traces is not what is tested
        found = group_estimates(table, INDEXED, [RARE], levels_known * 1.2)["rare"] / 1.2
        sets = slice(0, 7)
        errors = [np.mean(np.log(estimate[sets] / true[sets]) ** 2) for estimate in (found, own)]
        better.append(errors[0] < errors[1])
    assert np.mean(better) > 0.7


def test_windows_keep_what_was_measured():
    """There are only two windows, and with a mean of 0 the ratio is 0, however few traces show it."""
    table, _, _ = filled(60, 0.1, 1.0, [20] * 16)
    [narrow, narrower] = [n for n in INDEXED.attention[1] if n is not None]
    rare = [trace.task == "rare" for trace in table.traces]
    table.values[narrow, :20, 0] *= ~np.array(rare[:20])
    table.stratified = True
    overall = table.means()
    found = group_estimates(table, INDEXED, [RARE], overall)["rare"]
    assert found[narrow] == 0.0
    rows = [n for n in range(20) if rare[n]]
    assert found[narrower] == pytest.approx(
        np.average(table.values[narrower, rows, 0], weights=table.tokens[rows]), rel=1e-9
    )


def test_ratios_by_hand():
    everywhere = np.array([1.0] * 12 + [0.0, 2.0, 1.0])
    means = np.array([1.0, 3.0] * 6 + [0.0, 0.0, 9.0])
    number = np.array([4.0] * 14 + [0.0])
    # Each trace has a relative error so large that the spread of the ratios says nothing: all become typical.
    same = shrunk_ratios(means, 4.0 * means**2, number, everywhere)
    np.testing.assert_allclose(same[:12], same[0])
    assert 1.0 < same[0] < 3.0 and same[12:].tolist() == [1.0, 0.0, same[0]]
    # Without noise they stay as they are, and one without traces is typical.
    kept = shrunk_ratios(means, 0.0 * means, number, everywhere)
    np.testing.assert_allclose(kept[:14], [*means[:12], 1.0, 0.0])
    assert kept[14] == pytest.approx(2.0)
    few = shrunk_ratios(means[:5], 4.0 * means[:5] ** 2, number[:5], everywhere[:5])
    assert few.tolist() == means[:5].tolist()


def test_every_group_has_a_few_traces():
    order = list(range(99, -1, -1))
    wanted = group_evidence(traces(100), order, [RARE, HIGH])
    assert wanted == [96, 95, 91, 90, 86, 85, 81, 80, 75, 70, 65, 60]
    assert group_evidence(traces(12), range(12), [RARE]) == [0, 5, 10]  # all there are


def test_stratified_means_count_every_kind_by_its_tokens():
    table = ScoreTable.empty([INDEXED.listed[0]], traces(10))
    table.values[0, [0, 5, 2], 0] = [4.0, 2.0, 1.0]  # two rare traces, one of "often", "low"
    tokens = np.array([len(trace.completion) for trace in table.traces])
    plain = (4.0 * tokens[0] + 2.0 * tokens[5] + tokens[2]) / (tokens[0] + tokens[5] + tokens[2])
    assert table.means()[0] == pytest.approx(plain)
    low = [n for n in range(10) if n % 5 >= 2]
    rare = (4.0 * tokens[0] + 2.0 * tokens[5]) / (tokens[0] + tokens[5])
    of_rare, of_low = tokens[[0, 5]].sum(), tokens[low].sum()
    stratified = replace(table, stratified=True).means()[0]
    assert stratified == pytest.approx((of_rare * rare + of_low * 1.0) / (of_rare + of_low))


def test_entropy_is_that_of_the_parents_own_distribution():
    params = random_params(CONFIG, 3)
    asked = [
        Trace("rare", "high", 0, {}, (1, 5, 2), (7, 3), 1.0, False),
        Trace("often", "low", 1, {}, (4, 4), (9, 8, 6, 1, 2), 1.0, False),
        Trace("rare", "low", 2, {}, (11,), (3, 12, 5), 1.0, False),
    ]

    def by_hand(trace):
        tokens = np.array([*trace.prompt, *trace.completion])
        logits = forward(params, CONFIG, jnp.asarray(tokens)[None])[0, len(trace.prompt) - 1 : -1]
        log = np.asarray(jax.nn.log_softmax(logits), np.float64)
        return -(np.exp(log) * log).sum(axis=-1)

    found = parent_entropies(ReplaceOne(params, CONFIG), asked, [RARE, Group("often", "low")])
    rare = np.concatenate([by_hand(asked[0]), by_hand(asked[2])])
    assert found == {
        "rare": pytest.approx(float(rare.mean()), rel=1e-4),
        "often/low": pytest.approx(float(by_hand(asked[1]).mean()), rel=1e-4),
    }
    assert parent_entropies(ReplaceOne(params, CONFIG), asked, []) == {}
