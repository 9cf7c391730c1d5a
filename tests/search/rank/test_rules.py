"""Every ranking rule against direct computation: one token, one removal, one expert at a time."""

from dataclasses import replace
from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import QWEN3_MOE
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.expert_mlp import expert_mlp
from puzzle_jax.kernels.route import route
from puzzle_jax.model.network import attention_block, embed, moe_block, rms_norm
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.sharding import make_mesh, shard_params
from puzzle_jax.model.spec import layer_experts
from puzzle_jax.search.rank.ranking import rank_experts
from puzzle_jax.search.rank.rows import packed_traces
from puzzle_jax.search.rank.rules import RULES, hope
from puzzle_jax.search.rank.statistics import KeptSums
from puzzle_jax.search.recipe import RankSettings
from tests.support import random_params


@pytest.fixture(scope="module")
def parent(small_parent):
    return small_parent


@pytest.fixture(scope="module")
def ranking(parent):
    config, params, traces = parent
    return rank_experts(params, config, packed_traces(traces, tokens_per_batch=128))


def test_rankings_by_hand(parent, ranking):
    """Every trace weighs 1 whatever its length, but for `reap_by_token`, in which every token does."""
    config, params, traces = parent
    by_trace = [(np.asarray(by_token(params, config, padded(t)), np.float64), size(t)) for t in traces]
    for layer in range(config.num_layers):
        values = [of_trace[layer, ..., :count] for of_trace, count in by_trace]
        error, gate, norm, turn, used = np.sum([v.mean(axis=-1) for v in map(quantities, values)], axis=0)[:5]
        squared, gated = np.sum([v.mean(axis=-1) for v in map(quantities, values)], axis=0)[5:]
        gated_of_tokens, used_of_tokens = (np.sum([quantities(v)[n].sum(axis=-1) for v in values], 0) for n in (6, 4))
        with np.errstate(invalid="ignore"):
            expected = {
                "removal_error": error / 4,
                "reap": gated / used,
                "reap_by_token": gated_of_tokens / used_of_tokens,
                "easy_ep": turn / 4,
                "activation_norm": norm / used,
                "squared_activation_norm": squared / used,
                "summed_norm": gated / 4,
                "frequency": used / 4,
                "weighted_frequency": gate / 4,
            }
        never = used == 0
        assert layer != 1 or never[6]
        for rule in RULES:
            assert np.all(ranking.scores[rule][layer][never] == -np.inf)
        for rule, values in expected.items():
            tolerance = {"easy_ep": 2e-3}.get(rule, 2e-4)  # one minus a cosine in float32
            found = ranking.scores[rule][layer]
            np.testing.assert_allclose(found[~never], values[~never], rtol=tolerance, err_msg=rule)


def test_gates_that_are_shares_of_all_experts(parent):
    """Where an expert is removed, the shares of all others grow."""
    config, _, traces = parent
    variant = replace(QWEN3_MOE, normalized_gates=False)
    config = replace(config, blocks=config.blocks[:1], variant=variant, swiglu_limit=None)
    params = random_params(config)
    ranking = rank_experts(params, config, packed_traces(traces, tokens_per_batch=128))
    values = [np.asarray(by_token(params, config, padded(t)), np.float64)[0, ..., : size(t)] for t in traces]
    error, gate, *_, used, _, gated = np.sum([v.mean(axis=-1) for v in map(quantities, values)], axis=0)
    assert np.all(used > 0) and 0.2 < gate.sum() / 4 < 0.9
    expected = {"removal_error": error / 4, "reap": gated / used, "weighted_frequency": gate / 4}
    for rule, by_hand in expected.items():
        np.testing.assert_allclose(ranking.scores[rule][0], by_hand, rtol=2e-4, err_msg=rule)


def quantities(of_tokens):
    """Error, gate, norm, gated norm times turn, used, squared norm and gated norm of [experts, tokens]."""
    error, gate, norm, turn, used = of_tokens
    return np.stack([error, gate, norm, gate * norm * turn, used, norm**2, gate * norm])


def test_hope_removes_by_its_pairs(parent, ranking):
    """The pairs by hand; greedy removal of up to four of seven experts costs at most a fifth more than the best."""
    config, params, traces = parent
    for layer in range(config.num_layers):
        sums, counts = np.zeros((7, 7)), np.zeros((7, 7))
        for trace in traces:
            values = np.asarray(by_token(params, config, padded(trace)), np.float64)[layer, ..., : size(trace)]
            gated, used = quantities(values)[6], values[4]
            sums += gated @ gated.T / size(trace)
            counts += used @ used.T / size(trace)
        pairs = np.where(counts > 0, sums / np.maximum(counts, 1e-30), 0.0)
        routed = np.diag(counts)
        steps = hope.removal_steps(pairs, routed, 2)
        found = ranking.scores["hope"][layer]
        np.testing.assert_array_equal(found[routed > 0], steps[routed > 0])
        for count in range(1, 5):
            best = min(cost(pairs, removed) for removed in combinations(range(7), count))
            assert cost(pairs, np.argsort(steps, kind="stable")[:count]) <= 1.21 * best + 1e-12


