"""Qwen3-MoE checkpoints written tensor by tensor after the published ones, with the parameters that they hold.

Nothing of `puzzle_jax.convert_hf` writes them but the code that heterogeneous children carry, so that they show what
other runtimes make of the format itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import puzzle_jax.convert_hf
from puzzle_jax.config import QWEN3_MOE, BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.model.network import to_compute
from puzzle_jax.model.spec import Params
from tests.support import random_params

REMOTE = Path(puzzle_jax.convert_hf.__file__).parent / "remote"
REMOTE_CODE = ("configuration_qwen3_moe_puzzle", "modeling_qwen3_moe_puzzle", "mlx_qwen3_moe_puzzle")
BLOCKS = {
    "plain": (BlockConfig(7), BlockConfig(0), BlockConfig(7), BlockConfig(7)),
    "counts": (BlockConfig(5), BlockConfig(0), BlockConfig(4), BlockConfig(7), BlockConfig(6)),
    "puzzle": (BlockConfig(5, 9), BlockConfig(0, 17), BlockConfig(4), BlockConfig(7, 9), BlockConfig(6)),
}
"""Blocks by kind; only "plain" ones are a plain `qwen3_moe`, which knows dense layers but one expert count."""


def qwen3_config(kind: str, **changes: Any) -> ModelConfig:
    """A model with widths that every runtime accepts, and windows shorter than 20 tokens."""
    settings = dict(
        vocab_size=224,
        hidden_size=96,
        intermediate_size=64,
        dense_size=160,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        experts_per_token=3,
        blocks=BLOCKS[kind],
        rope=RopeConfig(theta=50_000.0, factor=1.0),
        max_position=128,
        rms_norm_eps=1e-6,
        swiglu_limit=None,
        variant=QWEN3_MOE,
    )
    return ModelConfig(**{**settings, **changes})


def config_json(config: ModelConfig, kind: str) -> dict[str, Any]:
    """The fields of the published config.json, and those of a heterogeneous child."""
    counts = [block.num_experts for block in config.blocks]
    windows = [block.window for block in config.blocks]
    widest = max((window for window in windows if window is not None), default=None)
    rope = config.rope
    yarn = {"rope_type": "yarn", "factor": rope.factor, "original_max_position_embeddings": rope.original_context}
    out = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 222,
        "decoder_sparse_step": 1,
        "eos_token_id": 223,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.dense_size,
        "max_position_embeddings": config.max_position,
        "max_window_layers": config.num_layers,
        "mlp_only_layers": [layer for layer, count in enumerate(counts) if count == 0],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": config.intermediate_size,
        "norm_topk_prob": True,
        "num_attention_heads": config.num_heads,
        "num_experts": max(counts),
        "num_experts_per_tok": config.experts_per_token,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "output_router_logits": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None if rope.factor == 1.0 else yarn,
        "rope_theta": rope.theta,
        "router_aux_loss_coef": 0.001,
        "sliding_window": widest,
        "tie_word_embeddings": config.variant.tied_head,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": widest is not None,
        "vocab_size": config.vocab_size,
    }
    if kind == "plain":
        return out
    entries = [{"num_local_experts": count, "sliding_window": w} for count, w in zip(counts, windows, strict=True)]
    whole = {"num_local_experts": max(counts), "sliding_window": widest}
    sparse = [{n: v for n, v in entry.items() if v not in (None, whole[n])} for entry in entries]
    modeling = "modeling_qwen3_moe_puzzle.Qwen3MoePuzzle"
    return out | {
        "architectures": ["Qwen3MoePuzzleForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_qwen3_moe_puzzle.Qwen3MoePuzzleConfig",
            "AutoModel": f"{modeling}Model",
            "AutoModelForCausalLM": f"{modeling}ForCausalLM",
        },
        "block_configs": entries,
        "model_file": "mlx_qwen3_moe_puzzle.py",
        "model_type": "qwen3_moe_puzzle",
        "per_layer_config": {str(layer): entry for layer, entry in enumerate(sparse) if entry},
    }


def scales_of(config: ModelConfig) -> np.ndarray:
    """Scales of an FP8 cache, [layers, 2], keys first; exact in bfloat16, and all different."""
    return (1 + np.arange(2 * config.num_layers, dtype=np.float32).reshape(-1, 2)) / 8


def tensors_of(params: Params) -> dict[str, np.ndarray]:
    """The published names and layouts: matrices are [outputs, inputs], and every expert's are apart."""

    def mlp(prefix: str, moe: Params, expert: int) -> dict[str, np.ndarray]:
        both = moe["gate_up"][expert]  # [hidden, 2 * inter]; gates in even columns
        matrices = {"gate": both[:, 0::2], "up": both[:, 1::2], "down": moe["down"][expert]}
        return {f"{prefix}.{name}_proj.weight": matrix.T for name, matrix in matrices.items()}

    out = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["final_norm"]}
    if "head" in params:
        out["lm_head.weight"] = params["head"].T
    for index, layer in enumerate(params["layers"]):
        name, attention, moe = f"model.layers.{index}", layer["attention"], layer["moe"]
        out[f"{name}.input_layernorm.weight"] = attention["norm"]
        out[f"{name}.post_attention_layernorm.weight"] = moe["norm"]
        out |= {f"{name}.self_attn.{each}_proj.weight": attention[f"{each}_weight"].T for each in "qkvo"}
        out |= {f"{name}.self_attn.{each}_norm.weight": attention[f"{each}_norm"] for each in "qk"}
        if "router_weight" not in moe:
            out |= mlp(f"{name}.mlp", moe, 0)
            continue
        out[f"{name}.mlp.gate.weight"] = moe["router_weight"].T
        for expert in range(len(moe["gate_up"])):
            out |= mlp(f"{name}.mlp.experts.{expert}", moe, expert)
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def write_qwen3(directory: Path, kind: str, seed: int = 0, **changes: Any) -> tuple[ModelConfig, Params]:
    """Writes a random checkpoint in bfloat16; returns its configuration and its parameters in float32.

    A heterogeneous one has scales of an FP8 cache (`scales_of`), as searched children do.
    """
    config = qwen3_config(kind, **changes)
    params = random_params(config, seed, ml_dtypes.bfloat16)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_json(config, kind)))
    tensors = tensors_of(params)
    if kind != "plain":
        for layer, scales in enumerate(scales_of(config)):
            for name, scale in zip("kv", scales, strict=True):
                tensors[f"model.layers.{layer}.self_attn.{name}_scale"] = np.asarray(scale)
        for name in REMOTE_CODE:
            (directory / f"{name}.py").write_bytes((REMOTE / f"{name}.py").read_bytes())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return config, to_compute(params, jnp.float32)
