from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from puzzle_jax.config import BlockConfig, ModelConfig, RopeConfig, cache_bytes
from puzzle_jax.errors import ConfigError
from puzzle_jax.model import cache_format
from puzzle_jax.model.cache import decode_step, init_cache, prefill_chunk
from puzzle_jax.model.cache_format import FLOAT8, CacheFormat, KVScales
from puzzle_jax.model.child import Child, ChildBlock, cut_params, identity_child
from puzzle_jax.model.modules import MoeTransformer
from puzzle_jax.model.network import forward, head_logits, hidden_states
from puzzle_jax.model.rope import inverse_frequencies
from puzzle_jax.model.sharding import batch_sharding, make_mesh, on_mesh, shard_params
from puzzle_jax.model.spec import count_params, init_params
from tests.support import model_logits, random_params, random_tokens, small_config

CHILD_BLOCKS = (
    ChildBlock((1, 3, 4, 6), 3),
    ChildBlock((0, 2, 5), 6),
    ChildBlock((0, 1, 2, 3, 4, 5, 6), 5),
    ChildBlock((2, 4), None),
)


PAIR = (BlockConfig(7, 5), BlockConfig(7, None))  # for programs that take long to compile


def test_parameters_are_counted_exactly():
    config = small_config(blocks=(BlockConfig(7, 5), BlockConfig(3, None)))
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    assert count_params(config) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_yarn_bounds_of_the_published_models():
    # Dimension 8 is the last that keeps its frequency, 18 the first that is fully divided (bounds 8.09 and 17.40).
    frequencies = inverse_frequencies(RopeConfig(), 64)
    plain = 150_000.0 ** (-np.arange(32) / 32)
    ratio = frequencies / plain
    np.testing.assert_allclose(ratio[:9], 1.0)
    np.testing.assert_allclose(ratio[18:], 1 / 32)
    expected = (9 - 8.0928) / (17.3980 - 8.0928)
    np.testing.assert_allclose(ratio[9], expected / 32 + 1 - expected, rtol=1e-4)


def test_segments_and_positions_make_packed_rows_equal_separate_ones():
    config = small_config()
    params, tokens = random_params(config), random_tokens(config, 2, 30)
    packed = jnp.asarray(np.reshape(tokens, (1, 60)))
    segments = jnp.asarray(np.repeat(np.arange(2), 30)[None])
    positions = jnp.asarray(np.tile(np.arange(30), 2)[None])
    together = model_logits(params, config, packed, segment_ids=segments, positions=positions)
    np.testing.assert_allclose(together.reshape(2, 30, -1), model_logits(params, config, tokens), atol=2e-5)


def test_cutting_equals_viewing():
    config = small_config()
    params, tokens = random_params(config), random_tokens(config, 2, 30)
    child = Child(config, CHILD_BLOCKS)
    cut = model_logits(cut_params(params, child), child.config, tokens)
    view = child.view
    seen = model_logits(params, config, tokens, windows=list(view.windows), expert_masks=list(view.expert_masks))
    np.testing.assert_allclose(seen, cut, atol=2e-5)
    assert float(jnp.abs(cut - model_logits(params, config, tokens)).max()) > 0.1


def test_masks_and_windows_per_row_are_independent():
    config = small_config()
    params, tokens = random_params(config), random_tokens(config, 1, 30)
    tokens = jnp.asarray(np.tile(tokens, (2, 1)))
    views = [Child(config, CHILD_BLOCKS).view, identity_child(config).view]
    both = model_logits(
        params,
        config,
        tokens,
        windows=[jnp.asarray(np.concatenate([v.windows[i] for v in views])) for i in range(4)],
        expert_masks=[jnp.asarray(np.stack([v.expert_masks[i] for v in views])) for i in range(4)],
    )
    np.testing.assert_allclose(both[1], model_logits(params, config, tokens)[0], atol=2e-5)
    child = Child(config, CHILD_BLOCKS)
    np.testing.assert_allclose(both[0], model_logits(cut_params(params, child), child.config, tokens)[0], atol=2e-5)


