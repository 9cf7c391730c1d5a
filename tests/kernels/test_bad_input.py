"""Arguments that do not fit are refused by name before anything runs."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest

from puzzle_jax.kernels import checks
from puzzle_jax.kernels.chunk_attention import chunk_attention
from puzzle_jax.kernels.decode_attention import decode_attention
from puzzle_jax.kernels.expert_mlp import Experts, expert_outputs
from puzzle_jax.kernels.grouped_matmul import grouped_matmul
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.kernels.window_attention import window_attention

BATCH, SEQ, HEADS, KV_HEADS, DIM, SLOTS, CHUNK = 2, 9, 6, 3, 4, 16, 5


def of(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def window_arguments():
    return {
        "q": of(BATCH, SEQ, HEADS, DIM),
        "k": of(BATCH, SEQ, KV_HEADS, DIM),
        "v": of(BATCH, SEQ, KV_HEADS, DIM),
        "sinks": of(HEADS),
        "window": 3,
    }


def decode_arguments():
    return {
        "q": of(BATCH, HEADS, DIM),
        "k_cache": of(BATCH, KV_HEADS, DIM, SLOTS),
        "v_cache": of(BATCH, KV_HEADS, SLOTS, DIM),
        "sinks": of(HEADS),
        "positions": of(BATCH, dtype=jnp.int32),
        "window": None,
    }


def chunk_arguments():
    return {
        "q": of(BATCH, CHUNK, HEADS, DIM),
        "k": of(BATCH, KV_HEADS, DIM, CHUNK),
        "v": of(BATCH, KV_HEADS, CHUNK, DIM),
        "k_cache": of(BATCH, KV_HEADS, DIM, SLOTS),
        "v_cache": of(BATCH, KV_HEADS, SLOTS, DIM),
        "sinks": of(HEADS),
        "start": jnp.int32(0),
        "window": None,
    }


OPERATIONS = {
    "window": (window_attention, window_arguments),
    "decode": (decode_attention, decode_arguments),
    "chunk": (chunk_attention, chunk_arguments),
}

CASES = [
    ("window", {"window": 0}, "window is 0, but must be at least 1, or None for all keys"),
    ("decode", {"window": -4}, "window is -4, but must be at least 1"),
    ("chunk", {"window": 0}, "window is 0"),
    (
        "window",
        {"k": of(BATCH, SEQ, 4, DIM), "v": of(BATCH, SEQ, 4, DIM)},
        r"q of shape \(2, 9, 6, 4\) has 6 heads, which is no multiple of the 4 of k of shape \(2, 9, 4, 4\)",
    ),
    (
        "decode",
        {"k_cache": of(BATCH, 5, DIM, SLOTS), "v_cache": of(BATCH, 5, SLOTS, DIM)},
        r"has 6 heads, which is no multiple of the 5 of k_cache of shape \(2, 5, 4, 16\)",
    ),
    (
        "window",
        {"implementation": "flash"},
        "window_attention has no implementation 'flash'; known: mosaic_gpu_wide, mosaic_gpu, splash, dew_flash_attn, ",
    ),
]


@cache
def takes_what_fits(operation):
    run, arguments = OPERATIONS[operation]
    jax.jit(lambda: run(**arguments()))()


@pytest.mark.parametrize("operation,change,message", CASES)
def test_attention(operation, change, message):
    run, arguments = OPERATIONS[operation]
    takes_what_fits(operation)
    with pytest.raises(ValueError, match=message):
        run(**{**arguments(), **change})


@pytest.mark.parametrize(
    "operation,name",
    [("window", "mosaic_gpu"), ("window", "splash"), ("decode", "mosaic_tpu"), ("chunk", "mosaic_gpu")],
)
def test_a_kernel_that_is_asked_for_says_why_it_cannot(operation, name):
    run, arguments = OPERATIONS[operation]
    why = f"{name} of {operation}_attention was asked for: (needs JAX|for TPUs, but this is cpu|for GPUs)"
    with pytest.raises(NotImplementedError, match=why):
        run(**arguments(), implementation=name)


def test_packed_weights_whose_halves_do_not_fit():
    weights = MXFP4(of(3, 7, 32, dtype=jnp.uint8), of(3, 7, 1, dtype=jnp.uint8))
    message = r"weights.codes has shape \(3, 7, 32\), but weights.scales of shape \(3, 7, 1\) needs \(3, 7, 16\)"
    with pytest.raises(ValueError, match=message):
        grouped_matmul(of(4, 32), weights, jnp.asarray([1, 2, 1]))


def test_arrays_that_annotations_do_not_speak_of():
    with pytest.raises(ValueError, match=r"sinks has shape \(7,\), but q of shape \(2, 9, 6, 4\) needs \(6,\)"):
        checks.shapes("q of shape (2, 9, 6, 4)", {"sinks": (of(HEADS + 1), (HEADS,))})
    with pytest.raises(ValueError, match="v has dtype int32, but must be floating point"):
        checks.floating(q=of(1), v=of(1, dtype=jnp.int32))
    with pytest.raises(ValueError, match="k_cache has dtype int8, but must be floating point, or uint8 for e4m3"):
        checks.cached(k_cache=of(1, dtype=jnp.int8))
    checks.cached(k_cache=of(1, dtype=jnp.uint8), v_cache=of(1, dtype=jnp.bfloat16))
    with pytest.raises(ValueError, match=r"window has shape \(3,\) and dtype int32, but must be 2 whole numbers"):
        checks.window(jnp.asarray([1, 2, 3]), 2)


def test_nothing_at_all_gives_nothing():
    experts = Experts(of(3, 8, 10), of(3, 10), of(3, 5, 8), of(3, 8))
    assert expert_outputs(of(0, 8), of(0, 2, dtype=jnp.int32), experts, limit=7.0).shape == (0, 2, 8)
    assert grouped_matmul(of(0, 8), of(3, 8, 5), jnp.zeros(3, jnp.int32)).shape == (0, 5)
