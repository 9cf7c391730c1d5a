"""One program trains several children; an untrained one is as far from its parent as the search measures it to be."""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.child import ChildBlock
from puzzle_jax.search.finalists.training import ShortDistillation
from puzzle_jax.search.recipe import FinalistSettings
from puzzle_jax.search.score.whole_children import score_children
from tests.train import toy_student as toy

CHILD = replace(toy.CHILD, rope=None)
OTHER = replace(CHILD, blocks=(CHILD.blocks[0], ChildBlock((0, 3, 4, 5, 7), None), ChildBlock((1, 2, 6), 3)))
SETTINGS = FinalistSettings(count=2, steps=9, learning_rate=0.01, row_length=29, rows=3)


def traces(seed, sizes):
    rng = np.random.default_rng(seed)

    def trace(prompt, completion):
        tokens = (tuple(rng.integers(0, toy.PAD, size).tolist()) for size in (prompt, completion))
        return Trace("chain", "low", 0, {}, *tokens, reward=None, truncated=False)

    return [trace(*size) for size in sizes]


@pytest.fixture(scope="module")
def trained():
    params = toy.dense(toy.packed_params())
    training = traces(1, [(5, 7), (11, 13), (4, 20), (9, 6)])
    validation = traces(2, [(6, 8), (13, 18), (3, 12), (10, 5), (2, 3)])  # the second is longer than a row
    console = Console(quiet=True)
    return ShortDistillation(params, toy.PARENT, toy.PAD, SETTINGS, [CHILD, OTHER], training, validation, 7, console)


def test_what_the_children_share_is_compiled_in(trained):
    assert trained.student.windows == (5, "variable", "variable")
    assert trained.student.masks.all()


def test_untrained_children_are_measured_as_the_search_measures_them(trained):
    begin = trained._fresh(trained._base).params
    expected = score_children(trained.params, toy.PARENT, [CHILD, OTHER], trained.validation)
    for child, kl in zip((CHILD, OTHER), expected.kl, strict=True):
        np.testing.assert_allclose(trained.measure(begin, child), kl, rtol=2e-4, atol=1e-6)

    def last(trace):
        return np.where(np.arange(len(trace.completion)) == len(trace.completion) - 1, 6, 1)

    weighted = score_children(trained.params, toy.PARENT, [CHILD], trained.validation, weigh=last)
    found = replace(trained, weigh=last).measure(begin, CHILD)
    np.testing.assert_allclose(found, weighted.kl[0], rtol=2e-4, atol=1e-6)
    assert np.abs(found - expected.kl[0]).max() > 1e-3


def test_training_brings_each_nearer_its_parent_and_does_not_touch_the_other(trained):
    """The traces to train on are the validation traces here."""
    same = replace(trained, training=[trace for trace in trained.validation if len(trace.prompt) < 13])
    begin = same._fresh(same._base).params
    first = same(CHILD)
    assert first.sum() < 0.9 * same.measure(begin, CHILD).sum()
    assert same(OTHER).sum() < 0.9 * same.measure(begin, OTHER).sum()
    np.testing.assert_array_equal(same(CHILD), first)


def test_traces_that_no_row_holds_are_refused(trained):
    with pytest.raises(PuzzleError, match="row_length is 29, but the shortest example of traces/training needs 31"):
        _ = replace(trained, training=traces(3, [(13, 18)]))._examples
