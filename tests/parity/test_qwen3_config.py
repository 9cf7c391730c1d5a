"""Fields of Qwen3-MoE's config.json that are missing or contradict others are read as by transformers, or refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import pytest

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.configuration.config_json import write_config
from puzzle_jax.model.rope import inverse_frequencies
from tests.convert_hf.qwen import qwen_config
from tests.parity.config_family import ABSENT, ConfigFamily
from tests.parity.test_config_values import VARIANTS as ROTARY
from tests.parity.test_config_values import YARN

pytestmark = pytest.mark.parity

BASE = write_config(qwen_config(), {})
OPTIONAL = (
    *("head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias"),
    *("decoder_sparse_step", "mlp_only_layers", "num_experts_per_tok", "norm_topk_prob", "intermediate_size"),
    *("use_sliding_window", "sliding_window", "rope_theta", "num_local_experts", "num_experts"),
)
SIZES = ("vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads")
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    **{name: change for name, change in ROTARY.items() if "rope" in str(change) or "original" in name},
    **{f"no {name}": {name: ABSENT} for name in (*OPTIONAL, *SIZES, "num_key_value_heads")},
    **{f"{name} null": {name: None} for name in (*OPTIONAL, *SIZES)},
    "no number of experts": {"num_experts": ABSENT, "num_local_experts": ABSENT},
    "two numbers of experts": {"num_experts": 5},
    "experts that are chosen": {"num_experts_per_tok": 4},
    "windows": {"use_sliding_window": True, "sliding_window": 6},
    "windows in later layers": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "windows of no width given": {"use_sliding_window": True, "sliding_window": ABSENT},
    "windows that are not used": {"sliding_window": 6, "max_window_layers": 2},
    "windows of null": {"use_sliding_window": True, "sliding_window": None},
    "every second layer": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "some layers": {"decoder_sparse_step": 2, "mlp_only_layers": [0, 3]},
    "a layer that is not there": {"mlp_only_layers": [9]},
    "no layer at all": {"decoder_sparse_step": 9},
    "layer types": {"layer_types": ["full_attention"] * 4},
    "other layer types": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "biases": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "gates not normalised": {"norm_topk_prob": False},
    "another activation": {"hidden_act": "gelu"},
    "YaRN": {"rope_scaling": YARN},
    "eps a whole number": {"rms_norm_eps": 1},
}


def theirs(directory: Path) -> dict[str, Any] | None:
    """The values that transformers reads, or None where it fails to load the configuration."""
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    try:
        config = AutoConfig.from_pretrained(directory)
        rotary = Qwen3MoeRotaryEmbedding(cast(Any, config))
    except Exception:  # from its validation, or from arithmetic with values it let pass
        return None
    layers = range(config.num_hidden_layers)
    sparse = [layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0 for layer in layers]
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return {
        "frequencies": rotary.inv_freq.double().numpy(),
        "magnitude": rotary.attention_scaling,
        "experts": [config.num_experts if one else 0 for one in sparse],
        "windows": [config.sliding_window] * len(layers),
        "dense": None if all(sparse) else config.intermediate_size,
        "sizes": [config.vocab_size, config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok],
        "heads": [config.num_attention_heads, config.num_key_value_heads, head_dim],
        "numbers": [config.rms_norm_eps, config.max_position_embeddings],
        "kinds": [config.attention_bias, config.tie_word_embeddings, config.norm_topk_prob, config.hidden_act],
    }


def ours(config: ModelConfig) -> dict[str, Any]:
    variant = config.variant
    return {
        "frequencies": inverse_frequencies(config.rope, config.head_dim),
        "magnitude": config.rope.magnitude,
        "experts": [block.num_experts for block in config.blocks],
        "windows": [block.window for block in config.blocks],
        "dense": config.dense_size,
        "sizes": [config.vocab_size, config.hidden_size, config.intermediate_size, config.experts_per_token],
        "heads": [config.num_heads, config.num_kv_heads, config.head_dim],
        "numbers": [config.rms_norm_eps, config.max_position],
        "kinds": [variant.attention_bias, variant.tied_head, variant.normalized_gates, "silu"],
    }


FAMILY = ConfigFamily("qwen3_moe", BASE, theirs, ours)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_field_is_read_as_transformers_reads_it_or_refused(tmp_path, changes):
    FAMILY.check(FAMILY.written(tmp_path / "model", changes))


def test_two_changes_at_once(tmp_path):
    rng = random.Random(0)
    variants = list(VARIANTS.values())
    read = sum(FAMILY.check(FAMILY.written(tmp_path / str(number), *rng.sample(variants, 2))) for number in range(200))
    assert read > 30  # enough of them are compared


READ = [
    *("as it is", "no scaling", "scaling null", "only parameters", "YaRN", "no theta", "windows", "every second layer"),
    *(f"no {name}" for name in OPTIONAL if name != "num_experts_per_tok"),  # more than there are
]


@pytest.mark.parametrize("name", READ)
def test_what_transformers_reads_without_doubt_is_read(tmp_path, name):
    assert FAMILY.check(FAMILY.written(tmp_path / "model", VARIANTS[name]))
