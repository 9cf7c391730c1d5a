import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate.caches import amplify
from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.calibrate import calibrate_cache
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.cache_format import FLOAT8, CacheFormat
from puzzle_jax.model.child import Child, ChildBlock
from puzzle_jax.model.network import attention_block, embed, moe_block
from puzzle_jax.model.rope import rope_table
from tests.support import model_logits, random_params, random_tokens, small_config

CONFIG = small_config((BlockConfig(7, 5), BlockConfig(7, None)))
PARAMS = random_params(CONFIG)


def traces():
    rng = np.random.default_rng(0)
    return [
        Trace(
            "t",
            "low",
            i,
            {},
            tuple(rng.integers(0, 97, p).tolist()),
            tuple(rng.integers(0, 97, c).tolist()),
            1.0,
            False,
        )
        for i, (p, c) in enumerate(((9, 5), (70, 30), (3, 1)))
    ]


def by_hand(view=None):
    """The largest magnitudes, trace by trace, without padding."""

    @jax.jit
    def magnitudes(tokens):
        table = rope_table(CONFIG.rope, CONFIG.head_dim, jnp.arange(tokens.shape[1])[None])
        x, largest = embed(PARAMS, tokens), []
        for index, layer in enumerate(PARAMS["layers"]):
            window = CONFIG.blocks[index].window if view is None else view.windows[index]
            x, qkv = attention_block(layer["attention"], CONFIG, x, table, window=window)
            largest.append((jnp.abs(qkv.k).max(), jnp.abs(qkv.v).max()))
            x, _ = moe_block(layer["moe"], CONFIG, x, expert_mask=None if view is None else view.expert_masks[index])
        return largest

    return np.max([magnitudes(jnp.asarray([trace.prompt + trace.completion])) for trace in traces()], axis=0)


@pytest.mark.parametrize("viewed", [False, True])
def test_scales_are_the_largest_magnitudes_over_448(viewed):
    blocks = (ChildBlock((1, 3, 4, 6), 3), ChildBlock((0, 2, 5), 6))
    view = Child(CONFIG, blocks).view if viewed else None
    calls = []
    batches = micro_batches(traces(), tokens_per_batch=256, smallest=64)
    scales = calibrate_cache(PARAMS, CONFIG, batches, view=view, on_batch=lambda: calls.append(1))
    np.testing.assert_allclose(np.stack([scales.k, scales.v], axis=1), by_hand(view) / 448, rtol=2e-5)
    assert len(calls) == len(batches) == 2


def test_without_traces_or_with_dead_keys_there_is_no_scale():
    with pytest.raises(PuzzleError, match="no traces to calibrate"):
        calibrate_cache(PARAMS, CONFIG, [])
    dead = jax.tree.map(lambda leaf: leaf, PARAMS)
    attention = dead["layers"][1]["attention"]
    attention["k_weight"], attention["k_bias"] = attention["k_weight"] * 0, attention["k_bias"] * 0
    with pytest.raises(PuzzleError, match=r"layer 1: the largest k on the traces is 0\.0"):
        calibrate_cache(dead, CONFIG, micro_batches(traces()))


def test_a_cache_that_overflows_needs_its_scales_and_with_them_loses_no_more():
    """With keys and values 2^12 times as large, the model computes the same function, but they are far above 448."""
    large = amplify(PARAMS, 12)
    tokens = random_tokens(CONFIG, 2, 40)
    exact = np.asarray(model_logits(PARAMS, CONFIG, tokens))
    np.testing.assert_allclose(model_logits(large, CONFIG, tokens), exact, atol=2e-5)
    batches = micro_batches(traces())

    def error(params, scaled):
        scales = calibrate_cache(params, CONFIG, batches) if scaled else None
        cached = model_logits(params, CONFIG, tokens, cache=CacheFormat(FLOAT8, scales))
        return float(np.sqrt(np.mean((np.asarray(cached) - exact) ** 2)))

    np.testing.assert_allclose(error(large, scaled=True), error(PARAMS, scaled=True), rtol=1e-3)
    assert error(large, scaled=False) > 5 * error(large, scaled=True)
