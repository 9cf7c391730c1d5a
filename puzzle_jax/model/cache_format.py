"""How a cache keeps keys and values: a dtype, and for e4m3 one scale per layer for keys and one for values.

Scales are the largest magnitude seen over 448, the form in which checkpoints carry them (`self_attn.k_scale`,
`self_attn.v_scale`); see `kernels.float8`. Left out: scales per head, and formats other than e4m3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from puzzle_jax.errors import ConfigError, check_choice
from puzzle_jax.kernels.float8 import decode_e4m3, encode_e4m3

COMPUTE, FLOAT8 = "compute", "float8_e4m3fn"
CACHE_DTYPES = (COMPUTE, "float32", "bfloat16", FLOAT8)


class KVScales(NamedTuple):
    """Factors of the stored keys and values of each layer."""

    k: Float[Array, "layers"]
    v: Float[Array, "layers"]


@partial(jax.tree_util.register_dataclass, data_fields=["scales"], meta_fields=["dtype"])
@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are kept.

    Attributes:
      dtype: one of `CACHE_DTYPES`; "compute" is the dtype of the parameters.
      scales: for float8_e4m3fn; without them it stores numbers as they are, and what is above 448 saturates.

    Raises ConfigError for another dtype, and for scales that only a float8 cache would use.
    """

    dtype: str = field(default=COMPUTE)
    scales: KVScales | None = None

    def __post_init__(self) -> None:
        check_choice("cache dtype", self.dtype, CACHE_DTYPES)
        if self.scales is not None and self.dtype != FLOAT8:
            raise ConfigError(f"cache scales were given for dtype {self.dtype}, but only {FLOAT8} has any")

    def stored_dtype(self, compute: jnp.dtype | type) -> jnp.dtype:
        """The dtype at rest where computing is in `compute`; e4m3 lies as bytes."""
        return jnp.dtype({COMPUTE: compute, FLOAT8: jnp.uint8}.get(self.dtype, self.dtype))

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
        scales = self.layer_scales(layer)
        k, v = (_round_trip(x, self.stored_dtype(x.dtype), scale) for x, scale in zip((k, v), scales, strict=True))
        return k, v


def store(x: Float[Array, "*shape"], dtype: jnp.dtype | type, scale: Float[Array, ""] | None) -> Num[Array, "*shape"]:
    """Numbers as a cache of `dtype` keeps them."""
    return x.astype(dtype) if scale is None else encode_e4m3(x, scale)


def _round_trip(x: Array, dtype: jnp.dtype, scale: Array | None) -> Array:
    stored = store(x, dtype, scale)
    if scale is None:
        return stored.astype(x.dtype)
    return (decode_e4m3(stored, jnp.float32) * scale).astype(x.dtype)
