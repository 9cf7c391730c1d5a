"""Packed and dense weights: which form is used, and that a model gives the same results with either."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.load import load_weights
from puzzle_jax.convert_hf.table import tensor_bytes
from puzzle_jax.errors import ConfigError
from puzzle_jax.evaluate.divergence import divergence
from puzzle_jax.evaluate.models import Model
from puzzle_jax.generate import slots
from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.calibrate import largest_by_layer
from puzzle_jax.generate.engine import Engine, Request
from puzzle_jax.generate.traces import Trace
from puzzle_jax.kernels import mxfp4
from puzzle_jax.kernels.dispatch import recording
from puzzle_jax.kernels.expert_mlp import Experts, expert_outputs
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model import network, weights
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.network import hidden_states
from puzzle_jax.model.schedule import compiler_options
from puzzle_jax.model.sharding import make_mesh
from puzzle_jax.model.spec import count_params, is_spec, param_specs
from puzzle_jax.plan.engine import AbstractEngine
from puzzle_jax.search.rank.ranking import rank_experts
from puzzle_jax.search.rank.rows import packed_traces
from puzzle_jax.search.recipe import EMBEDDED_PARENT
from puzzle_jax.search.score.replace_one import Alternative, ReplaceOne
from tests.convert_hf.checkpoints import write_random
from tests.support import small_config

TINY = describe_checkpoint(EMBEDDED_PARENT)
CONFIG = TINY.config
BYTES = 4 * count_params(CONFIG)


@pytest.fixture(scope="module")
def both():
    return {form: load_weights(TINY, weights=form) for form in ("packed", "dense")}


# Which form is used ---------------------------------------------------------------------------------------------------


def test_dense_weights_must_fit_twice():
    def packed(setting="auto", stored=True, memory=2 * BYTES, mesh=None):
        return weights.stays_packed(setting, CONFIG, stored, dtype=jnp.float32, mesh=mesh, memory=memory)

    assert weights.weight_bytes(CONFIG, jnp.float32) == BYTES
    assert [packed(memory=size) for size in (2 * BYTES, 2 * BYTES - 1)] == [False, True]
    stored = weights.weight_bytes(CONFIG, jnp.bfloat16, packed=True)
    assert stored == tensor_bytes(CONFIG, "mxfp4")
    assert packed("packed") and not packed("dense", memory=1) and not packed(stored=False, memory=1)
    with pytest.raises(ConfigError, match=r"weights is packed, but the checkpoint's experts are not stored as MXFP4"):
        packed("packed", stored=False)
    with pytest.raises(ConfigError, match=r"weights is 'small', but must be one of auto, packed, dense"):
        packed("small")
    # Experts and vocabulary are sharded; the other arrays are not.
    mesh = make_mesh(1, 4)
    assert BYTES / 4 < weights.weight_bytes(CONFIG, jnp.float32, mesh) < BYTES / 3
    assert not packed(memory=2 * BYTES // 3, mesh=mesh)


def test_memory_is_the_hosts_or_the_containers(tmp_path, monkeypatch):
    whole = weights.host_memory()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(weights, "_CGROUP_LIMITS", (tmp_path / "none", limit))
    for text, expected in (("max\n", None), ("4096\n", 4096), (f"{1 << 60}\n", None)):
        limit.write_text(text)
        found = weights.host_memory()
        assert found == expected if expected else found >= whole
    limit.write_text("81920")
    assert weights.device_memory() == 81920 // jax.local_device_count("cpu")


def test_a_checkpoint_without_packed_experts_is_refused_before_it_is_read(tmp_path):
    directory = write_random(tmp_path / "model", small_config(vocab_size=128), "bf16")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (directory / file).write_bytes((EMBEDDED_PARENT / file).read_bytes())
    with pytest.raises(ConfigError, match=r"model 'mine': weights is packed"):
        Model.open("mine", directory, weights="packed")
    assert isinstance(Model.open("mine", directory).weights, str)


# What they hold, and the results ------------------------------------------------------------------------------------


def test_packed_weights_are_as_stored_and_dense_ones_what_they_mean(both):
    packed, dense = both["packed"], both["dense"]
    assert packed["head"].dtype == packed["embedding"].dtype == jnp.bfloat16
    assert packed["final_norm"].dtype == dense["head"].dtype == jnp.float32
    moe = packed["layers"][3]["moe"]
    assert isinstance(moe["gate_up"], MXFP4) and moe["router_weight"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(mxfp4.decode(moe["down"]), dense["layers"][3]["moe"]["down"])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    assert size < 0.25 * sum(leaf.nbytes for leaf in jax.tree.leaves(dense))


def test_hidden_states_and_choices_are_the_same_bits(both):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 37)), jnp.int32)
    run = jax.jit(lambda params: hidden_states(params, CONFIG, tokens))
    (x, one), (y, other) = run(both["packed"]), run(both["dense"])
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(x, y)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.routing.ids, b.routing.ids)


def test_answers_ranking_and_scores_agree(both):
    """Compares the first four layers, two of each kind."""
    config = replace(CONFIG, blocks=CONFIG.blocks[:4])
    first = [params | {"layers": params["layers"][:4]} for params in both.values()]
    rng = np.random.default_rng(1)
    requests = [Request(tuple(rng.integers(0, 120, size).tolist()), 9, size) for size in (11, 19)]
    answers = [Engine(params, config, stop_ids=(), context=64, slots=2).generate(requests) for params in first]
    assert [answer.tokens for answer in answers[0]] == [answer.tokens for answer in answers[1]]
    traces = [
        Trace("t", "low", number, {}, request.prompt, answer.tokens, 1.0, False)
        for number, (request, answer) in enumerate(zip(requests, answers[0], strict=True))
    ]
    batches = micro_batches(traces, tokens_per_batch=128)
    one, other = (rank_experts(params, config, packed_traces(traces, 128)) for params in first)
    for method, found in one.scores.items():
        np.testing.assert_allclose(found, other.scores[method], rtol=1e-4, atol=1e-7)
    half = np.arange(config.blocks[0].num_experts) % 2 == 0
    wanted = [(layer, Alternative(half, config.blocks[layer].window)) for layer in (0, 3)]
    scores = [ReplaceOne(params, config)(batches[0], wanted) for params in first]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5, atol=1e-6)
    assert scores[0][..., 0].max() > 0.01


def test_experts_that_are_too_many_to_be_decoded_together_are_decoded_one_at_a_time(both, monkeypatch):
    moe, dense = both["packed"]["layers"][0]["moe"], both["dense"]["layers"][0]["moe"]
    names = ("gate_up", "gate_up_bias", "down", "down_bias")
    packed, own = Experts(*(moe[name] for name in names)), Experts(*(dense[name] for name in names))
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(24, CONFIG.hidden_size)), jnp.float32)
    ids = jnp.asarray(np.stack([rng.permutation(16)[:2] for _ in range(24)]), jnp.int32)
    size = 16 * 3 * 64 * 32 * 4

    def outputs(experts, x):
        return expert_outputs(x, ids, experts, limit=CONFIG.swiglu_limit)

    def gradient(experts):
        return jax.jit(jax.grad(lambda x: jnp.sum(outputs(experts, x) ** 2)))(x)

    expected, wanted = jax.jit(partial(outputs, own))(x), gradient(own)
    for most, serving in ((size, "capacity"), (size - 1, "looped")):
        monkeypatch.setattr(mxfp4, "MOST_DECODED", most)
        with recording() as choices:
            found = jax.jit(partial(outputs, packed))(x)
        assert choices[-1].chosen == serving
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradient(packed), wanted, rtol=1e-4, atol=1e-5)


def test_a_large_head_that_is_narrow_is_cast_part_by_part(both, monkeypatch):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, CONFIG.hidden_size)), jnp.float32)
    whole = network.head_logits(both["dense"], CONFIG, x)
    monkeypatch.setattr(network, "MOST_DECODED", 4 * CONFIG.hidden_size * 30)  # of 128 columns
    parts = jax.jit(network.head_logits, static_argnums=1)(both["packed"], CONFIG, x)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)
    assert "while" in jax.jit(network.head_logits, static_argnums=1).lower(both["packed"], CONFIG, x).as_text()


@pytest.mark.parametrize("name", ["prefill", "decode", "scales", "divergence"])
def test_what_is_stored_in_fewer_bits_is_cast_for_one_layer_at_a_time(monkeypatch, name):
    vocab = 80_021
    monkeypatch.setattr(network, "MOST_DECODED", 1 << 20)
    config = small_config((BlockConfig(3, None),), vocab_size=vocab, num_heads=30, head_dim=64)

    def temporaries(layers):
        deep = replace(config, blocks=config.blocks * layers)

        def stored(spec):
            narrow = len(spec.shape) == 2 and "router" not in spec.axes
            return jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16 if narrow else jnp.float32)

        params = jax.tree.map(stored, param_specs(deep), is_leaf=is_spec)
        engine = AbstractEngine(deep, 2, 64, CacheFormat("float32"))
        numbers = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        rows = engine.rows
        states = jax.ShapeDtypeStruct((2, 5, config.hidden_size), jnp.float32)
        chunk = numbers((rows, 64))
        program, given = {
            "prefill": (
                lambda params, *given: slots.prefill.function(params, deep, *given, 64, None),
                (engine.group(), chunk, numbers(()), numbers((rows,))),
            ),
            "decode": (
                lambda params, state, stops, *steps: slots.decode.function(
                    params, deep, state, stops, 0.0, *steps, None, 1.0
                ),
                (engine.state(), numbers((1,)), numbers(()), numbers(())),
            ),
            "scales": (
                lambda params, tokens: largest_by_layer.function(params, deep, tokens, tokens > 0, None),
                (chunk,),
            ),
            "divergence": (lambda params, *given: divergence(params, deep, *given, chunk=97).kl, (states, states)),
        }[name]
        jitted = jax.jit(program, compiler_options=compiler_options())
        found = jitted.lower(params, *given).compile().memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    shallow, deep = temporaries(2), temporaries(5)
    cast = 4 * config.hidden_size * config.query_width  # one of the two large matrices of a layer, in float32
    assert deep - shallow < 3 * cast
    assert deep < 4 * config.hidden_size * vocab  # a float32 copy of the embedding or of the head


def test_a_mesh_holds_packed_experts_where_they_are_run():
    mesh = make_mesh(1, 4)
    params = load_weights(TINY, mesh, "packed")
    down = params["layers"][1]["moe"]["down"]
    assert isinstance(down, MXFP4)
    assert down.codes.addressable_shards[2].data.shape == (4, CONFIG.hidden_size, CONFIG.intermediate_size // 2)
    assert params["head"].addressable_shards[2].data.shape == (CONFIG.hidden_size, CONFIG.vocab_size // 4)
