"""A child: a choice of experts and a window per layer of a parent, as a view on the parent's own parameters.

Nothing is copied to try a child: removed experts are masked out of the router, windows are passed as data, and the
expert weights stay the parent's. `cut_params` makes the smaller tensors, for export and for measuring speed; cutting
and viewing compute the same function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from puzzle_jax.config import BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.spec import EXPERT_MATRICES, Params

NO_WINDOW = 2**30  # full attention, where windows are data


@dataclass(frozen=True)
class ChildBlock:
    """One layer of a child.

    Attributes:
      kept: ids of the parent's experts that stay, ascending.
      window: keys that a query sees; None is full attention.
    """

    kept: tuple[int, ...]
    window: int | None

    def __post_init__(self) -> None:
        if list(self.kept) != sorted(set(self.kept)):
            raise ConfigError(f"kept experts {self.kept} are not ascending and distinct")

    @property
    def config(self) -> BlockConfig:
        return BlockConfig(len(self.kept), self.window)


class View(NamedTuple):
    """A child as data: per layer, the experts that stay and the window (`NO_WINDOW` for full attention)."""

    expert_masks: Bool[Array, "layers experts"]
    windows: Int[Array, "layers 1"]


@dataclass(frozen=True)
class Child:
    """A view on a parent.

    Attributes:
      parent: the parent's configuration.
      blocks: one per layer; every layer keeps at least `experts_per_token` of the parent's experts.
      dense_delta: trained values in place of the parent's, a tree like the parameters in which None stands for
        "as in the parent"; experts and routers have no delta.
      rope: the child's own rotary settings, where they differ.

    Raises `ConfigError` for ids that the parent does not have and for layers that keep too few.
    """

    parent: ModelConfig
    blocks: tuple[ChildBlock, ...]
    dense_delta: Params | None = None
    rope: RopeConfig | None = None

    def __post_init__(self) -> None:
        if len(self.blocks) != self.parent.num_layers:
            raise ConfigError(f"{len(self.blocks)} blocks were given for a parent of {self.parent.num_layers} layers")
        for index, (block, of_parent) in enumerate(zip(self.blocks, self.parent.blocks, strict=True)):
            if block.kept and not 0 <= block.kept[0] <= block.kept[-1] < of_parent.num_experts:
                raise ConfigError(f"layer {index} keeps experts {block.kept} of {of_parent.num_experts}")
        _ = self.config  # checks the expert counts

    @property
    def config(self) -> ModelConfig:
        """The child's own configuration, as it is once cut."""
        config = self.parent.with_blocks(tuple(block.config for block in self.blocks))
        return config if self.rope is None else replace(config, rope=self.rope)

    @property
    def viewed(self) -> ModelConfig:
        """The configuration that the child runs with as a view: the parent's with the child's own rotary settings."""
        return self.parent if self.rope is None else replace(self.parent, rope=self.rope)

    @property
    def view(self) -> View:
        """Masks and windows for the parent's forward pass."""
        experts = max(block.num_experts for block in self.parent.blocks)
        masks = np.zeros((len(self.blocks), experts), bool)
        for index, block in enumerate(self.blocks):
            masks[index, list(block.kept)] = True
        windows = [[NO_WINDOW if block.window is None else block.window] for block in self.blocks]
        return View(jnp.asarray(masks), jnp.asarray(windows, jnp.int32))

    @property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        return tuple(block.kept for block in self.blocks)


def whole(parent: ModelConfig) -> Child:
    """The child that is the parent itself."""
    return Child(parent, tuple(ChildBlock(tuple(range(b.num_experts)), b.window) for b in parent.blocks))


def with_delta(params: Params, dense_delta: Params | None) -> Params:
    """The parent's parameters with the trained values of `dense_delta` in their place."""
    return params if dense_delta is None else _merged(params, dense_delta)


def _merged(old: Any, new: Any) -> Any:
    if new is None:
        return old
    if isinstance(new, dict):
        return {name: _merged(value, new.get(name)) for name, value in old.items()}
    if isinstance(new, list):
        return [_merged(o, n) for o, n in zip(old, new, strict=True)]
    return new


def cut_params(params: Params, child: Child) -> Params:
    """The child's own, smaller parameters; packed experts stay packed and keep their bytes."""
    params = with_delta(params, child.dense_delta)
    layers = []
    for layer, block in zip(params["layers"], child.blocks, strict=True):
        layers.append({"attention": layer["attention"], "moe": cut_experts(layer["moe"], block.kept)})
    return {**params, "layers": layers}


def cut_experts(moe: Params, kept: tuple[int, ...]) -> Params:
    """One layer's mixture with only the experts `kept`."""
    ids = np.asarray(kept)
    cut = {**moe, "router_weight": moe["router_weight"][:, ids], "router_bias": moe["router_bias"][ids]}
    for name in (*EXPERT_MATRICES, "gate_up_bias", "down_bias"):
        weight = moe[name]
        if isinstance(weight, MXFP4):
            cut[name] = MXFP4(weight.codes[ids], weight.scales[ids])
        else:
            cut[name] = weight[ids]
    return cut
