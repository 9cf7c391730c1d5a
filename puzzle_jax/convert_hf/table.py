"""The tensors of a checkpoint: one table of names, shapes and dtypes.

Import, export and byte counts all walk this table, so a predicted size is the size on disk. A checkpoint has one of
three forms. "bf16" stores every parameter as it is. "mxfp4" keeps packed `_blocks` and `_scales` of gpt-oss's expert
matrices ([experts, outputs, inputs / 32, 16] and [experts, outputs, inputs / 32]). "fp8" stores the matrices of
Qwen3-MoE's attention and experts in e4m3, with one scale for each block of 128 x 128 values.

The table has one tensor for each parameter (two for a packed one), whose matrices are [outputs, inputs], the transpose
of `puzzle_jax.model.spec`, but for expert matrices, which are [experts, inputs, outputs]. Files of gpt-oss hold them
so. Those of Qwen3-MoE hold an expert's gate, up and down projection as `parts` of their own, [outputs, inputs] each;
`tensors.layout` finds them, and `tensors.composed` reads them as the tensor that this table names.

Names and shapes follow the published openai/gpt-oss-20b and -120b, and Qwen3-30B-A3B and its FP8 form; heterogeneous
children use the same names with each layer's own expert count. Left out: the scales of an FP8 KV cache, which a
checkpoint may also carry.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.errors import ConfigError, check_choice

Form = Literal["mxfp4", "bf16", "fp8"]
Part = Literal["embedding", "attention", "router", "experts", "dense", "norm", "head"]
ParamPath = tuple[str | int, ...]

GROUP = 32
BLOCK = 128
"""Rows and columns of a matrix in FP8 that share a scale."""
DTYPE_BYTES = {"BF16": 2, "U8": 1, "F8_E4M3": 1}
_SCALE_BYTES = 2  # of a block of FP8, as the published checkpoints store it
_FORMS: dict[str, tuple[Form, ...]] = {"gpt_oss": ("mxfp4", "bf16"), "qwen3_moe": ("fp8", "bf16")}
"""Forms in which a family's checkpoints are stored, the smallest first."""
_ROUTER = {"gpt_oss": "router", "qwen3_moe": "gate"}
_PARTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
_FUSED = ("q", "k", "v")  # by runtimes, so that they must be stored alike


