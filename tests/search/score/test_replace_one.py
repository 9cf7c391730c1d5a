"""Exact replace-one scores against direct computation: one replacement, one whole forward pass at a time."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.model.child import Child, ChildBlock, identity_child
from puzzle_jax.model.network import forward
from puzzle_jax.search.score import replace_one as replace_module
from puzzle_jax.search.score.lens import fit_lens
from puzzle_jax.search.score.measurements import Fill, ScoreTable
from puzzle_jax.search.score.replace_one import Alternative, ReplaceOne, child_choices
from puzzle_jax.search.score.whole_children import score_children
from tests.support import jitted


@pytest.fixture(scope="module")
def parent(small_parent):
    return small_parent


def test_logits_of_few_answers_at_a_time_give_the_same_scores(parent, monkeypatch):
    config, params, traces = parent
    alternatives = [(0, Alternative(np.arange(7) < 5, 6)), (3, Alternative(np.arange(7) > 3, None))]

    def scored():
        table = ScoreTable.empty(alternatives, traces)
        Fill(table, ReplaceOne(params, config, per_call=2), range(2), range(4), tokens_per_batch=128)()
        return table.values

    whole_at_once = scored()
    monkeypatch.setattr(replace_module, "MOST_ANSWERS", 13)
    jitted(replace_module.compare_states).clear_cache()
    # One of them is one minus a cosine, which float32 rounds to some 1e-7.
    np.testing.assert_allclose(scored(), whole_at_once, rtol=1e-5, atol=1e-6)
    jitted(replace_module.compare_states).clear_cache()


def test_scores_are_those_of_whole_passes_over_single_replacements(parent):
    config, params, traces = parent
    replaced = {(0, "experts"): ((1, 2, 4), 5), (1, "window"): (tuple(range(7)), 6), (3, "both"): ((0, 5), 9)}
    alternatives = [
        (layer, Alternative(np.isin(np.arange(7), kept), window)) for (layer, _), (kept, window) in replaced.items()
    ]
    table = ScoreTable.empty(alternatives, traces)
    run = ReplaceOne(params, config, per_call=2, keep_every=3)
    work = Fill(table, run, range(3), range(4), tokens_per_batch=128).work
    done = []
    Fill(table, run, range(3), range(4), tokens_per_batch=128)(on_done=done.append)
    assert sum(done) == work and Fill(table, run, range(3), range(4), tokens_per_batch=128).work == 0
    for number, ((layer, _), (kept, window)) in enumerate(replaced.items()):
        blocks = list(identity_child(config).blocks)
        blocks[layer] = ChildBlock(kept, window)
        child = Child(config, tuple(blocks))
        kls = [direct_kl(params, config, child, trace) for trace in traces]
        score = table.score(number)
        tokens = [len(trace.completion) for trace in traces]
        np.testing.assert_allclose(score.kl, np.average(kls, weights=tokens), rtol=2e-3)
        assert score.traces == 4
        again = score_children(params, config, [child], traces, tokens_per_batch=128)
        np.testing.assert_allclose(again.scores[0].kl, score.kl, rtol=1e-4)
        np.testing.assert_allclose(again.kl[0], kls, rtol=2e-3)
        assert again.tokens.tolist() == tokens


def test_children_share_what_they_have_in_common_and_get_the_same_bits(parent, monkeypatch):
    """The parent's layers run once, and a child's from the first one in which it differs from all others."""
    config, params, traces = parent
    alike = list(identity_child(config).blocks)
    alike[2] = ChildBlock((0, 2, 3, 5), alike[2].window)
    other = [*alike[:3], ChildBlock((1, 4, 6), 3), *alike[4:]]
    rope = replace(config.rope, factor=config.rope.factor * 2)
    children = [Child(config, tuple(blocks)) for blocks in (alike, other, identity_child(config).blocks)]
    children.append(Child(config, tuple(alike), rope=rope))
    alone = [score_children(params, config, [child], traces, tokens_per_batch=128) for child in children]
    ran, layer = [], ReplaceOne.layer
    monkeypatch.setattr(ReplaceOne, "layer", lambda run, index, *rest: ran.append(index) or layer(run, index, *rest))
    together = score_children(params, config, children, traces, tokens_per_batch=128)
    np.testing.assert_array_equal(together.kl, np.concatenate([found.kl for found in alone]))
    assert together.scores == [found.scores[0] for found in alone]
    layers, batches = config.num_layers, len(micro_batches(traces, tokens_per_batch=128))
    # The parent (which the third child is), two children from layers 2 and 3 on, and all of one with its own RoPE.
    assert len(ran) == batches * (layers + (layers - 2) + (layers - 3) + layers)


def test_every_batch_is_done_when_it_is_filled(parent):
    """Five traces, each of which is a batch."""
    config, params, traces = parent
    traces = [*traces, replace(traces[0], prompt=(3, 4, 5))]
    alternatives = [(0, Alternative(np.arange(7) < 5, 6)), (3, Alternative(np.arange(7) > 3, None))]
    table, done, batches = ScoreTable.empty(alternatives, traces), [], []
    fill = Fill(table, ReplaceOne(params, config, per_call=2), range(2), range(5), tokens_per_batch=1)
    work = fill.work
    fill(lambda: batches.append(int(table.scored.sum())), done.append)
    assert sum(done) == work == 5 * (config.num_layers + config.num_layers - 3)
    assert batches == [2, 4, 6, 8, 10]


def test_losses_by_context_and_beyond_the_window(parent):
    config, params, traces = parent
    table = ScoreTable.empty([(1, Alternative(np.ones(7, bool), 24))], traces)
    Fill(table, ReplaceOne(params, config), [0], range(4), tokens_per_batch=128)()
    score = table.score(0)
    # Completion tokens predicted from more than 24 tokens are late: of 7, 3, 12 and 30, those of the last two traces.
    late = (12 + 30) / (7 + 3 + 12 + 30)
    assert score.late_share == pytest.approx(late) and score.late_kl == pytest.approx(score.kl / late)
    assert table.values[0, :2, 0].tolist() == [0.0, 0.0]  # a window as wide as the trace changes nothing
    assert set(score.kl_by_context) == {"up to 64"}
    assert score.kl_by_context["up to 64"] == pytest.approx(score.kl, rel=1e-5)


def test_scores_around_a_child_are_differences_to_it(parent):
    config, params, traces = parent
    blocks = list(identity_child(config).blocks)
    blocks[0] = ChildBlock((0, 2, 3, 5), blocks[0].window)
    child = Child(config, tuple(blocks))
    blocks[2] = ChildBlock((1, 4, 6), 3)
    both = Child(config, tuple(blocks))
    of_child, of_both = score_children(params, config, [child, both], traces, tokens_per_batch=128).kl
    table = ScoreTable.empty([(2, Alternative(np.isin(np.arange(7), (1, 4, 6)), 3))], traces)
    Fill(table, ReplaceOne(params, config, child_choices(child)), [0], range(4), tokens_per_batch=128)()
    np.testing.assert_allclose(table.values[0, :, 0], of_both - of_child, rtol=1e-3, atol=1e-5)


def test_a_book_is_kept_for_the_same_question_only(parent, tmp_path):
    _, _, traces = parent
    alternatives = [(0, Alternative(np.ones(7, bool), 3)), (2, Alternative(np.ones(7, bool), 4))]
    table = ScoreTable.empty(alternatives, traces)
    table.values[1, 2] = np.arange(table.values.shape[2])
    table.save(tmp_path / "table", table.key("parent"))
    again = ScoreTable.empty(alternatives, traces)
    again.load(tmp_path / "table", again.key("another parent"))
    again.recall(range(2), range(len(traces)))
    assert not again.scored.any()
    again.load(tmp_path / "table", again.key("parent"))
    again.recall([0], range(len(traces)))
    assert not again.scored.any()  # only what is asked for counts
    again.recall([0, 1], [1, 2])
    np.testing.assert_array_equal(again.values, table.values)
    (tmp_path / "table").write_bytes(b"half a file")
    damaged = ScoreTable.empty(alternatives, traces)
    damaged.load(tmp_path / "table", damaged.key("parent"))
    damaged.recall(range(2), range(len(traces)))
    assert not damaged.scored.any()


def test_a_lens_of_the_last_layer_is_exact_and_others_order_alternatives(parent):
    config, params, traces = parent
    masks = [np.isin(np.arange(7), kept) for kept in ((0, 1, 2, 3, 4, 5), (0, 3, 5), (1, 6))]
    alternatives = [(layer, Alternative(mask, config.blocks[layer].window)) for layer in (0, 3) for mask in masks]
    run = ReplaceOne(params, config, per_call=2)
    batches = micro_batches(traces, tokens_per_batch=128, smallest=64)
    exact, looked = (ScoreTable.empty(alternatives, traces) for _ in range(2))
    Fill(exact, run, range(6), range(4), tokens_per_batch=128)()
    Fill(looked, fit_lens(run, batches), range(6), range(4), tokens_per_batch=128)()
    # Nothing follows the last layer: its map is the identity, up to the ridge.
    np.testing.assert_allclose(looked.means()[3:], exact.means()[3:], rtol=0.05)
    assert np.all(looked.means()[:3] > 0)


def direct_kl(params, config, child, trace):
    tokens, count = padded(trace)
    ours, parents = (
        viewed(params, config, tokens, one.view) for one in (child, Child(config, identity_child(config).blocks))
    )
    p, q = (np.asarray(jax.nn.log_softmax(x), np.float64)[0] for x in (parents, ours))
    kl = (np.exp(p) * (p - q)).sum(-1)
    return kl[len(trace.prompt) - 1 : count - 1].mean()


@partial(jax.jit, static_argnums=1)
def viewed(params, config, tokens, view):
    return forward(params, config, tokens, windows=list(view.windows), expert_masks=list(view.expert_masks))


def padded(trace):
    """A trace's tokens as one row of 64, one length for all traces, and how many there are."""
    tokens = (*trace.prompt, *trace.completion)
    return jnp.zeros((1, 64), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens)), len(tokens)
