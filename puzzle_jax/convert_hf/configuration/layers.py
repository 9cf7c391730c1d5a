"""Experts and windows by layer in a config.json.

A plain model type gives them for all layers at once, and `layer_types` says which layers are windowed. The type of a
heterogeneous child lists both for each layer in `block_configs` (the published form of nvidia/gpt-oss-puzzle-88B), and
says the same in `per_layer_config`, transformers' sparse schema. Layers without experts are dense.
"""

from __future__ import annotations

from collections.abc import Sequence

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.convert_hf.configuration.fields import MAX_EXPERTS, MAX_SIZE, Fields
from puzzle_jax.errors import CheckpointError, shown
from puzzle_jax.files import Json

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(fields: Fields, default: Sequence[str]) -> Sequence[Json]:
    """The file's layer types, or the default where it has none."""
    return default if fields.data.get("layer_types") is None else fields.list_of("layer_types", len(default))


def plain_blocks(
    fields: Fields, counts: Sequence[int], types: Sequence[Json], width: int | None = None
) -> tuple[BlockConfig, ...]:
    """The layers of a plain model type.

    Args:
      counts: experts of every layer where `per_layer_config` says nothing else.
      types: every layer's type; windowed layers have the file's `sliding_window`.
      width: the window where the file has none; None requires one.
    """
    for layer, kind in enumerate(types):
        if kind not in (SLIDING, FULL):
            raise CheckpointError(
                f"{fields.source}: layer_types[{layer}] is {shown(kind)}, but must be {SLIDING} or {FULL}"
            )
    window = fields.integer("sliding_window", width) if SLIDING in types else None
    blocks = []
    for layer, (kind, override) in enumerate(zip(types, _overrides(fields, len(types)), strict=True)):
        own = override.get("sliding_window", window) if kind == SLIDING else None
        blocks.append(BlockConfig(override.get("num_local_experts", counts[layer]), own))
    return tuple(blocks)


def listed_blocks(fields: Fields, types: Sequence[Json], *, least: int = 1) -> tuple[BlockConfig, ...]:
    """The layers of a heterogeneous child's model type, from `block_configs`.

    Args:
      types: every layer's type, which must agree.
      least: the smallest number of experts that a layer may have.
    """
    blocks = []
    for layer, entry in enumerate(fields.list_of("block_configs", len(types))):
        where = f"block_configs[{layer}]"
        if not isinstance(entry, dict) or "sliding_window" not in entry:
            rule = "must be an object with num_local_experts and sliding_window"
            raise CheckpointError(f"{fields.source}: {where} is {shown(entry)}, but {rule}")
        block = Fields(entry, fields.source, where + ".")
        window = None if entry["sliding_window"] is None else block.integer("sliding_window")
        blocks.append(BlockConfig(block.integer("num_local_experts", least=least, most=MAX_EXPERTS), window))
        expected = FULL if window is None else SLIDING
        if types[layer] != expected:
            missing = ", as it is taken to be where layer_types is missing" * (fields.data.get("layer_types") is None)
            raise CheckpointError(
                f"{fields.source}: layer_types[{layer}] is {shown(types[layer])}{missing}, "
                f"but {where} has sliding_window {window}, which asks for {expected}"
            )
    for layer, (block, override) in enumerate(zip(blocks, _overrides(fields, len(types)), strict=True)):
        for name, value in override.items():
            if value != _entry(block)[name]:
                raise CheckpointError(
                    f"{fields.source}: per_layer_config.{layer}.{name} is {value}, "
                    f"but block_configs[{layer}] has {_entry(block)[name]}; they must be equal"
                )
    return tuple(blocks)


def written_layers(config: ModelConfig, *, listed: bool) -> dict[str, Json]:
    """The fields that describe the layers of `config`; `listed` writes them one by one as well."""
    windows = [block.window for block in config.blocks]
    # Runtimes size caches and buffers by these two, so they are the largest of any layer.
    largest = {
        "num_local_experts": max(block.num_experts for block in config.blocks),
        "sliding_window": max((window for window in windows if window is not None), default=None),
    }
    out = {**largest, "layer_types": [FULL if window is None else SLIDING for window in windows]}
    if listed:
        entries = list(map(_entry, config.blocks))
        differing = [{name: value for name, value in e.items() if value and value != largest[name]} for e in entries]
        out["block_configs"] = entries
        out["per_layer_config"] = {str(layer): entry for layer, entry in enumerate(differing) if entry}
    return out


def _overrides(fields: Fields, layers: int) -> list[dict[str, int]]:
    """The settings of each layer in which `per_layer_config` departs from the model's."""
    out: list[dict[str, int]] = [{} for _ in range(layers)]
    table = fields.table("per_layer_config") or Fields({}, fields.source)
    for key in table.data:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and int(key[:6]) < layers):
            raise CheckpointError(
                f"{fields.source}: per_layer_config has the key {shown(key)}, but there are layers 0 to {layers - 1}"
            )
        entry = table.table(key) or Fields({}, fields.source)
        for name in entry.data:
            if name not in ("num_local_experts", "sliding_window"):
                raise entry.fail(name, "only num_local_experts and sliding_window may differ between layers")
            out[int(key)][name] = entry.integer(name, most=MAX_EXPERTS if name == "num_local_experts" else MAX_SIZE)
    return out


def _entry(block: BlockConfig) -> dict[str, int | None]:
    return {"num_local_experts": block.num_experts, "sliding_window": block.window}
