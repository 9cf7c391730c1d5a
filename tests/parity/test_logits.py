"""Logits of imported checkpoints against transformers' own gpt-oss, in float32."""

from dataclasses import replace

import numpy as np
import pytest

from puzzle_jax.config import BlockConfig, RopeConfig
from tests.convert_hf.checkpoints import packable_config, write_random
from tests.parity.reference import (
    TOLERANCE,
    load_reference,
    our_logits,
    random_config,
    reference_logits,
    relative_difference,
)
from tests.support import present, random_tokens

pytestmark = pytest.mark.parity
LENGTH = 45


def tokens_of(config):
    return np.asarray(random_tokens(config, 2, LENGTH))


@pytest.mark.parametrize("form", ["bf16", "mxfp4"])
@pytest.mark.parametrize("seed", range(4))
def test_stock_model(tmp_path, seed, form, record_property):
    config = random_config(seed)
    directory = write_random(tmp_path / "model", config, form, seed=seed)
    tokens = tokens_of(config)
    model = load_reference(directory)
    assert type(model).__module__.startswith("transformers.models.gpt_oss")
    theirs, ours = reference_logits(model, tokens), our_logits(directory, tokens)
    difference = relative_difference(ours, theirs)
    record_property("relative_difference", difference)
    print(f"stock {form} seed {seed}: {difference:.2e}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("seed", range(2))
def test_the_comparison_would_see_a_wrong_window_clamp_or_rotation(tmp_path, seed):
    config = random_config(seed)
    directory = write_random(tmp_path / "model", config, "bf16", seed=seed)
    tokens = tokens_of(config)
    right = our_logits(directory, tokens)
    wider = tuple(replace(block, window=block.window and block.window + 1) for block in config.blocks)
    for changes in (
        {"blocks": wider},
        {"swiglu_limit": present(config.swiglu_limit) + 0.1},
        {"rope": replace(config.rope, truncate=not config.rope.truncate)},
        {"rope": replace(config.rope, factor=1.0)},
        {"rms_norm_eps": 1e-2},
    ):
        assert relative_difference(our_logits(directory, tokens, **changes), right) > 3 * TOLERANCE, changes


@pytest.mark.parametrize("form", ["bf16", "mxfp4"])
@pytest.mark.parametrize("seed", range(10, 13))
def test_heterogeneous_model_by_remote_code(tmp_path, seed, form, record_property):
    config = random_config(seed, mixed=True)
    assert len({block.num_experts for block in config.blocks}) > 1
    assert len({block.window for block in config.blocks}) > 2
    directory = write_random(tmp_path / "model", config, form, seed=seed)
    model = load_reference(directory, trust=True)
    assert type(model).__name__ == "GptOssPuzzleForCausalLM"
    tokens = tokens_of(config)
    difference = relative_difference(our_logits(directory, tokens), reference_logits(model, tokens))
    record_property("relative_difference", difference)
    print(f"puzzle {form} seed {seed}: {difference:.2e}")
    assert difference < TOLERANCE


def test_without_yarn(tmp_path):
    config = packable_config(rope=RopeConfig(theta=5000.0, factor=1.0))
    directory = write_random(tmp_path / "model", config)
    tokens = tokens_of(config)
    theirs = reference_logits(load_reference(directory), tokens)
    assert relative_difference(our_logits(directory, tokens), theirs) < TOLERANCE


def test_a_config_saved_by_transformers_is_read(tmp_path):
    """transformers 5 writes rope_parameters; the weights stay ours."""
    from transformers import AutoConfig

    config = packable_config()
    directory = write_random(tmp_path / "model", config, "bf16")
    tokens = tokens_of(config)
    before = our_logits(directory, tokens)
    AutoConfig.from_pretrained(directory).save_pretrained(directory)
    assert "rope_parameters" in (directory / "config.json").read_text()
    np.testing.assert_array_equal(our_logits(directory, tokens), before)


def test_a_checkpoint_saved_by_transformers_is_read(tmp_path):
    config = packable_config((BlockConfig(6, 4), BlockConfig(6)))
    directory = write_random(tmp_path / "ours", config, "bf16")
    model = load_reference(directory)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    tokens = tokens_of(config)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(our_logits(tmp_path / "theirs", tokens), our_logits(directory, tokens))
