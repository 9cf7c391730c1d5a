"""The parameters of a model: one table gives every array's shape, logical axes and initialiser.

Parameters are a plain pytree, {"embedding", "layers": [{"attention", "moe"}, ...], "final_norm", "head"}, and every
function of this package takes that tree; `puzzle_jax.model.modules` wraps it in Flax NNX for those who want modules.
Matrices are [inputs, outputs]. Expert matrices may be dense arrays or `kernels.mxfp4.MXFP4`, and their gate and up
columns alternate. What a family's `Variant` lacks (biases, sinks, norms of queries and keys, a head of its own) is not
in the tree, nor is the router of a dense layer, which is a mixture of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

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
    variant, specs = config.variant, {"norm": ParamSpec((hidden,), ("hidden",), "ones")}
    for name, inputs, outputs, axes in (
        ("q", hidden, queries, ("hidden", "heads")),
        ("k", hidden, keys, ("hidden", "kv_heads")),
        ("v", hidden, keys, ("hidden", "kv_heads")),
        ("o", queries, hidden, ("heads", "hidden")),
    ):
        specs[f"{name}_weight"] = ParamSpec((inputs, outputs), axes, fan_in=inputs)
        if variant.attention_bias:
            specs[f"{name}_bias"] = ParamSpec((outputs,), axes[1:], "zeros")
    if variant.qk_norm:
        specs |= {name: ParamSpec((config.head_dim,), ("head_dim",), "ones") for name in ("q_norm", "k_norm")}
    if variant.sinks:
        specs["sinks"] = ParamSpec((config.num_heads,), ("sinks",), "zeros")
    return specs


def moe_specs(config: ModelConfig, block: BlockConfig) -> dict[str, ParamSpec]:
    """Arrays of one mixture of experts, or of a dense layer, its norm included."""
    hidden, experts = config.hidden_size, block.num_experts
    specs = {"norm": ParamSpec((hidden,), ("hidden",), "ones")}
    if experts:
        inter, biased = config.intermediate_size, config.variant.expert_bias
        specs["router_weight"] = ParamSpec((hidden, experts), ("hidden", "router"), fan_in=hidden)
        if config.variant.router_bias:
            specs["router_bias"] = ParamSpec((experts,), ("router",), "zeros")
    else:
        assert config.dense_size is not None
        experts, inter, biased = 1, config.dense_size, False
    for name, inputs, outputs, axes in (
        ("gate_up", hidden, 2 * inter, ("experts", "hidden", "inter")),
        ("down", inter, hidden, ("experts", "inter", "hidden")),
    ):
        specs[name] = ParamSpec((experts, inputs, outputs), axes, fan_in=inputs)
        if biased:
            specs[f"{name}_bias"] = ParamSpec((experts, outputs), (axes[0], axes[2]), "zeros")
    return specs


EXPERT_MATRICES = ("gate_up", "down")


def param_specs(config: ModelConfig) -> Params:
    """The tree of `ParamSpec` of a model, in the structure of its parameters."""
    vocab, hidden = config.vocab_size, config.hidden_size
    tree = {
        # A standard deviation of hidden ** -0.5, as if the embedding were a projection of the hidden state.
        "embedding": ParamSpec((vocab, hidden), ("vocab", "hidden"), fan_in=hidden),
        "layers": [{"attention": attention_specs(config), "moe": moe_specs(config, b)} for b in config.blocks],
        "final_norm": ParamSpec((hidden,), ("hidden",), "ones"),
    }
    if not config.variant.tied_head:
        tree["head"] = ParamSpec((hidden, vocab), ("hidden", "vocab"), fan_in=hidden)
    return tree


def output_head(params: Params) -> Array:
    """The output head, [hidden, vocab]: of its own, or the transposed embedding."""
    return params["head"] if "head" in params else params["embedding"].T


def head_params(params: Params) -> Params:
    """The parameters that logits are computed from: the final norm, and what `output_head` reads."""
    return {name: params[name] for name in ("final_norm", "head" if "head" in params else "embedding")}


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


def is_dense(moe: Params) -> bool:
    """Returns whether a layer has one feed-forward network in place of a mixture of experts."""
    return "router_weight" not in moe


def layer_experts(moe: Params) -> Experts:
    """The experts of one layer's `moe` parameters in the form that kernels take; biases that it lacks are zeros."""

    def bias(name: str) -> Array:
        experts, _, outputs = moe[name].shape
        return moe[f"{name}_bias"] if f"{name}_bias" in moe else jnp.zeros((experts, outputs), moe["norm"].dtype)

    return Experts(moe["gate_up"], bias("gate_up"), moe["down"], bias("down"))
