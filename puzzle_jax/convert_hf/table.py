"""The tensors of a gpt-oss checkpoint: one table of names, shapes and dtypes.

Import, export and byte counts all walk this table, so a predicted size is the size on disk. A
checkpoint has one of two forms, which differ in the expert matrices alone: "mxfp4" keeps packed `_blocks` and
`_scales` ([experts, outputs, inputs / 32, 16] and [experts, outputs, inputs / 32]), "bf16" keeps one tensor
[experts, inputs, outputs]. Other matrices are [outputs, inputs], the transpose of `puzzle_jax.model.spec`.

Names and shapes follow the published openai/gpt-oss-20b and -120b; gpt_oss_puzzle checkpoints use the same
names with each layer's own expert count. Left out: the scales of an FP8 KV cache, which a checkpoint may
also carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.errors import ConfigError, check_choice

Form = Literal["mxfp4", "bf16"]
Part = Literal["embedding", "attention", "router", "experts", "norm", "head"]
ParamPath = tuple[str | int, ...]

GROUP = 32
DTYPE_BYTES = {"BF16": 2, "U8": 1}


def dotted(path: ParamPath) -> str:
    """A path in the parameter tree as records write it, such as `layers.3.moe.down`."""
    return ".".join(map(str, path))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint.

    Attributes:
      name: its name in the safetensors files.
      shape: its dimensions.
      dtype: safetensors' name of its type, "BF16" or "U8".
      part: what it belongs to, for counts by part.
      layer: index of its layer; None outside the layers.
      path: where it lives in the parameter tree of `model.spec`; packed matrices end in "blocks" or "scales".
      transposed: whether the parameter is this tensor with both axes swapped.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["BF16", "U8"]
    part: Part
    layer: int | None
    path: ParamPath
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def parameter(self) -> ParamPath:
        """The path of the parameter that the tensor is, or is one half of."""
        return self.path[:-1] if self.path[-1] in ("blocks", "scales") else self.path

    @property
    def parameter_name(self) -> str:
        """The parameter's path as records write it, such as `layers.3.moe.down`."""
        return dotted(self.parameter)

    @property
    def by_expert(self) -> bool:
        """Returns whether the first axis counts experts, so that pruning takes rows."""
        return self.part in ("router", "experts")


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer at rest."""

    attention: int
    router: int
    experts: int
    norm: int

    @property
    def total(self) -> int:
        return self.attention + self.router + self.experts + self.norm


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a checkpoint's tensors by part; `total` is their exact sum."""

    embedding: int
    layers: tuple[LayerBytes, ...]
    final_norm: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + sum(layer.total for layer in self.layers) + self.final_norm + self.head

    @property
    def experts(self) -> int:
        """Bytes of the experts of all layers, with biases but without routers."""
        return sum(layer.experts for layer in self.layers)


def checkpoint_tensors(config: ModelConfig, form: Form) -> tuple[TensorSpec, ...]:
    """All tensors in the order in which they are written: embedding, layers, final norm, head.

    Raises `ConfigError` for an unknown form, and for "mxfp4" where a matrix has inputs that are no multiple
    of 32.
    """
    check_choice("form", form, get_args(Form))
    vocab, hidden = config.vocab_size, config.hidden_size
    if form == "mxfp4":
        for name in ("hidden_size", "intermediate_size"):
            if (value := getattr(config, name)) % GROUP:
                raise ConfigError(f"{name} is {value}, but MXFP4 experts need a multiple of {GROUP}")
    table = [TensorSpec("model.embed_tokens.weight", (vocab, hidden), "BF16", "embedding", None, ("embedding",))]
    for layer, block in enumerate(config.blocks):
        table += layer_tensors(config, block, layer, form)
    table.append(TensorSpec("model.norm.weight", (hidden,), "BF16", "norm", None, ("final_norm",)))
    table.append(TensorSpec("lm_head.weight", (vocab, hidden), "BF16", "head", None, ("head",), True))
    return tuple(table)