def test_replaying_the_experts_of_another_pass_changes_nothing_when_they_are_the_same():
    config = small_config(PAIR)
    params, tokens = random_params(config), random_tokens(config, 2, 11)
    x, auxes = jax.jit(partial(hidden_states, config=config))(params, tokens=tokens)
    run = jax.jit(lambda replay: hidden_states(params, config, tokens, replay=replay)[0])
    ids = [np.asarray(aux.routing.ids) for aux in auxes]
    again, other = (run([jnp.asarray((of_layer + shift) % 7) for of_layer in ids]) for shift in (0, 1))
    np.testing.assert_allclose(x, again, atol=2e-5)
    assert float(jnp.abs(x - other).max()) > 0.1


_whole = jax.jit(forward, static_argnames="config")

FORMATS = {
    "compute": CacheFormat(),
    "bfloat16": CacheFormat("bfloat16"),
    "float8": CacheFormat(FLOAT8, KVScales(jnp.asarray([0.01, 0.02, 0.03]), jnp.asarray([0.04, 0.02, 0.03]))),
    "float8 without scales": CacheFormat(FLOAT8),
}


@pytest.mark.parametrize(
    "form,dtype", [*((form, jnp.float32) for form in FORMATS), ("compute", jnp.bfloat16), ("bfloat16", jnp.bfloat16)]
)
def test_chunks_and_cached_steps_equal_the_uncached_pass(form, dtype, monkeypatch):
    monkeypatch.setattr(cache_format, "ROUNDED", 9 if form == "float8" else 0)  # 9: caches of both kinds
    blocks = tuple(BlockConfig(count, window) for count, window in ((7, 5), (3, None), (4, 9)))
    config = small_config(blocks)
    params = random_params(config, dtype=dtype)
    tokens = np.asarray(random_tokens(config, 3, 35))
    cache = FORMATS[form]
    expected = np.asarray(_whole(params, config=config, tokens=jnp.asarray(tokens), cache=cache), np.float32)
    lengths = np.asarray([24, 11, 1])
    caches = [init_cache(config, layer, 3, 40, dtype, cache) for layer in range(3)]
    assert [cache.slots for cache in caches] == [5, 40, 9]
    padded = np.where(np.arange(24) < lengths[:, None], tokens[:, :24], 0)
    chunk = jax.jit(partial(prefill_chunk, config=config, context=40))
    head = jax.jit(partial(head_logits, config=config))
    logits = np.zeros((3, 97), np.float32)
    for start in (0, 8, 16):
        own = jnp.asarray(padded[:, start : start + 8])
        x, caches, _ = chunk(params, caches=caches, tokens=own, start=jnp.int32(start), lengths=jnp.asarray(lengths))
        of_chunk = head(params, x=x)
        for row, last in enumerate(lengths - 1 - start):
            if 0 <= last < 8:
                logits[row] = of_chunk[row, last]
    apart = []
    step = jax.jit(partial(decode_step, config=config))
    for count in range(11):
        row = np.arange(3)
        apart += np.abs(np.asarray(logits) - expected[row, lengths - 1 + count]).max(axis=1).tolist()
        positions = lengths + count
        given = {"tokens": jnp.asarray(tokens[row, positions]), "positions": jnp.asarray(positions)}
        logits, caches, _ = step(params, caches=caches, **given)
    if (form, dtype) == ("compute", jnp.float32):
        assert max(apart) < 3e-5
    else:  # rounding may tip a stored value or a router's choice to either side
        assert np.quantile(apart, 0.8) < (1e-3 if dtype == jnp.float32 else 0.15)
    if dtype == jnp.float32 and form != "compute":
        uncached = _whole(params, config=config, tokens=jnp.asarray(tokens), cache=FORMATS["compute"])
        assert np.abs(expected - np.asarray(uncached)).max() > 5e-3


def test_cache_bytes_follow_windows():
    config = small_config()
    # Two layers of window 5 and two full ones; keys and values of 3 heads of 10 dimensions.
    assert cache_bytes(config, context=100, bytes_per_value=2) == (5 + 100 + 5 + 100) * 2 * 30 * 2


