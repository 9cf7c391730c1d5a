"""Networks whose blocks are not gpt-oss's, against a forward pass in NumPy, and in every form that the package runs."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from puzzle_jax.config import QWEN3_MOE, BlockConfig, RopeConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.model.cache import decode_step, init_cache, prefill_chunk
from puzzle_jax.model.child import Child, ChildBlock, cut_params, identity_child
from puzzle_jax.model.modules import MoeTransformer
from puzzle_jax.model.network import forward, head_logits, hidden_states
from puzzle_jax.model.spec import count_params
from puzzle_jax.model.stacked import layer_runs, stack_params, stacked_hidden_states
from puzzle_jax.train.losses.head import Head
from puzzle_jax.train.student import Student, head_of
from tests.support import model_logits, random_params, random_tokens, small_config

BATCH, SEQ = 2, 16
PLAIN = {"swiglu_limit": None, "rope": RopeConfig(theta=10_000.0, factor=1.0), "rms_norm_eps": 1e-6}
BLOCKS = (BlockConfig(7, None), BlockConfig(0, None), BlockConfig(5, 9))
CONFIGS = {
    "qwen3": small_config((BlockConfig(7), BlockConfig(7)), variant=QWEN3_MOE, **PLAIN),
    "gates of a softmax over all, a dense layer, a tied head": small_config(
        BLOCKS, variant=replace(QWEN3_MOE, normalized_gates=False, tied_head=True), dense_size=19, **PLAIN
    ),
    "biases of attention": small_config(
        (BlockConfig(7), BlockConfig(7)), variant=replace(QWEN3_MOE, attention_bias=True), **PLAIN
    ),
}
UNUSUAL = CONFIGS["gates of a softmax over all, a dense layer, a tied head"]
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def unusual():
    return random_params(UNUSUAL), random_tokens(UNUSUAL, BATCH, SEQ)


def by_hand(params, config, tokens) -> np.ndarray:
    """Logits in float64, one token and one head at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def rotate(x, position):
        half = config.head_dim // 2
        angle = position * config.rope.theta ** (-np.arange(half) / half)
        first, second = x[:half], x[half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
        )

    def attention(w, x, window):
        y, dim = norm(x, w["norm"]), config.head_dim
        q, k, v = ((y @ w[f"{name}_weight"] + w.get(f"{name}_bias", 0.0)).reshape(len(x), -1, dim) for name in "qkv")
        q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        out = np.zeros_like(q)
        for i in range(len(x)):
            seen = [j for j in range(i + 1) if window is None or j > i - window]
            for h in range(config.num_heads):
                shared = h * config.num_kv_heads // config.num_heads
                keys = np.stack([rotate(k[j, shared], j) for j in seen])
                weights = np.exp(keys @ rotate(q[i, h], i) / np.sqrt(dim))
                out[i, h] = weights @ v[seen, shared] / weights.sum()
        return x + out.reshape(len(x), -1) @ w["o_weight"] + w.get("o_bias", 0.0)

    def expert(w, number, row):
        h = row @ w["gate_up"][number]
        return (h[1::2] * h[0::2] / (1 + np.exp(-h[0::2]))) @ w["down"][number]

    def mixture(w, x):
        out = x.copy()
        for token, row in enumerate(norm(x, w["norm"])):
            if "router_weight" not in w:
                out[token] += expert(w, 0, row)
                continue
            shares = np.exp(row @ w["router_weight"])
            shares /= shares.sum()
            chosen = np.argsort(-shares)[: config.experts_per_token]
            total = shares[chosen].sum() if config.variant.normalized_gates else 1.0
            for number in chosen:
                out[token] += shares[number] / total * expert(w, number, row)
        return out

    rows = []
    for row in np.asarray(tokens):
        x = params["embedding"][row]
        for layer, block in zip(params["layers"], config.blocks, strict=True):
            x = mixture(layer["moe"], attention(layer["attention"], x, block.window))
        head = params["embedding"].T if config.variant.tied_head else params["head"]
        rows.append(norm(x, params["final_norm"]) @ head)
    return np.stack(rows)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_by_hand(name):
    config = CONFIGS[name]
    params, tokens = random_params(config), random_tokens(config, BATCH, SEQ)
    expected = by_hand(params, config, tokens)
    np.testing.assert_allclose(model_logits(params, config, tokens), expected, atol=1e-5 * np.abs(expected).max())


def test_the_number_of_parameters_is_what_blocks_have():
    hidden, queries, keys, inter, dense, vocab = 40, 60, 30, 24, 19, 97
    attention = hidden + 2 * 10 + 2 * hidden * (queries + keys)
    mixtures = sum(hidden + experts * (hidden + 3 * hidden * inter) for experts in (7, 5))
    assert count_params(UNUSUAL) == vocab * hidden + 3 * attention + mixtures + hidden + 3 * hidden * dense + hidden


