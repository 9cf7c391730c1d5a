"""The parameters of a model: one table gives every array's shape, logical axes and initialiser.

Parameters are a plain pytree, {"embedding", "layers": [{"attention", "moe"}, ...], "final_norm", "head"}, and every
function of this package takes that tree; `puzzle_jax.model.modules` wraps it in Flax NNX for those who want modules.
Matrices are [inputs, outputs]. Expert matrices may be dense arrays or `kernels.mxfp4.MXFP4`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.kernels.expert_mlp import Experts

Params = dict[str, Any]


@dataclass(frozen=True)
class ParamSpec:
    """Specification of one parameter array.

    Attributes:
      shape: its dimensions.
      axes: logical name of each dimension; `model.sharding` maps them to a mesh.
      init: "ones", "zeros", or "normal" with a standard deviation of fan_in ** -0.5.
      fan_in: number of inputs that are summed into one output.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["ones", "zeros", "normal"] = "normal"
    fan_in: int = 1

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)


def attention_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Arrays of one attention sub-block, its norm included."""
    hidden, queries, keys = config.hidden_size, config.query_width, config.kv_width
    return {
        "norm": ParamSpec((hidden,), ("hidden",), "ones"),
        "q_weight": ParamSpec((hidden, queries), ("hidden", "heads"), fan_in=hidden),
        "q_bias": ParamSpec((queries,), ("heads",), "zeros"),
        "k_weight": ParamSpec((hidden, keys), ("hidden", "kv_heads"), fan_in=hidden),
        "k_bias": ParamSpec((keys,), ("kv_heads",), "zeros"),
        "v_weight": ParamSpec((hidden, keys), ("hidden", "kv_heads"), fan_in=hidden),
        "v_bias": ParamSpec((keys,), ("kv_heads",), "zeros"),
        "o_weight": ParamSpec((queries, hidden), ("heads", "hidden"), fan_in=queries),
        "o_bias": ParamSpec((hidden,), ("hidden",), "zeros"),
        "sinks": ParamSpec((config.num_heads,), ("sinks",), "zeros"),
    }


def moe_specs(config: ModelConfig, block: BlockConfig) -> dict[str, ParamSpec]:
    """Arrays of one mixture of experts, its norm included."""
    hidden, inter, experts = config.hidden_size, config.intermediate_size, block.num_experts
    return {
        "norm": ParamSpec((hidden,), ("hidden",), "ones"),
        "router_weight": ParamSpec((hidden, experts), ("hidden", "router"), fan_in=hidden),
        "router_bias": ParamSpec((experts,), ("router",), "zeros"),
        "gate_up": ParamSpec((experts, hidden, 2 * inter), ("experts", "hidden", "inter"), fan_in=hidden),
        "gate_up_bias": ParamSpec((experts, 2 * inter), ("experts", "inter"), "zeros"),
        "down": ParamSpec((experts, inter, hidden), ("experts", "inter", "hidden"), fan_in=inter),
        "down_bias": ParamSpec((experts, hidden), ("experts", "hidden"), "zeros"),
    }


EXPERT_MATRICES = ("gate_up", "down")


def param_specs(config: ModelConfig) -> Params:
    """The tree of `ParamSpec` of a model, in the structure of its parameters."""
    vocab, hidden = config.vocab_size, config.hidden_size
    return {
        # A standard deviation of hidden ** -0.5, as if the embedding were a projection of the hidden state.
        "embedding": ParamSpec((vocab, hidden), ("vocab", "hidden"), fan_in=hidden),
        "layers": [{"attention": attention_specs(config), "moe": moe_specs(config, b)} for b in config.blocks],
        "final_norm": ParamSpec((hidden,), ("hidden",), "ones"),
        "head": ParamSpec((hidden, vocab), ("hidden", "vocab"), fan_in=hidden),
    }


def subtree(tree: PyTree, path: Iterable[str | int]) -> PyTree:
    """Returns the node at `path` in a tree with the structure of parameters."""
    for key in path:
        tree = tree[key]
    return tree


def is_spec(node: object) -> bool:
    return isinstance(node, ParamSpec)


def init_params(config: ModelConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Draws the parameters of an untrained model."""
    specs, tree = jax.tree.flatten(param_specs(config), is_leaf=is_spec)

    def draw(spec: ParamSpec, key: jax.Array) -> jax.Array:
        if spec.init == "normal":
            return (jax.random.normal(key, spec.shape) * spec.fan_in**-0.5).astype(dtype)
        return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, dtype)

    return jax.tree.unflatten(tree, [draw(s, k) for s, k in zip(specs, jax.random.split(key, len(specs)), strict=True)])


def count_params(config: ModelConfig) -> int:
    """The exact number of parameters."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(param_specs(config), is_leaf=is_spec))


def layer_experts(moe: Params) -> Experts:
    """The experts of one layer's `moe` parameters in the form that kernels take."""
    return Experts(moe["gate_up"], moe["gate_up_bias"], moe["down"], moe["down_bias"])
