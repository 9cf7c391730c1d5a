"""How a cache stores keys and values: a dtype, and for e4m3 one scale per layer for keys and one for values.

Scales are the largest magnitude seen divided by 448, the form in which checkpoints carry them (`self_attn.k_scale`,
`self_attn.v_scale`); see `kernels.float8`.

A CPU has no e4m3 arithmetic and decodes the whole cache in every step, which takes as long as attention itself. There,
a cache of at most `ROUNDED` slots holds the same rounded numbers in the compute dtype: it saves no memory where there
is little to save, and costs no time. Longer caches are stored as bytes everywhere.

Left out: scales per head, and formats other than e4m3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from puzzle_jax.config import ModelConfig, cache_slots
from puzzle_jax.errors import ConfigError, check_choice
from puzzle_jax.kernels.float8 import encode_e4m3, round_e4m3
from puzzle_jax.kernels.platform import target_platform

COMPUTE, FLOAT8 = "compute", "float8_e4m3fn"
CACHE_DTYPES = (COMPUTE, "float32", "bfloat16", FLOAT8)

ROUNDED = 512
"""Most slots of a layer's e4m3 cache for which it holds rounded numbers on CPUs; larger caches hold bytes."""


class KVScales(NamedTuple):
    """Factors by which each layer's stored keys and values are multiplied when they are read."""

    k: Float[Array, "layers"]
    v: Float[Array, "layers"]


@partial(jax.tree_util.register_dataclass, data_fields=["scales"], meta_fields=["dtype"])
@dataclass(frozen=True)
class CacheFormat:
    """How a cache stores keys and values.

    Attributes:
      dtype: one of `CACHE_DTYPES`; "compute" is the dtype of the parameters.
      scales: scales for float8_e4m3fn; without them numbers are stored unscaled, and those above 448 saturate.

    Raises ConfigError for another dtype, and for scales with any dtype but float8_e4m3fn.
    """

    dtype: str = field(default=COMPUTE)
    scales: KVScales | None = None

    def __post_init__(self) -> None:
        check_choice("cache dtype", self.dtype, CACHE_DTYPES)
        if self.scales is not None and self.dtype != FLOAT8:
            raise ConfigError(f"cache scales were given for dtype {self.dtype}, but only {FLOAT8} has any")

    def stored_dtype(self, slots: int, compute: jnp.dtype | type) -> jnp.dtype:
        """The dtype in which a layer's cache of `slots` slots is stored when computing in `compute`; e4m3 is stored as
        bytes, except in small caches on CPUs."""
        if self.dtype == FLOAT8 and (slots > ROUNDED or target_platform() != "cpu"):
            return jnp.dtype(jnp.uint8)
        return jnp.dtype(compute if self.dtype in (COMPUTE, FLOAT8) else self.dtype)

    def cache_bytes(self, config: ModelConfig, context: int, compute: jnp.dtype | type) -> int:
        """Bytes of one request's cache over all layers, on the platform that kernels are chosen for."""
        slots = [cache_slots(block.window, context) for block in config.blocks]
        return 2 * config.kv_width * sum(each * self.stored_dtype(each, compute).itemsize for each in slots)

    def layer_scales(self, layer: int) -> tuple[Float[Array, ""], Float[Array, ""]] | tuple[None, None]:
        """Scales of one layer's keys and values; None unless the cache is float8."""
        if self.dtype != FLOAT8:
            return None, None
        if self.scales is None:
            return jnp.ones((), jnp.float32), jnp.ones((), jnp.float32)
        return self.scales.k[layer].astype(jnp.float32), self.scales.v[layer].astype(jnp.float32)

    def round_trip(
        self, layer: int, k: Float[Array, "*shape"], v: Float[Array, "*shape"]
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        """One layer's keys and values as a cache gives them back, in the same dtype."""
        k_scale, v_scale = self.layer_scales(layer)
        return self._round_trip(k, k_scale), self._round_trip(v, v_scale)

    def _round_trip(self, x: Float[Array, "*shape"], scale: Float[Array, ""] | None) -> Float[Array, "*shape"]:
        if scale is not None:
            return (round_e4m3(x, scale, jnp.float32) * scale).astype(x.dtype)
        return x if self.dtype == COMPUTE else x.astype(self.dtype).astype(x.dtype)


def store(x: Float[Array, "*shape"], dtype: jnp.dtype | type, scale: Float[Array, ""] | None) -> Num[Array, "*shape"]:
    """Numbers as a cache of `dtype` keeps them; with a scale, rounded to e4m3."""
    if scale is None:
        return x.astype(dtype)
    return encode_e4m3(x, scale) if dtype == jnp.uint8 else round_e4m3(x, scale, dtype)