def test_prefill_and_decoding_equal_the_whole_pass(unusual):
    params, tokens = unusual
    expected, lengths = model_logits(params, UNUSUAL, tokens), jnp.full(BATCH, SEQ)

    @jit
    def run(params, tokens):
        caches = [init_cache(UNUSUAL, layer, BATCH, SEQ, jnp.float32) for layer in range(3)]
        x, caches, _ = prefill_chunk(params, UNUSUAL, caches, tokens[:, :8], jnp.int32(0), lengths, context=SEQ)
        found = [head_logits(params, UNUSUAL, x)]
        for position in range(8, SEQ):
            logits, caches, _ = decode_step(
                params, UNUSUAL, caches, tokens[:, position], jnp.full(BATCH, position, jnp.int32)
            )
            found.append(logits[:, None])
        return jnp.concatenate(found, axis=1)

    np.testing.assert_allclose(run(params, tokens), expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_stacked_layers_and_replayed_choices_equal_the_plain_pass(unusual):
    params, tokens = unusual
    runs = layer_runs([(block.num_experts, block.window) for block in UNUSUAL.blocks])
    replay = jnp.asarray(
        np.random.default_rng(3).permuted(np.tile(np.arange(5), (3, BATCH * SEQ, 1)), axis=-1)[..., :2]
    )

    @jit
    def both(params, tokens):
        plain, auxes = hidden_states(params, UNUSUAL, tokens, replay=list(replay))
        stacked = stack_params(params, runs)
        again = stacked_hidden_states(stacked, UNUSUAL, runs, tokens, replay=replay)
        return plain, again.x, jnp.stack([aux.routing.ids for aux in auxes]), again.ids, again.routed

    plain, again, ids, stacked_ids, routed = both(params, tokens)
    np.testing.assert_allclose(again, plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ids, stacked_ids)
    np.testing.assert_array_equal(ids[0], replay[0])
    np.testing.assert_array_equal(ids[1], 0)  # a dense layer has one choice
    assert not np.array_equal(routed[0], replay[0]) and not np.any(np.asarray(routed[1]))


def test_cutting_equals_viewing_where_gates_are_shares_of_all_experts():
    config = replace(UNUSUAL, blocks=(BlockConfig(7), BlockConfig(7, 9)), dense_size=None)
    params, tokens = random_params(config), random_tokens(config, BATCH, SEQ)
    child = Child(config, (ChildBlock((0, 2, 3, 6), None), ChildBlock((1, 3, 4), 9)))
    viewed = model_logits(params, config, tokens, expert_masks=list(child.view.expert_masks))
    tolerance = 1e-5 * float(jnp.abs(viewed).max())
    np.testing.assert_allclose(model_logits(cut_params(params, child), child.config, tokens), viewed, atol=tolerance)


def test_cutting_leaves_dense_layers_as_they_are(unusual):
    params, _ = unusual
    child = Child(UNUSUAL, (ChildBlock((0, 2, 3, 6), None), ChildBlock((), None), ChildBlock((1, 3, 4), 9)))
    moe = cut_params(params, child)["layers"][1]["moe"]
    assert moe.keys() == {"norm", "gate_up", "down"}
    np.testing.assert_array_equal(moe["down"], params["layers"][1]["moe"]["down"])


def test_a_tied_head_gets_gradients_as_embedding_and_as_head(unusual):
    params, tokens = unusual
    student = Student(identity_child(UNUSUAL), ("experts", "router"), remat=False, packed=False)

    @jit
    def gradients(params, tokens):
        def through_student(trained):
            base = student.stacked(params)
            values = student.params(base, trained)
            x = stacked_hidden_states(values, student.config, student.runs, tokens).x
            head: Head = head_of(values)
            y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + UNUSUAL.rms_norm_eps) * head.norm
            return jnp.sum(jnp.sin(y @ head.weight))

        def plain(params):
            return jnp.sum(jnp.sin(forward(params, UNUSUAL, tokens)))

        trained = student.master_weights(student.stacked(params))
        return jax.grad(through_student)(trained)["embedding"], jax.grad(plain)(params)["embedding"]

    ours, plain = gradients(params, tokens)
    np.testing.assert_allclose(ours, plain, atol=1e-4 * float(jnp.abs(plain).max()))
    unseen = sorted(set(range(97)) - set(np.asarray(tokens).reshape(-1).tolist()))
    assert float(jnp.abs(plain[jnp.asarray(unseen)]).max()) > 1e-2  # as head only


def test_experts_that_no_checkpoint_packs_are_trained_as_they_are(unusual):
    params, _ = unusual
    student = Student(identity_child(UNUSUAL), ("experts",), packed=False)
    base = student.stacked(params)
    delta = student.delta(student.master_weights(base))
    for layer, of_parent in zip(delta["layers"], params["layers"], strict=True):
        np.testing.assert_array_equal(layer["moe"]["down"], of_parent["moe"]["down"])


def test_modules_hold_what_the_variant_has(unusual):
    params, tokens = unusual
    model = MoeTransformer(UNUSUAL, params=params)
    assert jax.tree.structure(model.params()) == jax.tree.structure(params)
    np.testing.assert_allclose(model(tokens), model_logits(params, UNUSUAL, tokens), rtol=1e-5, atol=1e-5)
    assert "head" not in nnx.state(model, nnx.Param)


def test_a_dense_layer_needs_its_width():
    with pytest.raises(ConfigError, match=r"layer 1 has num_experts 0, but at least experts_per_token \(2\)"):
        small_config(BLOCKS, variant=QWEN3_MOE)
    with pytest.raises(ConfigError, match=r"dense_size is 0, but must be a whole number of at least 1"):
        small_config(BLOCKS, variant=QWEN3_MOE, dense_size=0)
