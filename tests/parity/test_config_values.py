"""config.json values that are missing or given in several places are read as transformers reads them, or refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.configuration.config_json import write_config
from puzzle_jax.convert_hf.configuration.layers import FULL, SLIDING
from puzzle_jax.model.rope import inverse_frequencies
from tests.parity.config_family import ABSENT, ConfigFamily
from tests.support import small_config

pytestmark = pytest.mark.parity

BASE = write_config(small_config(), {})
YARN = BASE["rope_scaling"]


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in YARN.items() if name not in names}


ORIGINAL = "original_max_position_embeddings"

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    # where rotary settings are found
    "no scaling": {"rope_scaling": ABSENT},
    "scaling null": {"rope_scaling": None},
    "scaling empty": {"rope_scaling": {}},
    "only parameters": {"rope_scaling": ABSENT, "rope_theta": ABSENT, "rope_parameters": {**YARN, "rope_theta": 500.0}},
    "parameters beside theta": {"rope_scaling": ABSENT, "rope_parameters": YARN},
    "parameters empty": {"rope_scaling": ABSENT, "rope_parameters": {}},
    "parameters empty beside scaling": {"rope_parameters": {}},
    "parameters null": {"rope_parameters": None},
    "both equal": {"rope_parameters": {**YARN, "rope_theta": 10_000.0}},
    "both, another factor": {"rope_parameters": {**YARN, "factor": 2.0}},
    "both, another type": {"rope_parameters": {"rope_type": "default"}},
    "both, one leaves out what the other says": {"rope_parameters": without("beta_fast", "beta_slow")},
    "by kind of layer": {"rope_scaling": ABSENT, "rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default"}}},
    "partly by kind of layer": {"rope_scaling": {**YARN, FULL: {"rope_type": "default"}}},
    # the base
    "no theta": {"rope_theta": ABSENT},
    "neither": {"rope_theta": ABSENT, "rope_scaling": ABSENT},
    "theta null": {"rope_theta": None},
    "theta whole": {"rope_theta": 10_000},
    "theta a text": {"rope_theta": "10000"},
    "theta in scaling alone": {"rope_theta": ABSENT, "rope_scaling": {**YARN, "rope_theta": 500.0}},
    "another theta in scaling": {"rope_scaling": {**YARN, "rope_theta": 500.0}},
    "theta null in scaling": {"rope_scaling": {**YARN, "rope_theta": None}},
    # the type
    "type by its old name": {"rope_scaling": {**without("rope_type"), "type": "yarn"}},
    "two types": {"rope_scaling": {**YARN, "rope_type": "default", "type": "yarn"}},
    "no type": {"rope_scaling": without("rope_type")},
    "type null": {"rope_scaling": {**YARN, "rope_type": None}},
    "default": {"rope_scaling": {"rope_type": "default"}},
    "default with leftovers": {"rope_scaling": {**YARN, "rope_type": "default"}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    # YaRN's numbers
    "no factor": {"rope_scaling": without("factor")},
    "factor null": {"rope_scaling": {**YARN, "factor": None}},
    "factor 1": {"rope_scaling": {**YARN, "factor": 1.0}},
    "factor whole": {"rope_scaling": {**YARN, "factor": 4}},
    "factor below 1": {"rope_scaling": {**YARN, "factor": 0.5}},
    "no betas": {"rope_scaling": without("beta_fast", "beta_slow")},
    "betas null": {"rope_scaling": {**YARN, "beta_fast": None, "beta_slow": None}},
    "beta 0": {"rope_scaling": {**YARN, "beta_fast": 0}},
    "betas in the wrong order": {"rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 2.0}},
    "betas near each other": {"rope_scaling": {**YARN, "beta_fast": 1.001, "beta_slow": 1.0}},
    "betas beyond the head": {"rope_scaling": {**YARN, "beta_fast": 1e4, "beta_slow": 1e3}},
    "no truncate": {"rope_scaling": without("truncate")},
    "truncate true": {"rope_scaling": {**YARN, "truncate": True}},
    "truncate null": {"rope_scaling": {**YARN, "truncate": None}},
    "truncate 0": {"rope_scaling": {**YARN, "truncate": 0}},
    "attention factor": {"rope_scaling": {**YARN, "attention_factor": 1.5}},
    "attention factor its own": {"rope_scaling": {**YARN, "attention_factor": 0.1 * np.log(4.0) + 1}},
    "attention factor null": {"rope_scaling": {**YARN, "attention_factor": None}},
    "mscale": {"rope_scaling": {**YARN, "mscale": 0.7}},
    "both mscales": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}},
    "partial, beside": {"partial_rotary_factor": 0.5},
    "partial, inside": {"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}},
    "partial, all": {"partial_rotary_factor": 1.0},
    "partial null": {"partial_rotary_factor": None},
    # the context before extension
    "no original": {"rope_scaling": without(ORIGINAL)},
    "no original at all": {"rope_scaling": without(ORIGINAL), "initial_context_length": ABSENT},
    "no original, no longest": {
        "rope_scaling": without(ORIGINAL),
        "initial_context_length": ABSENT,
        "max_position_embeddings": ABSENT,
    },
    "original null": {"rope_scaling": {**YARN, ORIGINAL: None}},
    "original beside": {ORIGINAL: 128, "initial_context_length": ABSENT, "rope_scaling": without(ORIGINAL)},
    "another original beside": {ORIGINAL: 128},
    "original a float": {"rope_scaling": {**YARN, ORIGINAL: 32.0}},
    "original of a few tokens": {"rope_scaling": {**YARN, ORIGINAL: 4}},
    "original beyond all": {"rope_theta": 10.0, "rope_scaling": {**YARN, ORIGINAL: 10**7}},
    "another initial context": {"initial_context_length": 7},
    # experts
    "only experts_per_token": {"num_experts_per_tok": ABSENT},
    "only experts_per_token, 4": {"num_experts_per_tok": ABSENT, "experts_per_token": 4},
    "only num_experts_per_tok": {"experts_per_token": ABSENT},
    "num_experts_per_tok null": {"num_experts_per_tok": None},
    "neither number of experts per token": {"num_experts_per_tok": ABSENT, "experts_per_token": ABSENT},
    "other numbers of experts per token": {"experts_per_token": 3},
    "another num_experts": {"num_experts": 3},
    "only num_experts": {"num_experts": 7, "num_local_experts": ABSENT},
    "no number of experts": {"num_local_experts": ABSENT},
    # layers
    "no layer types": {"layer_types": ABSENT},
    "layer types null": {"layer_types": None},
    "other layer types": {"layer_types": [FULL, FULL, SLIDING, SLIDING]},
    "layer types chunked": {"layer_types": ["chunked_attention"] * 4},
    "no window": {"sliding_window": ABSENT},
    "window null": {"sliding_window": None},
    "window 0": {"sliding_window": 0},
    "all full, no window": {"sliding_window": None, "layer_types": [FULL] * 4},
    # the rest
    **{f"no {name}": {name: ABSENT} for name in ("rms_norm_eps", "swiglu_limit", "swiglu_alpha", "hidden_act")},
    **{f"{name} null": {name: None} for name in ("rms_norm_eps", "swiglu_limit", "swiglu_alpha", "head_dim")},
    **{f"no {name}": {name: ABSENT} for name in ("head_dim", "num_key_value_heads", "num_attention_heads")},
    **{f"no {name}": {name: ABSENT} for name in ("hidden_size", "intermediate_size", "vocab_size")},
    **{f"no {name}": {name: ABSENT} for name in ("attention_bias", "tie_word_embeddings", "max_position_embeddings")},
    "longest null": {"max_position_embeddings": None},
    "no biases": {"attention_bias": False},
    "tied": {"tie_word_embeddings": True},
    "another activation": {"hidden_act": "gelu"},
    "another alpha": {"swiglu_alpha": 1.0},
    "eps a whole number": {"rms_norm_eps": 1},
}


def theirs(directory: Path) -> dict[str, Any] | None:
    """The values that transformers reads, or None where it fails to load the configuration."""
    from transformers import AutoConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    try:
        config = AutoConfig.from_pretrained(directory)
        rotary = GptOssRotaryEmbedding(cast(Any, config))
    except Exception:  # from its validation, or from arithmetic with values it let pass
        return None
    table = config.rope_parameters
    yarn = table["rope_type"] == "yarn"
    return {
        "frequencies": rotary.inv_freq.double().numpy(),
        "magnitude": rotary.attention_scaling,
        "theta": table["rope_theta"],
        "factor": table["factor"] if yarn else 1.0,
        **({"original": table[ORIGINAL], "truncate": bool(table.get("truncate", True))} if yarn else {}),
        **({"betas": [table.get("beta_fast") or 32.0, table.get("beta_slow") or 1.0]} if yarn else {}),
        "windows": [config.sliding_window if kind == SLIDING else None for kind in config.layer_types],
        "experts": config.num_local_experts,
        "per_token": config.num_experts_per_tok,
        "sizes": [config.vocab_size, config.hidden_size, config.intermediate_size],
        "heads": [config.num_attention_heads, config.num_key_value_heads, config.head_dim],
        "numbers": [config.rms_norm_eps, config.swiglu_limit, config.swiglu_alpha, config.max_position_embeddings],
        "kinds": [config.attention_bias, config.tie_word_embeddings],
    }


def ours(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    return {
        "frequencies": inverse_frequencies(rope, config.head_dim),
        "magnitude": rope.magnitude,
        "theta": rope.theta,
        "factor": rope.factor,
        "original": rope.original_context,
        "truncate": rope.truncate,
        "betas": [rope.beta_fast, rope.beta_slow],
        "windows": [block.window for block in config.blocks],
        "experts": config.blocks[0].num_experts,
        "per_token": config.experts_per_token,
        "sizes": [config.vocab_size, config.hidden_size, config.intermediate_size],
        "heads": [config.num_heads, config.num_kv_heads, config.head_dim],
        "numbers": [config.rms_norm_eps, config.swiglu_limit, 1.702, config.max_position],
        "kinds": [True, False],
    }


FAMILY = ConfigFamily("gpt_oss", BASE, theirs, ours)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_field_is_read_as_transformers_reads_it_or_refused(tmp_path, changes):
    FAMILY.check(FAMILY.written(tmp_path / "model", changes))


def test_two_changes_at_once(tmp_path):
    rng = random.Random(0)
    variants = list(VARIANTS.values())
    read = sum(FAMILY.check(FAMILY.written(tmp_path / str(number), *rng.sample(variants, 2))) for number in range(300))
    assert read > 30  # enough of them are compared


READ = ["as it is", "no scaling", "only parameters", "no theta", "default", "no truncate", "only num_experts"]


@pytest.mark.parametrize("name", READ)
def test_what_transformers_reads_without_doubt_is_read(tmp_path, name):
    assert FAMILY.check(FAMILY.written(tmp_path / "model", VARIANTS[name]))
