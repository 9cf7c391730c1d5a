"""Summaries of models from config.json alone: layers, experts, windows, parameters, bytes.

Weights need not be there; where they are, their headers are checked against the configuration. Nothing here imports
JAX.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from puzzle_jax.config import ModelConfig, cache_bytes
from puzzle_jax.convert_hf.configuration.config_json import parse_config, parse_form
from puzzle_jax.convert_hf.configuration.quantization import Modules, unquantized
from puzzle_jax.convert_hf.describe import config_path, describe_checkpoint
from puzzle_jax.convert_hf.table import Form, bytes_by_part, expert_bytes, expert_parameters, parameters
from puzzle_jax.convert_hf.tensors.files import INDEX, SINGLE, read_json

KV_TOKENS = 1_000
_ON_ONE_LINE = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")


@dataclass(frozen=True)
class Inspection:
    """A model in numbers.

    Attributes:
      active_parameters: parameters that are used for one token, without the embedding.
      checkpoint_bytes: bytes of all tensors, without the scales of an FP8 cache.
      bytes_by_part: the same, split into embedding, attention, router, experts, norm and head.
      kv_bytes_per_1000_tokens: bytes of one request's cache for a context of 1,000 tokens, by type of its values.
      layers: for each layer the number of experts, the window (None: full attention) and the bytes.
      dimensions: the sizes that all layers share.
      weights: a summary of the files with weights.
    """

    model_type: str
    form: Form
    parameters: int
    active_parameters: int
    checkpoint_bytes: int
    bytes_by_part: dict[str, int]
    expert_bytes: int
    kv_bytes_per_1000_tokens: dict[str, int]
    layers: list[dict[str, int | None]]
    dimensions: dict[str, int]
    weights: str


def inspect(path: Path) -> Inspection:
    """Describes the model of a directory or of a config.json.

    Raises `CheckpointError` where the configuration is not one of ours, or where the weights beside it do not fit it.
    """
    source = config_path(path)
    data = read_json(source)
    config, form = parse_config(data, source), parse_form(data, source)
    skipped = unquantized(data, source) if form == "fp8" else Modules()
    parts = bytes_by_part(config, form, skipped)
    inside = ("attention", "router", "experts", *(("dense",) if config.dense_size else ()))
    by_part = {
        "embedding": parts.embedding,
        **{part: sum(getattr(layer, part) for layer in parts.layers) for part in inside},
        "norm": parts.final_norm + sum(layer.norm for layer in parts.layers),
        "head": parts.head,
    }
    return Inspection(
        model_type=data["model_type"],
        form=form,
        parameters=parameters(config),
        active_parameters=active_parameters(config),
        checkpoint_bytes=parts.total,
        bytes_by_part=by_part,
        expert_bytes=expert_bytes(config, form),
        kv_bytes_per_1000_tokens={
            name: cache_bytes(config, KV_TOKENS, size) for name, size in (("bfloat16", 2), ("float8", 1))
        },
        layers=[
            {"num_local_experts": block.num_experts, "sliding_window": block.window, "bytes": layer.total}
            for block, layer in zip(config.blocks, parts.layers, strict=True)
        ],
        dimensions={
            **{name: getattr(config, name) for name in (*_ON_ONE_LINE, "experts_per_token", "max_position")},
            **({"dense_size": config.dense_size} if config.dense_size else {}),
        },
        weights=_weights(source.parent),
    )


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token is multiplied with: k experts of every layer, and no embedding."""
    idle = sum(block.num_experts - config.experts_per_token for block in config.blocks if block.num_experts)
    # A tied embedding is the head as well.
    embedding = 0 if config.variant.tied_head else config.vocab_size * config.hidden_size
    return parameters(config) - idle * expert_parameters(config) - embedding


def _weights(directory: Path) -> str:
    if not any((directory / name).exists() for name in (SINGLE, INDEX)):
        return "none here"
    described = describe_checkpoint(directory)
    sources = [source for stored in described.tensors.values() for source in stored.sources]
    files = {source.file.name for source in sources}
    tensors = {source.name for source in sources}  # pieces of one have its name
    scales = "" if described.kv_scales is None else ", with scales of an FP8 cache"
    index = f"; {INDEX} is not read beside it" if files == {SINGLE} and (directory / INDEX).exists() else ""
    described_as = f"headers as described{scales}{index}"
    nbytes = sum(source.nbytes for source in sources)
    return f"{len(tensors):,} tensors of {nbytes:,} bytes in {len(files)} file{'s'[: len(files) > 1]}, {described_as}"


def show(found: Inspection, console: Console) -> None:
    """Prints an inspection in readable form."""
    console.print(
        f"{found.model_type}, {'matrices' if found.form == 'fp8' else 'experts'} in {found.form}; "
        f"{found.parameters:,} parameters, {found.active_parameters:,} of them active per token"
    )
    console.print(", ".join(f"{name} {value:,}" for name, value in found.dimensions.items()))
    table = Table("layers", "experts", "window", "bytes per layer")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer, run in groupby(range(len(found.layers)), key=found.layers.__getitem__):
        indices = list(run)
        window = layer["sliding_window"]
        layers = f"{indices[0]}" if len(indices) == 1 else f"{indices[0]} to {indices[-1]}"
        shown = "full" if window is None else f"{window:,}"
        table.add_row(layers, str(layer["num_local_experts"]), shown, f"{layer['bytes']:,}")
    console.print(table)
    table = Table("part", "bytes")
    table.columns[1].justify = "right"
    for part, size in found.bytes_by_part.items():
        table.add_row(part, f"{size:,}")
    table.add_section()
    table.add_row("all", f"{found.checkpoint_bytes:,}")
    console.print(table)
    kv = ", ".join(f"{size:,} in {name}" for name, size in found.kv_bytes_per_1000_tokens.items())
    console.print(f"KV bytes of one request of {KV_TOKENS:,} tokens: {kv}; one expert: {found.expert_bytes:,} bytes")
    console.print(f"weights: {found.weights}")