def dotted(path: ParamPath) -> str:
    """A path in the parameter tree as records write it, such as `layers.3.moe.down`."""
    return ".".join(map(str, path))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint.

    Attributes:
      name: its name in the safetensors files, or the name that stands for its parts.
      shape: its dimensions.
      dtype: safetensors' name of its type, "BF16", "U8" or "F8_E4M3".
      part: what it belongs to, for counts by part.
      layer: index of its layer; None outside the layers.
      path: where it lives in the parameter tree of `model.spec`; packed matrices end in "blocks" or "scales".
      transposed: whether the parameter is this tensor with both axes swapped.
      parts: for expert matrices that files hold one by one, names of those that make up one of this tensor's matrices;
        their rows are its columns in turn.
      modules: names by which `modules_to_not_convert` excludes it from FP8: its own, then those of tensors that
        runtimes fuse with it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["BF16", "U8", "F8_E4M3"]
    part: Part
    layer: int | None
    path: ParamPath
    transposed: bool = False
    parts: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype] + self._scales * _SCALE_BYTES

    @property
    def _scales(self) -> int:
        """Number of blocks in FP8."""
        if self.dtype != "F8_E4M3":
            return 0
        count, *_ = self.shape if self.parts else (1,)
        blocks = (-(-size // BLOCK) for size in self.matrix)
        return count * max(1, len(self.parts)) * prod(blocks)

    @property
    def matrix(self) -> tuple[int, int]:
        """Outputs and inputs of one matrix in the files."""
        if not self.parts:
            rows, columns = self.shape
            return rows, columns
        _, inputs, outputs = self.shape
        return outputs // len(self.parts), inputs

    def file_name(self, expert: int, part: int) -> str:
        """The name of one of its matrices in files that hold them one by one."""
        stem, _, _ = self.name.rpartition(".")
        number = f"{expert}." if self.by_expert else ""
        return f"{stem}.{number}{self.parts[part]}.weight"

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
    """Bytes of one layer at rest; `dense` is the network of a layer without experts."""

    attention: int
    router: int
    experts: int
    norm: int
    dense: int = 0

    @property
    def total(self) -> int:
        return self.attention + self.router + self.experts + self.norm + self.dense


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


def checkpoint_tensors(
    config: ModelConfig, form: Form, unquantized: Container[str] = frozenset()
) -> tuple[TensorSpec, ...]:
    """All tensors in the order in which they are written: embedding, layers, final norm, head.

    Args:
      config: the model.
      form: how matrices are stored.
      unquantized: modules whose matrices the form "fp8" stores in BF16 all the same.

    Raises `ConfigError` for a form that the model's family is not stored in, and for "mxfp4" where a matrix has inputs
    that are no multiple of 32.
    """
    check_choice("form", form, get_args(Form))
    if form not in (forms := _FORMS[config.variant.family]):
        raise ConfigError(f"form is {form}, but {config.variant.family} is stored as {' or '.join(forms)}")
    vocab, hidden = config.vocab_size, config.hidden_size
    if form == "mxfp4":
        for name in ("hidden_size", "intermediate_size"):
            if (value := getattr(config, name)) % GROUP:
                raise ConfigError(f"{name} is {value}, but MXFP4 experts need a multiple of {GROUP}")
    table = [TensorSpec("model.embed_tokens.weight", (vocab, hidden), "BF16", "embedding", None, ("embedding",))]
    for layer, block in enumerate(config.blocks):
        table += layer_tensors(config, block, layer, form, unquantized)
    table.append(TensorSpec("model.norm.weight", (hidden,), "BF16", "norm", None, ("final_norm",)))
    if not config.variant.tied_head:
        table.append(TensorSpec("lm_head.weight", (vocab, hidden), "BF16", "head", None, ("head",), True))
    return tuple(table)


def smallest_form(config: ModelConfig) -> Form:
    """The smallest of the forms in which checkpoints of a model's family are stored."""
    return _FORMS[config.variant.family][0]


def layer_tensors(
    config: ModelConfig, block: BlockConfig, layer: int, form: Form, unquantized: Container[str] = frozenset()
) -> list[TensorSpec]:
    """The tensors of one layer."""
    hidden, variant, experts = config.hidden_size, config.variant, block.num_experts
    prefix = f"model.layers.{layer}."
    table: list[TensorSpec] = []

    def add(name: str, shape: Sequence[int], part: Part, path: tuple[str, ...], modules: Sequence[str] = ()) -> None:
        transposed = len(shape) == 2 and path[-1].endswith("_weight")
        where, modules = ("layers", layer, *path), tuple(prefix + module for module in modules)
        dtype = stored(modules) if modules else "BF16"
        table.append(TensorSpec(prefix + name, tuple(shape), dtype, part, layer, where, transposed, (), modules))

    def stored(modules: tuple[str, ...]) -> Literal["BF16", "F8_E4M3"]:
        return "F8_E4M3" if form == "fp8" and modules[0] not in unquantized else "BF16"

    def add_experts(name: str, inputs: int, outputs: int) -> None:
        """Adds one matrix of every expert."""
        stem, where = f"{prefix}mlp.experts.{name}_proj", ("layers", layer, "moe", name)
        shape, modules = (experts, inputs, outputs), (f"{prefix}mlp.experts",)
        if form == "mxfp4":
            scales = (experts, outputs, inputs // GROUP)
            blocks = (*scales, GROUP // 2)
            table.append(TensorSpec(f"{stem}_blocks", blocks, "U8", "experts", layer, (*where, "blocks")))
            table.append(TensorSpec(f"{stem}_scales", scales, "U8", "experts", layer, (*where, "scales")))
        elif variant.family == "gpt_oss":
            table.append(TensorSpec(stem, shape, "BF16", "experts", layer, where))
        else:
            parts = _PARTS[name]
            table.append(TensorSpec(stem, shape, stored(modules), "experts", layer, where, False, parts, modules))
        if variant.expert_bias:
            add(f"mlp.experts.{name}_proj_bias", (experts, outputs), "experts", ("moe", f"{name}_bias"))

    def add_dense(name: str, inputs: int, outputs: int) -> None:
        """Adds one matrix of a dense layer, a mixture of one expert."""
        stem, where, parts = f"{prefix}mlp.{name}_proj", ("layers", layer, "moe", name), _PARTS[name]
        modules = tuple(f"{prefix}mlp.{part}" for part in parts)
        shape = (1, inputs, outputs)
        table.append(TensorSpec(stem, shape, stored(modules), "dense", layer, where, False, parts, modules))

    add("input_layernorm.weight", (hidden,), "norm", ("attention", "norm"))
    for name, rows, columns in (
        ("q", config.query_width, hidden),
        ("k", config.kv_width, hidden),
        ("v", config.kv_width, hidden),
        ("o", hidden, config.query_width),
    ):
        stem = f"self_attn.{name}_proj"
        fused = [f"self_attn.{other}_proj" for other in _FUSED if name in _FUSED and other != name]
        add(f"{stem}.weight", (rows, columns), "attention", ("attention", f"{name}_weight"), (stem, *fused))
        if variant.attention_bias:
            add(f"{stem}.bias", (rows,), "attention", ("attention", f"{name}_bias"))
    if variant.qk_norm:
        for name in ("q_norm", "k_norm"):
            add(f"self_attn.{name}.weight", (config.head_dim,), "norm", ("attention", name))
    if variant.sinks:
        add("self_attn.sinks", (config.num_heads,), "attention", ("attention", "sinks"))
    add("post_attention_layernorm.weight", (hidden,), "norm", ("moe", "norm"))
    if not experts:
        assert config.dense_size is not None
        add_dense("gate_up", hidden, 2 * config.dense_size)
        add_dense("down", config.dense_size, hidden)
        return table
    router = f"mlp.{_ROUTER[variant.family]}"
    add(f"{router}.weight", (experts, hidden), "router", ("moe", "router_weight"))
    if variant.router_bias:
        add(f"{router}.bias", (experts,), "router", ("moe", "router_bias"))
    add_experts("gate_up", hidden, 2 * config.intermediate_size)
    add_experts("down", config.intermediate_size, hidden)
    return table


def bytes_by_part(config: ModelConfig, form: Form, unquantized: Container[str] = frozenset()) -> ModelBytes:
    """Exact bytes of a checkpoint's tensors, by layer and part; arguments as in `checkpoint_tensors`."""

    def count(specs: Sequence[TensorSpec], part: Part) -> int:
        return sum(spec.nbytes for spec in specs if spec.part == part)

    by_layer: dict[int | None, list[TensorSpec]] = {}
    for spec in checkpoint_tensors(config, form, unquantized):
        by_layer.setdefault(spec.layer, []).append(spec)
    outside = by_layer.pop(None)
    layers = tuple(
        LayerBytes(*(count(specs, part) for part in ("attention", "router", "experts", "norm", "dense")))
        for _, specs in sorted(by_layer.items(), key=lambda item: item[0] or 0)
    )
    return ModelBytes(count(outside, "embedding"), layers, count(outside, "norm"), count(outside, "head"))


def tensor_bytes(config: ModelConfig, form: Form, unquantized: Container[str] = frozenset()) -> int:
    """Exact bytes of all tensors of a checkpoint (headers of the files not included); arguments as in
    `checkpoint_tensors`."""
    return sum(spec.nbytes for spec in checkpoint_tensors(config, form, unquantized))


def parameters(config: ModelConfig) -> int:
    """Exact number of parameters: the values of the dense form."""
    return sum(prod(spec.shape) for spec in checkpoint_tensors(config, "bf16"))


def expert_bytes(config: ModelConfig, form: Form) -> int:
    """Exact bytes of one expert: both matrices, their biases and scales, without its row of the router."""
    return sum(spec.nbytes for spec in _one_expert(config, form))


def expert_parameters(config: ModelConfig) -> int:
    """Exact number of parameters of one expert, counted likewise."""
    return sum(prod(spec.shape) for spec in _one_expert(config, "bf16"))


def _one_expert(config: ModelConfig, form: Form) -> list[TensorSpec]:
    return [spec for spec in layer_tensors(config, BlockConfig(1), 0, form) if spec.part == "experts"]
