"""Reading and writing config.json of gpt-oss checkpoints.

Two model types are read: `gpt_oss`, where `layer_types` and one `sliding_window` give every layer's attention
and all layers have the same experts, and `gpt_oss_puzzle`, where `block_configs` gives both per layer (the
published form of nvidia/gpt-oss-puzzle-88B). Rotary settings are read in the old form (`rope_theta`,
`rope_scaling`) and in that of transformers 5 (`rope_parameters`), and written in the old form, which every
runtime loads.

A missing field has the value that transformers gives it (`GptOssConfig` of 5.x), so that a parent and its
exported child are the same function there. Where the file contradicts itself, so that runtimes disagree about which
value counts, it is refused by name.

A model is written as plain `gpt_oss` only where all runtimes read it correctly: one expert count, and one
window width on even layers with full attention on odd ones, because several runtimes take that alternation
for granted. Everything else becomes `gpt_oss_puzzle`. Left out: values that change the arithmetic in ways the
network does not have (tied embeddings, attention without biases, other rotary types, rotary settings by type of
layer or for a part of a head); they are refused rather than ignored.
"""

from __future__ import annotations

from pathlib import Path

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.convert_hf.configuration.fields import MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, Fields
from puzzle_jax.convert_hf.configuration.rope_json import MAX_POSITION, ORIGINAL, parse_rope
from puzzle_jax.convert_hf.other_forms import INDEX, SINGLE, original_form
from puzzle_jax.convert_hf.table import Form
from puzzle_jax.errors import CheckpointError, ConfigError, shown
from puzzle_jax.files import Json

PLAIN, PUZZLE = "gpt_oss", "gpt_oss_puzzle"
SLIDING, FULL = "sliding_attention", "full_attention"
SWIGLU_ALPHA = 1.702
AUTO_MAP = {
    "AutoConfig": "configuration_gpt_oss_puzzle.GptOssPuzzleConfig",
    "AutoModel": "modeling_gpt_oss_puzzle.GptOssPuzzleModel",
    "AutoModelForCausalLM": "modeling_gpt_oss_puzzle.GptOssPuzzleForCausalLM",
}
MODEL_FILE = "mlx_gpt_oss_puzzle.py"
"""The file that mlx-lm runs instead of looking for a model type of its own."""
QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}

_FIXED = {"tie_word_embeddings": False, "attention_bias": True, "swiglu_alpha": SWIGLU_ALPHA}
_REPLACED = (
    *("rope_parameters", ORIGINAL, "partial_rotary_factor", "num_experts"),
    *("per_layer_config", "block_configs", "auto_map", "model_file"),
)
_EXPERTS_PER_TOKEN = 4  # in transformers, where num_experts_per_tok is missing
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
"""Names in config.json, by field of `ModelConfig`."""


