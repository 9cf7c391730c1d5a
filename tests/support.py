"""Random models for tests: every dimension distinct, every bias and sink random, values large enough to clamp."""

from __future__ import annotations

import io
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from puzzle_jax.config import BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.model.network import forward
from puzzle_jax.model.spec import Params, ParamSpec, is_spec, param_specs

T = TypeVar("T")

BLOCKS = (BlockConfig(7, 5), BlockConfig(7, None), BlockConfig(7, 5), BlockConfig(7, None))


def small_config(blocks: tuple[BlockConfig, ...] = BLOCKS, **changes: object) -> ModelConfig:
    """97 tokens, hidden 40, intermediate 24, 6 heads on 3 of 10 dimensions, 2 of 7 experts, windows of 5."""
    settings = dict(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=24,
        num_heads=6,
        num_kv_heads=3,
        head_dim=10,
        experts_per_token=2,
        rope=RopeConfig(theta=10_000.0, factor=4.0, original_context=32),
        max_position=512,
        swiglu_limit=1.5,
    )
    return ModelConfig(blocks=blocks, **{**settings, **changes})  # type: ignore[arg-type]


def random_params(config: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> Params:
    """Fresh parameters in which norms, biases and sinks are random too, not ones and zeros."""
    rng = np.random.default_rng(seed)  # NumPy's, since JAX's would compile a program for every shape

    def draw(spec: ParamSpec) -> jax.Array:
        values = rng.standard_normal(spec.shape)
        values = values * spec.fan_in**-0.5 if spec.init == "normal" else 0.5 * values + (spec.init == "ones")
        return jnp.asarray(values.astype(np.float32).astype(dtype))

    return jax.tree.map(draw, param_specs(config), is_leaf=is_spec)


def normal(seed: int, *shapes: tuple[int, ...], dtype: Any = np.float32) -> tuple[jax.Array, ...]:
    """Standard normal numbers drawn by NumPy, since JAX would compile a program for every shape."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape).astype(np.float32).astype(dtype)) for shape in shapes)


def random_tokens(config: ModelConfig, batch: int, seq: int, seed: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, (batch, seq), np.int32))


def model_logits(params: Params, config: ModelConfig, tokens: jax.Array, **options: object) -> jax.Array:
    """`network.forward` as one compiled program, which is ready sooner than its operations one by one."""
    if not options:
        return _forward(params, config, tokens)
    return jax.jit(lambda params, tokens: forward(params, config, tokens, **options))(params, tokens)


_forward = jax.jit(forward, static_argnums=1)


def present(value: T | None) -> T:
    """The value, asserted not to be None."""
    assert value is not None
    return value


def of_type(kind: type[T], value: object) -> T:
    """The value, asserted to be of a narrower type than the declared one."""
    assert isinstance(value, kind)
    return value


def printed(console: Console) -> str:
    """Everything printed to a console whose file is a `StringIO`."""
    return of_type(io.StringIO, console.file).getvalue()


@runtime_checkable
class Jitted(Protocol):
    """Methods that a function of `jax.jit` has but its type does not declare."""

    def clear_cache(self) -> None: ...
    def _cache_size(self) -> int: ...


def jitted(program: object) -> Jitted:
    """The function of `jax.jit`, typed so that its compiled programs can be counted and cleared."""
    assert isinstance(program, Jitted)
    return program


def chat_config() -> ModelConfig:
    """Two layers over the embedded parent's 128 tokens, with expert sizes that MXFP4 groups divide: for whole runs."""
    return ModelConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=32,
        num_heads=6,
        num_kv_heads=3,
        head_dim=10,
        experts_per_token=2,
        blocks=(BlockConfig(8, 16), BlockConfig(8, None)),
        rope=RopeConfig(theta=10_000.0, factor=4.0, original_context=256),
        max_position=768,
    )
