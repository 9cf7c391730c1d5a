"""Logits of Qwen3-MoE checkpoints against transformers' own model, in float32, in all forms that are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puzzle_jax.convert_hf.describe import read_config
from puzzle_jax.convert_hf.export import export_child
from tests.convert_hf.checkpoints import stored_bytes
from tests.convert_hf.qwen import to_fp8
from tests.parity.reference import load_reference, our_greedy, our_logits, reference_logits, relative_difference
from tests.support import random_tokens

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
LENGTH = 45
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e3,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 8.0,
    "truncate": False,
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "num_experts": 7,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}
CASES: dict[str, dict[str, Any]] = {
    "as it is published": {"norm_topk_prob": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "gates not normalised": {"norm_topk_prob": False},
    "biases of attention": {"norm_topk_prob": True, "attention_bias": True},
    "dense layers": {"mlp_only_layers": [2]},
    "dense layers by step": {"norm_topk_prob": True, "decoder_sparse_step": 2},
    "a tied head": {"tie_word_embeddings": True},
    "YaRN": {"norm_topk_prob": True, "rope_parameters": YARN},
    "YaRN by its factor alone": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e3, "factor": 2.0}},
    "windows": {"use_sliding_window": True, "sliding_window": 6},
    "another epsilon": {"rms_norm_eps": 1e-3},
}


def save_reference(directory: Path, **changes: Any) -> Any:
    """Saves a random model of transformers, in which norms and biases are random too, and returns it."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    options = {name: changes.pop(name) for name in ("save_original_format", "max_shard_size") if name in changes}
    torch.manual_seed(len(str(changes)))
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name))
    model.save_pretrained(directory, **options)
    return model


def tokens_of(vocab: int = SIZES["vocab_size"]) -> np.ndarray:
    return np.random.default_rng(3).integers(0, vocab, (2, LENGTH), np.int32)


@pytest.mark.parametrize("fused", [False, True], ids=["expert by expert", "fused"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_a_checkpoint_of_transformers(tmp_path, changes, fused, record_property):
    model = save_reference(tmp_path / "model", save_original_format=not fused, **changes)
    names = stored_bytes(tmp_path / "model")
    assert ("model.layers.1.mlp.experts.gate_up_proj" in names) is fused
    difference = relative_difference(our_logits(tmp_path / "model", tokens_of()), reference_logits(model, tokens_of()))
    record_property("relative_difference", difference)
    print(f"{difference:.2e}")
    assert difference < TOLERANCE