def test_modules_hold_the_same_tree_and_function():
    config = small_config(PAIR)
    params, tokens = random_params(config), random_tokens(config, 2, 13)
    model = MoeTransformer(config, params=params)
    np.testing.assert_allclose(
        nnx.jit(lambda model, tokens: model(tokens))(model, tokens), model_logits(params, config, tokens), atol=1e-6
    )
    assert jax.tree.structure(model.params()) == jax.tree.structure(params)
    state = nnx.state(model, nnx.Param)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(params))
    fresh = MoeTransformer(config, rngs=nnx.Rngs(3))
    assert vars(fresh.layers[1].moe)["gate_up"][...].shape == (7, 40, 48)


@pytest.mark.parametrize("data,model,spread", [(8, 1, False), (2, 3, True), (1, 7, False), (1, 7, True)])
def test_a_mesh_computes_what_one_device_does(data, model, spread):
    """Experts are left to XLA, or spread over the mesh where it divides them (7 devices do, 3 do not)."""
    config = small_config(PAIR)
    params, tokens = random_params(config), random_tokens(config, 8, 13)
    mesh = make_mesh(data, model)
    sharded = shard_params(params, config, mesh)
    if model == 7:
        assert len(sharded["layers"][0]["moe"]["gate_up"].sharding.device_set) == 7
        assert sharded["layers"][0]["moe"]["gate_up"].addressable_shards[0].data.shape == (1, 40, 48)
    with on_mesh(mesh if spread else None):
        out = model_logits(sharded, config, jax.device_put(tokens, batch_sharding(mesh)))
    np.testing.assert_allclose(jax.device_get(out), model_logits(params, config, tokens), atol=2e-5)


def test_too_large_a_mesh_is_refused():
    with pytest.raises(ConfigError, match="mesh of 3 x 3 needs 9 devices, but 8 are present"):
        make_mesh(3, 3)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_heads": 5}, "num_heads is 5, but must be a multiple of num_kv_heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"blocks": ()}, "blocks is empty"),
        ({"blocks": (BlockConfig(1),)}, "layer 0 has num_experts 1, but at least experts_per_token"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"swiglu_limit": -1.0}, "swiglu_limit is -1.0"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_config(**changes)


def test_impossible_blocks_and_ropes_are_refused():
    with pytest.raises(ConfigError, match="window is 0"):
        BlockConfig(4, 0)
    with pytest.raises(ConfigError, match=r"rope factor is 0\.5"):
        RopeConfig(factor=0.5)
    with pytest.raises(ConfigError, match="beta_fast must be above beta_slow"):
        RopeConfig(beta_fast=1.0, beta_slow=2.0)


def test_impossible_children_are_refused():
    config = small_config()
    with pytest.raises(ConfigError, match="ascending and distinct"):
        ChildBlock((2, 1), None)
    with pytest.raises(ConfigError, match="layer 0 keeps experts"):
        Child(config, (ChildBlock((1, 7), None), *CHILD_BLOCKS[1:]))
    with pytest.raises(ConfigError, match="at least experts_per_token"):
        Child(config, (ChildBlock((1,), None), *CHILD_BLOCKS[1:]))
    with pytest.raises(ConfigError, match="3 blocks were given"):
        Child(config, CHILD_BLOCKS[1:])


def test_a_delta_replaces_what_was_trained_and_nothing_else():
    config = small_config()
    params = random_params(config)
    delta = {"layers": [None, {"attention": {"q_bias": jnp.ones(60)}}, None, None], "final_norm": jnp.full(40, 2.0)}
    child = Child(config, identity_child(config).blocks, dense_delta=delta)
    cut = cut_params(params, child)
    np.testing.assert_array_equal(cut["layers"][1]["attention"]["q_bias"], np.ones(60))
    np.testing.assert_array_equal(cut["final_norm"], np.full(40, 2.0))
    np.testing.assert_array_equal(cut["layers"][1]["attention"]["k_bias"], params["layers"][1]["attention"]["k_bias"])
    assert isinstance(child.config, ModelConfig) and child.config == config
