"""A child: a choice of experts and a window for each layer of a parent, as a view on the parent's own parameters.

Nothing is copied to try a child: removed experts are masked out of the router, windows are passed as data, and the
expert weights stay the parent's. What was trained is a delta: a tree like the parent's parameters, in the parent's
shapes, in which None stands for "as in the parent". `cut_params` makes the smaller tensors, for export and for
measuring speed; cutting and viewing compute the same function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from puzzle_jax.config import BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.spec import Params, ParamSpec, is_dense, param_specs

NO_WINDOW = 2**30  # means full attention where windows are data

Place = tuple[str | int, ...]


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
      dense_delta: trained values in place of the parent's, dense arrays in a tree like the parameters; None, or a name
        that a dictionary leaves out, stands for "as in the parent". Routers and experts have the parent's shapes: all
        of its experts, of which cutting takes the kept ones.
      rope: the child's own rotary settings, where they differ.

    Raises `ConfigError` for ids that the parent does not have, for layers that keep too few, and for a delta that does
    not fit the parent.
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
        delta_leaves(self.parent, self.dense_delta)

    @property
    def config(self) -> ModelConfig:
        """The child's own configuration, that of the model once it is cut."""
        config = self.parent.with_blocks(tuple(block.config for block in self.blocks))
        return config if self.rope is None else replace(config, rope=self.rope)

    @property
    def viewed(self) -> ModelConfig:
        """The configuration of the child as a view: the parent's with the child's own rotary settings."""
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


def identity_child(parent: ModelConfig) -> Child:
    """The child that is the parent itself."""
    return Child(parent, tuple(ChildBlock(tuple(range(b.num_experts)), b.window) for b in parent.blocks))


def delta_leaves(parent: ModelConfig, delta: Params | None) -> dict[Place, PyTree]:
    """The trained arrays of a delta by their places in the tree, in the order of `model.spec`.

    Raises `ConfigError`, naming the parameter and both shapes, where structure or shapes are not the parent's.
    """
    return dict(_fitting(param_specs(parent), delta, ()))


def _fitting(spec: PyTree, node: PyTree, path: Place) -> Iterator[tuple[Place, PyTree]]:
    where = ".".join(map(str, path)) or "the entire tree"
    if node is None:
        return
    if isinstance(spec, ParamSpec):
        if isinstance(node, (Mapping, list, tuple)):
            raise ConfigError(f"the trained values hold a {type(node).__name__} for {where}, which is one array")
        if isinstance(node, MXFP4):
            raise ConfigError(
                f"the trained values hold {where} packed, but must hold it dense, or None for the parent's"
            )
        if np.shape(node) != spec.shape:
            found, wanted = list(np.shape(node)), list(spec.shape)
            raise ConfigError(f"the trained values hold {where} of shape {found}, but the parent has shape {wanted}")
        yield path, node
    elif isinstance(spec, list):
        if not isinstance(node, (list, tuple)) or len(node) != len(spec):
            found = f"{len(node)}" if isinstance(node, (list, tuple)) else f"a {type(node).__name__}"
            raise ConfigError(f"the trained values hold {found} for {where}, but the parent has {len(spec)} of them")
        for index, (inner, child) in enumerate(zip(spec, node, strict=True)):
            yield from _fitting(inner, child, (*path, index))
    else:
        if not isinstance(node, Mapping):
            raise ConfigError(f"the trained values hold a {type(node).__name__} for {where}, but must hold names")
        _refuse_unknown(spec, node, path)
        for name, inner in spec.items():
            yield from _fitting(inner, node.get(name), (*path, name))


def _refuse_unknown(known: Mapping[str, object], node: Mapping[str, object], path: Place = ()) -> None:
    for name in node:
        if name not in known:
            where = ".".join(map(str, (*path, name)))
            raise ConfigError(f"the trained values hold {where}, which the parent does not have")


def with_delta(old: PyTree, new: PyTree) -> PyTree:
    """The parent's parameters with the trained values of a delta in their place, experts and routers included.

    Trained experts are dense where the parent's may be packed; every function of a model takes either.
    Raises `ConfigError` for names and numbers of layers that the parameters do not have.
    """
    if new is None:
        return old
    if isinstance(old, Mapping):
        _refuse_unknown(old, new)
        return {name: with_delta(value, new.get(name)) for name, value in old.items()}
    if isinstance(old, (list, tuple)) and not hasattr(old, "_fields"):  # packed experts of stacked layers have them
        if len(new) != len(old):
            raise ConfigError(f"the trained values hold a list of {len(new)}, but the parent has {len(old)} there")
        return type(old)([with_delta(o, n) for o, n in zip(old, new, strict=True)])
    return new


def cut_params(params: Params, child: Child) -> Params:
    """The child's own, smaller parameters; packed experts stay packed and keep their bytes.

    Windows change no tensors; they are in `Child.config`.
    """
    params = with_delta(params, child.dense_delta)
    layers = []
    for layer, block in zip(params["layers"], child.blocks, strict=True):
        layers.append({"attention": layer["attention"], "moe": cut_experts(layer["moe"], block.kept)})
    return {**params, "layers": layers}


def cut_experts(moe: Params, kept: tuple[int, ...]) -> Params:
    """One layer's mixture with only the experts `kept`; a dense layer as it is."""
    if is_dense(moe):
        return moe
    return {
        "norm": moe["norm"],
        **_taken({name: moe[name] for name in moe if name != "norm"}, jnp.asarray(np.asarray(kept, np.int32))),
    }


@jax.jit
def _taken(moe: Params, ids: Int[Array, "kept"]) -> Params:
    """One program for all arrays of a mixture; experts are their first axis, and the last of the router's weight."""
    router = moe["router_weight"][:, ids]
    others = {name: array for name, array in moe.items() if name != "router_weight"}
    return {"router_weight": router, **jax.tree.map(lambda array: array[ids], others)}