def layer_tensors(config: ModelConfig, block: BlockConfig, layer: int, form: Form) -> list[TensorSpec]:
    """The tensors of one layer."""
    hidden, inter, experts = config.hidden_size, config.intermediate_size, block.num_experts
    prefix = f"model.layers.{layer}."
    table: list[TensorSpec] = []

    def add(name: str, shape: Sequence[int], part: Part, path: tuple[str, ...]) -> None:
        transposed = len(shape) == 2 and path[-1].endswith("_weight")
        where = ("layers", layer, *path)
        table.append(TensorSpec(prefix + name, tuple(shape), "BF16", part, layer, where, transposed))

    def add_experts(name: str, inputs: int, outputs: int) -> None:
        stem, where = f"{prefix}mlp.experts.{name}_proj", ("layers", layer, "moe", name)
        if form == "mxfp4":
            scales = (experts, outputs, inputs // GROUP)
            blocks = (*scales, GROUP // 2)
            table.append(TensorSpec(f"{stem}_blocks", blocks, "U8", "experts", layer, (*where, "blocks")))
            table.append(TensorSpec(f"{stem}_scales", scales, "U8", "experts", layer, (*where, "scales")))
        else:
            table.append(TensorSpec(stem, (experts, inputs, outputs), "BF16", "experts", layer, where))
        add(f"mlp.experts.{name}_proj_bias", (experts, outputs), "experts", ("moe", f"{name}_bias"))

    add("input_layernorm.weight", (hidden,), "norm", ("attention", "norm"))
    for name, rows, columns in (
        ("q", config.query_width, hidden),
        ("k", config.kv_width, hidden),
        ("v", config.kv_width, hidden),
        ("o", hidden, config.query_width),
    ):
        stem = f"self_attn.{name}_proj"
        add(f"{stem}.weight", (rows, columns), "attention", ("attention", f"{name}_weight"))
        add(f"{stem}.bias", (rows,), "attention", ("attention", f"{name}_bias"))
    add("self_attn.sinks", (config.num_heads,), "attention", ("attention", "sinks"))
    add("post_attention_layernorm.weight", (hidden,), "norm", ("moe", "norm"))
    add("mlp.router.weight", (experts, hidden), "router", ("moe", "router_weight"))
    add("mlp.router.bias", (experts,), "router", ("moe", "router_bias"))
    add_experts("gate_up", hidden, 2 * inter)
    add_experts("down", inter, hidden)
    return table


def bytes_by_part(config: ModelConfig, form: Form) -> ModelBytes:
    """Exact bytes of a checkpoint's tensors, by layer and part."""

    def count(specs: Sequence[TensorSpec], part: Part) -> int:
        return sum(spec.nbytes for spec in specs if spec.part == part)

    by_layer: dict[int | None, list[TensorSpec]] = {}
    for spec in checkpoint_tensors(config, form):
        by_layer.setdefault(spec.layer, []).append(spec)
    outside = by_layer.pop(None)
    layers = tuple(
        LayerBytes(*(count(specs, part) for part in ("attention", "router", "experts", "norm")))
        for _, specs in sorted(by_layer.items(), key=lambda item: item[0] or 0)
    )
    return ModelBytes(count(outside, "embedding"), layers, count(outside, "norm"), count(outside, "head"))


def tensor_bytes(config: ModelConfig, form: Form) -> int:
    """Exact bytes of all tensors of a checkpoint (headers of the files not included)."""
    return sum(spec.nbytes for spec in checkpoint_tensors(config, form))


def parameters(config: ModelConfig) -> int:
    """Exact number of parameters: the values of the dense form."""
    return sum(prod(spec.shape) for spec in checkpoint_tensors(config, "bf16"))


def expert_bytes(config: ModelConfig, form: Form) -> int:
    """Exact bytes of one expert: both matrices and both biases, without its row of the router."""
    one = layer_tensors(config, BlockConfig(1), 0, form)
    return sum(spec.nbytes for spec in one if spec.part == "experts")