def parse_config(data: dict[str, Json], source: Path) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      data: the file's content.
      source: the file, for messages.

    Raises `CheckpointError` for an unknown model type, and for fields that are missing, of the wrong kind,
    contradictory, or ask for arithmetic that the network does not have.
    """
    fields = Fields(data, source)
    if "model_type" not in data and {"num_experts", "rope_scaling_factor"} <= set(data):
        raise CheckpointError(original_form(source))
    model_type = fields.string("model_type")
    if model_type not in (PLAIN, PUZZLE):
        raise fields.fail("model_type", f"only {PLAIN} and {PUZZLE} are known")
    if data.get("transformers_weights") is not None:
        raise fields.fail("transformers_weights", f"only {SINGLE} or {INDEX} is read")
    for name, value in _FIXED.items():
        if data.get(name, value) != value:
            raise fields.fail(name, f"only {str(value).lower()} is supported")
    layers = fields.integer("num_hidden_layers", most=MAX_LAYERS)
    try:
        return ModelConfig(
            **{name: fields.integer(written) for name, written in _SIZES.items()},
            experts_per_token=_experts_per_token(fields),
            blocks=(_plain_blocks if model_type == PLAIN else _puzzle_blocks)(fields, layers),
            rope=parse_rope(fields),
            max_position=fields.integer("max_position_embeddings", MAX_POSITION),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
            swiglu_limit=fields.number("swiglu_limit", 7.0),
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None


def parse_form(data: dict[str, Json], source: Path) -> Form:
    """How the experts are stored according to `quantization_config`; raises `CheckpointError` for methods other than
    mxfp4."""
    quantization = Fields(data, source).table("quantization_config")
    if quantization is None:
        return "bf16"
    if quantization.string("quant_method") != "mxfp4":
        raise quantization.fail("quant_method", "only mxfp4 (or no quantization_config) is supported")
    return "mxfp4"


def _plain_blocks(fields: Fields, layers: int) -> tuple[BlockConfig, ...]:
    _, experts = _either(fields, "num_local_experts", "num_experts", MAX_EXPERTS)  # transformers reads both
    types = _layer_types(fields, layers)
    for layer, kind in enumerate(types):
        if kind not in (SLIDING, FULL):
            raise CheckpointError(
                f"{fields.source}: layer_types[{layer}] is {shown(kind)}, but must be {SLIDING} or {FULL}"
            )
    window = fields.integer("sliding_window") if SLIDING in types else None
    blocks = []
    for kind, override in zip(types, _overrides(fields, layers), strict=True):
        width = override.get("sliding_window", window) if kind == SLIDING else None
        blocks.append(BlockConfig(override.get("num_local_experts", experts), width))
    return tuple(blocks)


def _either(fields: Fields, name: str, other: str, most: int = MAX_SIZE) -> tuple[list[str], int]:
    """A number that a file may give under either of two names, or under both if they agree; and the names it has."""
    names = [each for each in (name, other) if each in fields.data]
    values = [fields.integer(each, most=most) for each in names or [name]]
    if len(set(values)) > 1:
        raise fields.fail(name, f"{other} is {values[1]}; they must be equal")
    return names, values[0]


def _layer_types(fields: Fields, layers: int) -> list[Json]:
    """The file's layer types, or the alternation of the published models where it has none."""
    if fields.data.get("layer_types") is None:
        return [FULL if layer % 2 else SLIDING for layer in range(layers)]
    return fields.list_of("layer_types", layers)


def _puzzle_blocks(fields: Fields, layers: int) -> tuple[BlockConfig, ...]:
    blocks = []
    types = _layer_types(fields, layers)
    for layer, entry in enumerate(fields.list_of("block_configs", layers)):
        where = f"block_configs[{layer}]"
        if not isinstance(entry, dict) or "sliding_window" not in entry:
            rule = "must be an object with num_local_experts and sliding_window"
            raise CheckpointError(f"{fields.source}: {where} is {shown(entry)}, but {rule}")
        block = Fields(entry, fields.source, where + ".")
        window = None if entry["sliding_window"] is None else block.integer("sliding_window")
        blocks.append(BlockConfig(block.integer("num_local_experts", most=MAX_EXPERTS), window))
        expected = FULL if window is None else SLIDING
        if types[layer] != expected:
            missing = ", as it is taken to be where layer_types is missing" * (fields.data.get("layer_types") is None)
            raise CheckpointError(
                f"{fields.source}: layer_types[{layer}] is {shown(types[layer])}{missing}, "
                f"but {where} has sliding_window {window}, which asks for {expected}"
            )
    for layer, (block, override) in enumerate(zip(blocks, _overrides(fields, layers), strict=True)):
        for name, value in override.items():
            if value != _entry(block)[name]:
                raise CheckpointError(
                    f"{fields.source}: per_layer_config.{layer}.{name} is {value}, "
                    f"but block_configs[{layer}] has {_entry(block)[name]}; they must be equal"
                )
    return tuple(blocks)


def _overrides(fields: Fields, layers: int) -> list[dict[str, int]]:
    """The settings of each layer in which `per_layer_config` (transformers' sparse schema) departs from the model's."""
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