def cost(pairs, removed):
    return pairs[np.ix_(removed, removed)].sum()


def test_a_ranking_goes_on_from_the_sums_of_a_killed_run(parent, ranking, tmp_path, monkeypatch):
    config, params, traces = parent
    batches, path, ran = packed_traces(traces, tokens_per_batch=128), tmp_path / "deep/sums", []

    def dies():
        ran.append("first")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rank_experts(params, config, batches, on_batch=dies, kept=KeptSums(path))
    monkeypatch.setattr("puzzle_jax.search.rank.statistics.spread_rows", lambda x, mesh: ran.append("again") or x)
    again = rank_experts(params, config, batches, kept=KeptSums(path))
    assert ran.count("again") == len(batches) - 1 > 0
    np.testing.assert_array_equal(again.routed, ranking.routed)
    for rule in RULES:
        np.testing.assert_array_equal(again.scores[rule], ranking.scores[rule], err_msg=rule)
    path.write_bytes(path.read_bytes()[:99])  # a truncated file counts as none
    assert KeptSums(path).load(config)[0] == 0


def test_rows_hold_every_trace_once_and_weigh_tasks_alike(parent):
    """Lengths 16, 17, 52, 55 and 1,493 in rows of 64 and, for the last, of 1,536; one of three traces is of a task."""
    _, _, traces = parent
    traces = [
        replace(traces[0], task="other"),
        *traces[1:],
        replace(traces[1], prompt=(5,) * 1490),
    ]
    batches = packed_traces(traces[:4], tokens_per_batch=128)
    assert [batch.tokens.shape for batch in batches] == [(2, 64), (2, 64)]
    mixed = packed_traces(traces, tokens_per_batch=2048)
    assert [batch.tokens.shape for batch in mixed] == [(2, 1024), (1, 1536)]
    found, weights = [], {}
    for batch in batches:
        tokens, segments, positions, weight = map(np.asarray, batch)
        assert np.all((segments == 0) == (weight == 0))
        for row in range(2):
            for segment in range(1, segments[row].max() + 1):
                here = segments[row] == segment
                np.testing.assert_array_equal(positions[row, here], np.arange(here.sum()))
                found.append(tuple(tokens[row, here].tolist()))
                weights[found[-1]] = weight[row, here].sum()
    assert sorted(found) == sorted((*t.prompt, *t.completion) for t in traces[:4])
    expected = {(*t.prompt, *t.completion): 4 / (2 * (1 if t.task == "other" else 3)) for t in traces[:4]}
    assert weights == pytest.approx(expected, rel=1e-6)


def test_rules_are_named_once_and_known():
    with pytest.raises(ConfigError, match=r"rank.rules is 'best', but must be one of removal_error, joint_greedy"):
        RankSettings(("reap", "best"))
    with pytest.raises(ConfigError, match=r"rank.rules has 'reap' twice"):
        RankSettings(("reap", "hope", "reap"))
    with pytest.raises(ConfigError, match=r"rank.rules is empty, but must have at least one value"):
        RankSettings(())


def size(trace):
    return len(trace.prompt) + len(trace.completion)


def padded(trace):
    """A trace's tokens as one row of 64, one length for all traces."""
    tokens = (*trace.prompt, *trace.completion)
    return jnp.zeros((1, 64), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))


@partial(jax.jit, static_argnums=1)
def by_token(params, config, tokens):
    """[layers, 5, experts, tokens] of one row: the error when an expert is removed, where it was chosen; its gate; the
    norm of its output, where it was chosen; how far the mixture turned the state; whether the expert was chosen."""
    x: jax.Array = embed(params, tokens)
    found = []
    table = rope_table(config.rope, config.head_dim, jnp.arange(tokens.shape[1])[None])
    for layer, block in zip(params["layers"], config.blocks, strict=True):
        x, _ = attention_block(layer["attention"], config, x, table, window=block.window)
        moe, y = layer["moe"], rms_norm(x, layer["moe"]["norm"], config.rms_norm_eps)[0]
        logits = y @ moe["router_weight"] + moe.get("router_bias", 0.0)
        choose = partial(route, logits, 2, normalized=config.variant.normalized_gates)

        def mixture(routing, moe=moe, y=y):
            return expert_mlp(y, routing, layer_experts(moe), limit=config.swiglu_limit, implementation="reference")

        before, after = x[0], x[0] + mixture(choose())
        norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        turn = jnp.maximum(1 - jnp.sum(before * after, axis=-1) / norms, 0)

        def of_expert(expert, choose=choose, mixture=mixture, turn=turn):
            chosen = choose()
            used = (chosen.ids == expert).any(axis=1)
            without = mixture(choose(mask=jnp.arange(7)[None] != expert))
            alone = mixture(chosen._replace(gates=jnp.where(chosen.ids == expert, 1.0, 0.0)))
            error = used * jnp.mean((without - mixture(chosen)) ** 2, axis=-1)
            gate = jnp.sum(jnp.where(chosen.ids == expert, chosen.gates, 0.0), axis=1)
            return jnp.stack([error, gate, jnp.linalg.norm(alone, axis=-1), turn, used])

        found.append(jax.vmap(of_expert, out_axes=1)(jnp.arange(7)))
        x = x + mixture(choose())[None]
    return jnp.stack(found)


