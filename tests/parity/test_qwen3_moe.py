"""Logits of Qwen3-MoE checkpoints against transformers' own model, in float32, in all forms that are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.convert_hf.describe import read_config
from puzzle_jax.convert_hf.export import export_child
from tests.convert_hf.checkpoints import stored_bytes
from tests.convert_hf.qwen import qwen_config, write_qwen
from tests.parity.reference import load_reference, our_greedy, our_logits, reference_logits, relative_difference
from tests.support import random_params

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
LENGTH = 45
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e3,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
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
    "max_position_embeddings": 2048,
}
CASES: dict[str, dict[str, Any]] = {
    "as it is published": {"norm_topk_prob": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "gates not normalised": {"norm_topk_prob": False},
    "biases of attention": {"norm_topk_prob": True, "attention_bias": True},
    "dense layers": {"mlp_only_layers": [2]},
    "dense layers by step": {"norm_topk_prob": True, "decoder_sparse_step": 2},
    "a tied head": {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "YaRN": {"norm_topk_prob": True, "rope_parameters": YARN},
    "YaRN by its factor alone": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e3, "factor": 2.0}},
    "windows": {"use_sliding_window": True, "sliding_window": 6},
}
FUSED = ("as it is published", "dense layers")


def save_reference(directory: Path, *, fused: bool = False, **changes: Any) -> Any:
    """Saves a random model of transformers, in which norms and biases are random too, and returns it."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(len(str(changes)))
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name))
    model.save_pretrained(directory, save_original_format=not fused)
    return model


TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], (2, LENGTH), np.int32)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_transformers(tmp_path, name, record_property):
    model = save_reference(tmp_path / "model", **CASES[name])
    assert "model.layers.3.mlp.experts.6.up_proj.weight" in stored_bytes(tmp_path / "model")
    ours = our_logits(tmp_path / "model", TOKENS)
    difference = relative_difference(ours, reference_logits(model, TOKENS))
    record_property("relative_difference", difference)
    assert difference < TOLERANCE
    if name in FUSED:
        save_reference(tmp_path / "fused", fused=True, **CASES[name])
        assert "model.layers.3.mlp.experts.gate_up_proj" in stored_bytes(tmp_path / "fused")
        np.testing.assert_array_equal(our_logits(tmp_path / "fused", TOKENS), ours)


def test_the_comparison_would_see_other_gates_norms_rotations_and_windows(tmp_path):
    save_reference(tmp_path / "model", **CASES["YaRN"])
    right = our_logits(tmp_path / "model", TOKENS)
    config = {
        "variant": {"normalized_gates": False},
        "rope": {"truncate": True},
        "blocks": tuple(BlockConfig(7, 30) for _ in range(4)),
        "rms_norm_eps": 1e-4,
    }
    read = read_config(tmp_path / "model")
    for field, value in config.items():
        changed = replace(getattr(read, field), **value) if isinstance(value, dict) else value
        assert relative_difference(our_logits(tmp_path / "model", TOKENS, **{field: changed}), right) > 3 * TOLERANCE


BLOCKS = (BlockConfig(7), BlockConfig(0), BlockConfig(7))
KEPT = ((0, 2, 3), (), (1, 4, 6))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    """A checkpoint in FP8 of sizes that blocks of 128 divide, or that one block covers, as transformers requires."""
    config = qwen_config(BLOCKS, hidden_size=256, head_dim=10, dense_size=384)
    return write_qwen(tmp_path_factory.mktemp("models") / "fp8", config, "fp8")


def test_block_fp8_as_transformers_decodes_it(fp8, record_property):
    """Without an accelerator, transformers decodes the matrices, here to float32."""
    difference = relative_difference(our_logits(fp8, TOKENS), reference_logits(load_reference(fp8), TOKENS))
    record_property("relative_difference", difference)
    assert difference < TOLERANCE


@pytest.mark.parametrize("storage", ["experts", "fused", "fp8"])
def test_a_homogeneous_child_needs_no_remote_code(fp8, tmp_path, storage):
    """Its rotary factor and some of its weights are its own; of an FP8 parent these are in bfloat16."""
    parent = fp8 if storage == "fp8" else write_qwen(tmp_path / "parent", qwen_config(BLOCKS), storage)
    config = read_config(parent)
    drawn = random_params(config, seed=9)["layers"]
    delta = {
        "layers": [
            {"attention": {"q_weight": drawn[0]["attention"]["q_weight"]}},
            {"moe": {"gate_up": drawn[1]["moe"]["gate_up"]}},
            {"moe": {"down": drawn[2]["moe"]["down"]}},
        ]
    }
    blocks = tuple(BlockConfig(len(ids)) for ids in KEPT)
    child = replace(config, blocks=blocks, rope=replace(config.rope, factor=2.0, original_context=32))
    export_child(parent, tmp_path / "child", child, KEPT, provenance={}, dense_delta=delta)
    model = load_reference(
        tmp_path / "child"
    ).float()  # where it decodes FP8, it leaves experts in bfloat16 as they are
    assert type(model).__module__.startswith("transformers.models.qwen3_moe")
    theirs = reference_logits(model, TOKENS)
    assert relative_difference(our_logits(tmp_path / "child", TOKENS), theirs) < TOLERANCE
    if storage == "experts":
        import torch

        prompt = [5, 17, 3, 88, 41]
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=1
        )
        assert out[0, len(prompt) :].tolist() == our_greedy(tmp_path / "child", prompt, 9)


@pytest.mark.parametrize("storage", ["experts", "fp8"])
def test_a_heterogeneous_child_by_the_code_that_it_carries(fp8, tmp_path, storage):
    parent = fp8 if storage == "fp8" else write_qwen(tmp_path / "parent", qwen_config(BLOCKS), storage)
    kept, windows = ((0, 2, 3, 5, 6), (), (1, 4)), (5, 9, None)
    blocks = tuple(BlockConfig(len(ids), window) for ids, window in zip(kept, windows, strict=True))
    export_child(parent, tmp_path / "child", read_config(parent).with_blocks(blocks), kept, provenance={})
    model = load_reference(tmp_path / "child", trust=True)
    assert type(model).__name__ == "Qwen3MoePuzzleForCausalLM"
    ours = our_logits(tmp_path / "child", TOKENS)
    assert relative_difference(ours, reference_logits(model, TOKENS)) < TOLERANCE