def _sparse(config: ModelConfig, experts: int, window: int | None) -> dict[str, dict[str, int]]:
    """`per_layer_config`: the settings of each layer that differ from the model's own expert count and window."""
    out = {}
    for layer, block in enumerate(config.blocks):
        whole = {"num_local_experts": experts, "sliding_window": window}
        differs = {name: value for name, value in _entry(block).items() if value not in (None, whole[name])}
        if differs:
            out[str(layer)] = differs
    return out


def _entry(block: BlockConfig) -> dict[str, int | None]:
    return {"num_local_experts": block.num_experts, "sliding_window": block.window}


def _experts_per_token(fields: Fields) -> int:
    """Experts per token: `num_experts_per_tok`, which the published models repeat under another name."""
    names, value = _either(fields, "num_experts_per_tok", "experts_per_token")
    if names == ["experts_per_token"] and value != _EXPERTS_PER_TOKEN:
        raise CheckpointError(
            f"{fields.source}: num_experts_per_tok is missing, for which transformers takes {_EXPERTS_PER_TOKEN}, but "
            f"experts_per_token is {value}; write num_experts_per_tok"
        )
    return value


def is_plain(config: ModelConfig) -> bool:
    """Tells whether every runtime builds the model from plain `gpt_oss`.

    This requires one expert count, and one window width on even layers with full attention on odd ones.
    """
    counts = {block.num_experts for block in config.blocks}
    even = {block.window for block in config.blocks[0::2]}
    odd = {block.window for block in config.blocks[1::2]}
    return len(counts) == 1 and len(even) == 1 and None not in even and odd <= {None}


def write_config(config: ModelConfig, base: dict[str, Json], *, form: Form | None = None) -> dict[str, Json]:
    """The content of config.json for `config`.

    Args:
      config: the model.
      base: the parent's config.json (or {}); keys that are not about `config`, such as token ids, are kept.
      form: how the experts are stored; None keeps the base's `quantization_config`.
    """
    plain = is_plain(config)
    windows = [block.window for block in config.blocks]
    widths = [window for window in windows if window is not None]
    out: dict[str, Json] = {name: value for name, value in base.items() if name not in _REPLACED}
    out.update(
        architectures=["GptOssForCausalLM" if plain else "GptOssPuzzleForCausalLM"],
        model_type=PLAIN if plain else PUZZLE,
        **{written: getattr(config, name) for name, written in _SIZES.items()},
        num_hidden_layers=config.num_layers,
        # Runtimes size caches and buffers by these two, so they are the largest of any layer.
        num_local_experts=max(block.num_experts for block in config.blocks),
        sliding_window=max(widths, default=None),
        num_experts_per_tok=config.experts_per_token,
        experts_per_token=config.experts_per_token,
        layer_types=[FULL if window is None else SLIDING for window in windows],
        max_position_embeddings=config.max_position,
        initial_context_length=config.rope.original_context,
        rope_theta=config.rope.theta,
        rope_scaling={
            "rope_type": "yarn",
            **{name: getattr(config.rope, name) for name in ("factor", "beta_fast", "beta_slow", "truncate")},
            ORIGINAL: config.rope.original_context,
        },
        rms_norm_eps=config.rms_norm_eps,
        swiglu_limit=config.swiglu_limit,
        hidden_act="silu",
        attention_bias=True,
        tie_word_embeddings=False,
    )
    if "dtype" not in out:
        out.setdefault("torch_dtype", "bfloat16")
    if not plain:
        out["block_configs"] = list(map(_entry, config.blocks))
        out["per_layer_config"] = _sparse(config, out["num_local_experts"], out["sliding_window"])
        out["auto_map"] = dict(AUTO_MAP)
        out["model_file"] = MODEL_FILE
    if form == "bf16":
        out.pop("quantization_config", None)
    elif form == "mxfp4":
        out.setdefault("quantization_config", QUANTIZATION)
    if out.get("quantization_config"):
        # transformers' packed experts are built with one count for all layers; unpacking has no such limit.
        out["quantization_config"] = {
            **{key: value for key, value in out["quantization_config"].items() if key != "dequantize"},
            **({} if plain else {"dequantize": True}),
        }
    return out
