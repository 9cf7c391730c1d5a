"""Description of a model: dimensions shared by all layers, and one block description per layer.

`ModelConfig` describes a network in which every layer may have its own number of experts and its own attention window,
which is the search space of Puzzle for mixture-of-experts models (arXiv 2602.11937). A parent and its children differ
in `blocks` alone (and, for long contexts, in the YaRN factor). `Variant` says what the blocks of a family of models
have besides their sizes.

This module uses neither arrays nor JAX, so that a configuration can be read, checked and counted anywhere.
Left out: file formats; `puzzle_jax.convert_hf.configuration.config_json` reads and writes config.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from puzzle_jax.errors import ConfigError, check_range

EFFORTS: tuple[str, ...] = ("low", "medium", "high")
"""Reasoning efforts in rising order: the values of `reasoning_effort` in chat templates that have it; for others see
`puzzle_jax.tasks.chat.formats`."""


@dataclass(frozen=True)
class Variant:
    """The parts that blocks of a family have; all else about a family is in its checkpoints and chat template.

    Attributes:
      family: the `model_type` of its plain checkpoints.
      attention_bias: biases of the four projections of attention.
      sinks: an attention sink for every query head.
      qk_norm: queries and keys are normalised per head, each by a learned RMSNorm, before they are rotated.
      router_bias, expert_bias: biases of the router and of both matrices of every expert.
      normalized_gates: the gates of a token's experts sum to one; otherwise each is the expert's share of a softmax
        over all experts of the layer.
      tied_head: the output head is the transposed embedding.
    """

    family: str = "gpt_oss"
    attention_bias: bool = True
    sinks: bool = True
    qk_norm: bool = False
    router_bias: bool = True
    expert_bias: bool = True
    normalized_gates: bool = True
    tied_head: bool = False


GPT_OSS = Variant()
QWEN3_MOE = Variant("qwen3_moe", False, sinks=False, qk_norm=True, router_bias=False, expert_bias=False)


@dataclass(frozen=True)
class BlockConfig:
    """One layer's number of experts and attention window: the keys that a query sees, its own position's included.

    A window of None means full causal attention. A layer of 0 experts is dense: one feed-forward network without a
    router, of the width `ModelConfig.dense_size`.
    """

    num_experts: int
    window: int | None = None

    def __post_init__(self) -> None:
        _require_int("num_experts", self.num_experts, minimum=0)
        if self.window is not None:
            _require_int("window", self.window, minimum=1)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding with YaRN scaling (arXiv 2309.00071); factor 1 is plain RoPE.

    Attributes:
      theta: base of the rotary frequencies.
      factor: context extension; frequencies below the ramp are divided by it.
      beta_fast, beta_slow: rotations over `original_context` that bound the ramp.
      original_context: tokens of context before extension.
      truncate: whether the ramp's bounds are rounded to whole dimensions (False in gpt-oss).
    """

    theta: float = 150_000.0
    factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_context: int = 4096
    truncate: bool = False

    def __post_init__(self) -> None:
        check_range("rope theta", self.theta, 1, above=True)
        check_range("rope factor", self.factor, 1)
        if not self.beta_fast > self.beta_slow > 0:
            raise ConfigError(
                f"rope beta_fast is {self.beta_fast} and beta_slow {self.beta_slow}, "
                "but beta_fast must be above beta_slow and both above 0"
            )
        _require_int("rope original_context", self.original_context, minimum=1)

    @property
    def magnitude(self) -> float:
        """The factor on both cosine and sine that YaRN prescribes, 0.1 ln(factor) + 1."""
        return 1.0 if self.factor == 1.0 else 0.1 * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A network with one `BlockConfig` per layer.

    Attributes:
      intermediate_size: width of one expert.
      swiglu_limit: clamp of gpt-oss's SwiGLU; None is plain SwiGLU, silu(gate) * up.
      dense_size: width of dense layers; None where there are none.

    Raises `ConfigError`, naming field, value and rule, when a dimension is impossible.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    experts_per_token: int
    blocks: tuple[BlockConfig, ...]
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_position: int = 131_072
    rms_norm_eps: float = 1e-5
    swiglu_limit: float | None = 7.0
    variant: Variant = GPT_OSS
    dense_size: int | None = None

    def __post_init__(self) -> None:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        for name in (*names, "experts_per_token", "max_position"):
            _require_int(name, getattr(self, name), minimum=1)
        if not self.blocks:
            raise ConfigError("blocks is empty, but a model needs at least one layer")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads is {self.num_heads}, but must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, but rotary embeddings need an even number")
        check_range("rms_norm_eps", self.rms_norm_eps, 0, above=True)
        if self.swiglu_limit is not None and not self.swiglu_limit > 0:
            raise ConfigError(f"swiglu_limit is {self.swiglu_limit}, but must be above 0")
        if self.dense_size is not None:
            _require_int("dense_size", self.dense_size, minimum=1)
        for index, block in enumerate(self.blocks):
            if block.num_experts == 0 and self.dense_size is not None:
                continue
            if block.num_experts < self.experts_per_token:
                raise ConfigError(
                    f"layer {index} has num_experts {block.num_experts}, "
                    f"but at least experts_per_token ({self.experts_per_token}) are needed"
                )

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def with_blocks(self, blocks: tuple[BlockConfig, ...]) -> ModelConfig:
        """The same model with other blocks, of which there must be as many."""
        if len(blocks) != len(self.blocks):
            raise ConfigError(f"{len(blocks)} blocks were given for a model of {len(self.blocks)} layers")
        return replace(self, blocks=tuple(blocks))


def window_name(window: int | None) -> str:
    """The name of a window in files and messages: "full" for full attention, else its number."""
    return "full" if window is None else str(window)


def cache_slots(window: int | None, context: int) -> int:
    """Cache slots that a layer needs for a context of this many tokens."""
    return context if window is None else min(window, context)


def cache_bytes(config: ModelConfig, context: int, bytes_per_value: int) -> int:
    """Bytes of one request's cache over all layers."""
    slots = sum(cache_slots(block.window, context) for block in config.blocks)
    return slots * 2 * config.kv_width * bytes_per_value


def _require_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} is {value!r}, but must be a whole number of at least {minimum}")