def test_experts_are_removed_one_by_one_as_a_direct_search_does(parent, ranking):
    """All tokens are sampled here, and all ranks kept, so elimination is exact: every step is tried on the model."""
    config, params, traces = parent
    states = [layer_inputs(params, config, padded(trace)) for trace in traces]
    for layer in range(config.num_layers):
        y = jnp.concatenate([of_trace[layer, : size(t)] for of_trace, t in zip(states, traces, strict=True)])
        weight = np.concatenate([np.full(size(t), 1 / size(t)) for t in traces])
        moe = params["layers"][layer]["moe"]
        logits = np.asarray(y @ moe["router_weight"] + moe["router_bias"], np.float64)
        alive, voters = np.ones(7, bool), np.ones(7, bool)
        for step in range(5):
            errors = np.asarray(removal_errors(moe, config, y, jnp.asarray(alive)), np.float64)
            growth = (errors * weight).sum(axis=1)
            growth[~alive] = np.inf
            unused = ranking.routed[layer] == 0
            if not (unused & alive).any():  # unused experts go first, in any order
                victim = int(np.argmin(growth))
                assert ranking.scores["joint_greedy"][layer][victim] == step, (layer, step)
            else:
                victim = int(np.flatnonzero(unused & alive)[0])
            alive[victim] = False
            votes = np.zeros(7)
            for row, w in zip(np.where(voters, logits, -np.inf), weight, strict=True):
                votes[np.argsort(-row)[:2]] += w
            votes[~voters] = np.inf
            loser = int(np.flatnonzero(unused & voters)[0]) if (unused & voters).any() else int(np.argmin(votes))
            assert unused[loser] or ranking.scores["ranked_choice"][layer][loser] == step
            voters[loser] = False


@partial(jax.jit, static_argnums=1)
def layer_inputs(params, config, tokens):
    """Normalised states before every layer's mixture."""
    x, out = embed(params, tokens), []
    table = rope_table(config.rope, config.head_dim, jnp.arange(tokens.shape[1])[None])
    for layer, block in zip(params["layers"], config.blocks, strict=True):
        x, _ = attention_block(layer["attention"], config, x, table, window=block.window)
        out.append(rms_norm(x, layer["moe"]["norm"], config.rms_norm_eps)[0])
        x = moe_block(layer["moe"], config, x)[0]
    return jnp.stack(out)


@partial(jax.jit, static_argnums=1)
def removal_errors(moe, config, y, alive):
    """Per expert and token, the mean squared distance from the whole mixture without it and those removed before."""
    logits = y @ moe["router_weight"] + moe["router_bias"]

    def mixture(mask):
        routing = route(logits, 2, mask=mask[None])
        return expert_mlp(y, routing, layer_experts(moe), limit=config.swiglu_limit, implementation="reference")

    whole = mixture(jnp.ones(7, bool))
    return jax.vmap(lambda e: jnp.mean((mixture(alive & (jnp.arange(7) != e)) - whole) ** 2, axis=-1))(jnp.arange(7))


def test_never_routed_experts_leave_first_and_kept_ids_ascend(ranking):
    for rule in RULES:
        kept = ranking.keep(rule, 1, 6)
        assert 6 not in kept and list(kept) == sorted(set(kept)) and len(kept) == 6
        assert set(ranking.keep(rule, 0, 3)) < set(ranking.keep(rule, 0, 5))


def test_rankings_on_a_mesh_are_those_of_one_device(parent):
    config, params, traces = parent
    batches = packed_traces([*traces, *traces[:2]], tokens_per_batch=128)
    alone = rank_experts(params, config, batches)
    mesh = make_mesh(1, 7)
    spread = rank_experts(shard_params(params, config, mesh), config, batches, mesh=mesh)
    np.testing.assert_array_equal(spread.routed, alone.routed)
    for rule in RULES:
        np.testing.assert_allclose(spread.scores[rule], alone.scores[rule], rtol=2e-4, err_msg=rule)
