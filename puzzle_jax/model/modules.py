"""Flax NNX containers around the parameter tree, for those who work with modules.

`MoeTransformer` names, shapes and initialises the parameters and computes nothing itself: calling it runs
`network.forward` on its own tree. `nnx.split`, `nnx.state` and optimisers see every array as an `nnx.Param` whose
logical axes are in its metadata (`axes`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.network import forward
from puzzle_jax.model.spec import Params, ParamSpec, init_params, param_specs


class SubBlock(nnx.Module):
    """The arrays of one attention or mixture sub-block, as attributes."""

    def __init__(self, params: Params, specs: Params) -> None:
        self._names = tuple(params)
        for name, value in params.items():
            setattr(self, name, _param(value, specs[name]))

    def params(self) -> Params:
        return {name: getattr(self, name)[...] for name in self._names}


class Layer(nnx.Module):
    """Attention and mixture of one layer."""

    def __init__(self, params: Params, specs: Params) -> None:
        self.attention = SubBlock(params["attention"], specs["attention"])
        self.moe = SubBlock(params["moe"], specs["moe"])


class MoeTransformer(nnx.Module):
    """A mixture-of-experts transformer with a different block per layer.

    Args:
      config: the model.
      rngs: source of the initial values.
      params: existing dense parameters in place of fresh ones.

    Raises TypeError for packed experts; decode them first (`network.to_compute`).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None = None, params: Params | None = None) -> None:
        if params is None:
            params = init_params(config, (rngs or nnx.Rngs(0)).params())
        if any(isinstance(x, MXFP4) for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, MXFP4))):
            raise TypeError("MoeTransformer holds dense arrays, but the parameters have MXFP4 experts")
        specs = param_specs(config)
        self.config = config
        self.embedding = _param(params["embedding"], specs["embedding"])
        self.layers = nnx.List([Layer(p, s) for p, s in zip(params["layers"], specs["layers"], strict=True)])
        self.final_norm = _param(params["final_norm"], specs["final_norm"])
        self.head = None if config.variant.tied_head else _param(params["head"], specs["head"])

    def params(self) -> Params:
        """The tree that the functions of this package take."""
        return {
            "embedding": self.embedding[...],
            "layers": [{"attention": layer.attention.params(), "moe": layer.moe.params()} for layer in self.layers],
            "final_norm": self.final_norm[...],
            **({} if self.head is None else {"head": self.head[...]}),
        }

    def __call__(self, tokens: Int[Array, "batch seq"], **options: object) -> Float[Array, "batch seq vocab"]:
        """Logits; options as in `network.hidden_states`."""
        return forward(self.params(), self.config, tokens, **options)


def _param(value: Array, spec: ParamSpec) -> nnx.Param:
    if value.shape != spec.shape:
        raise ValueError(f"an array of shape {value.shape} was given for axes {spec.axes} of shape {spec.shape}")
    return nnx.Param(jnp.asarray(value), axes=spec.axes)
