"""Qwen3-MoE checkpoints in the published format, as a user of transformers loads and runs them."""

import json
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from puzzle_jax.config import QWEN3_MOE, RopeConfig
from tests.parity.qwen3_moe import write_qwen3
from tests.parity.reference import (
    TOLERANCE,
    greedy_of,
    load_reference,
    logits_of,
    reference_logits,
    relative_difference,
)
from tests.support import random_tokens

pytestmark = pytest.mark.parity

LENGTH, STEPS = 34, 14
PROMPTS = [[5, 17, 3, 88, 41, 9, 60, 2, 33, 71, 12, 118, 77, 6, 54, 101, 19, 200, 45, 8], [7, 7, 90]]
YARN = RopeConfig(theta=50_000.0, factor=4.0, original_context=32, truncate=True)
TIED_YARN = {"variant": replace(QWEN3_MOE, tied_head=True), "rope": YARN}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Directory, configuration and parameters of one heterogeneous model."""
    directory = tmp_path_factory.mktemp("models") / "puzzle"
    return directory, *write_qwen3(directory, "puzzle")


@pytest.fixture(scope="module")
def tokens(written):
    return np.asarray(random_tokens(written[1], 2, LENGTH))


@pytest.fixture(scope="module")
def model(written):
    return load_reference(written[0], trust=True)


@pytest.fixture(scope="module")
def theirs(model, tokens):
    return reference_logits(model, tokens)


def greedy(model, **options: Any) -> list[list[int]]:
    """Continuations of a left-padded batch."""
    import torch

    longest = max(map(len, PROMPTS))
    padding = [longest - len(prompt) for prompt in PROMPTS]
    rows = torch.tensor([[1] * pad + prompt for pad, prompt in zip(padding, PROMPTS, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 1, **options}
    return model.generate(rows, attention_mask=mask, **settings)[:, longest:].tolist()


@pytest.mark.parametrize("kind, changes", [("plain", {}), ("counts", TIED_YARN)], ids=["plain", "tied-yarn"])
def test_logits(tmp_path, kind, changes):
    config, params = write_qwen3(tmp_path / "model", kind, **changes)
    model = load_reference(tmp_path / "model", trust=kind != "plain")
    assert type(model).__module__.startswith("transformers.models.qwen3_moe") == (kind == "plain")
    tokens = np.asarray(random_tokens(config, 2, LENGTH))
    difference = relative_difference(logits_of(config, params, tokens), reference_logits(model, tokens))
    print(f"{kind}: {difference:.2e}")
    assert difference < TOLERANCE


def test_logits_and_greedy_tokens_with_windows(written, model, tokens, theirs):
    _, config, params = written
    assert type(model).__name__ == "Qwen3MoePuzzleForCausalLM"
    difference = relative_difference(logits_of(config, params, tokens), theirs)
    print(f"puzzle: {difference:.2e}")
    assert difference < TOLERANCE
    expected = greedy_of(config, params, PROMPTS, STEPS, LENGTH)
    assert greedy(model) == expected
    assert greedy(model, use_cache=False) == expected
    assert greedy(model, cache_implementation="static") == expected
    assert len(set(map(tuple, expected))) == 2 and len(set(expected[0])) > 2  # not one token repeated


def test_the_comparison_would_see_a_wrong_window_or_gate(written, tokens, theirs):
    _, config, params = written
    wider = tuple(replace(block, window=block.window and block.window + 1) for block in config.blocks)
    for changes in ({"blocks": wider}, {"variant": replace(QWEN3_MOE, normalized_gates=False)}):
        assert relative_difference(logits_of(replace(config, **changes), params, tokens), theirs) > 3 * TOLERANCE


def test_every_layer_has_its_own_experts_and_window(written, model):
    _, config, _ = written
    for layer, block in zip(model.model.layers, config.blocks, strict=True):
        assert layer.self_attn.sliding_window == block.window
        assert hasattr(layer.mlp, "experts") == (block.num_experts > 0)
        if block.num_experts:
            assert layer.mlp.experts.gate_up_proj.shape == (block.num_experts, 128, 96)
    assert (model.config.num_experts, model.config.sliding_window) == (7, 17)


def test_nothing_is_missing_or_left_over(written):
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "trust_remote_code": True, "output_loading_info": True}
    _, info = cast(tuple[Any, dict[str, Any]], AutoModelForCausalLM.from_pretrained(written[0], **options))
    assert not any(info[kind] for kind in ("unexpected_keys", "missing_keys", "mismatched_keys"))


def test_cached_steps_give_the_logits_of_one_pass(model, tokens, theirs):
    """Decoding token by token past the point where windowed caches are full equals a single forward pass."""
    import torch

    cache, steps = None, []
    with torch.no_grad():
        for start, stop in [(0, 7), (7, 8), (8, 20), *((i, i + 1) for i in range(20, LENGTH))]:
            out = model(torch.tensor(tokens[:, start:stop]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert relative_difference(torch.cat(steps, 1).numpy(), theirs) < 1e-5


def test_packed_sequences_are_kept_apart(model, tokens, theirs):
    import torch

    packed = torch.tensor(tokens.reshape(1, -1))
    positions = torch.arange(LENGTH).repeat(2)[None]
    with torch.no_grad():
        out = model(packed, position_ids=positions, use_cache=False).logits.numpy()
    assert relative_difference(out.reshape(theirs.shape), theirs) < 1e-5


def test_attention_and_experts_may_be_computed_otherwise(written, tokens, theirs):
    model = load_reference(written[0], trust=True)
    layers = model.model.layers
    mixtures = [layer.mlp.experts for layer in layers if hasattr(layer.mlp, "experts")]
    assert {experts.config._experts_implementation for experts in mixtures} == {"grouped_mm"}  # as in the stock model
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in layers} == {"eager"}
    assert {experts.config._experts_implementation for experts in mixtures} == {"eager"}
    assert [experts.config.num_experts for experts in mixtures] == [len(experts.down_proj) for experts in mixtures]
    assert relative_difference(reference_logits(model, tokens), theirs) < 1e-5


def test_hidden_states_and_router_logits_can_be_recorded(written, model, tokens):
    import torch

    with torch.no_grad():
        out = model.model(torch.tensor(tokens), output_hidden_states=True, output_router_logits=True)
    counts = [block.num_experts for block in written[1].blocks]
    assert len(out.hidden_states) == len(counts) + 1
    assert [logits.shape[-1] for logits in out.router_logits] == [count for count in counts if count]


def test_bfloat16_and_the_bare_model(written, tokens, theirs):
    import torch
    from transformers import AutoModel

    model = load_reference(written[0], dtype="auto", trust=True)
    assert model.dtype == torch.bfloat16
    # Rounding may route a token to other experts, so single logits may be far off; most are close.
    assert np.median(np.abs(theirs - reference_logits(model, tokens))) < 0.02 * np.abs(theirs).max()
    bare = AutoModel.from_pretrained(written[0], dtype=torch.float32, trust_remote_code=True)
    assert type(bare).__name__ == "Qwen3MoePuzzleModel"
    with torch.no_grad():
        assert bare(torch.tensor(tokens)).last_hidden_state.shape == (2, LENGTH, 96)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(written, tokens, theirs, device_map):
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "trust_remote_code": True, "device_map": device_map}
    placed = AutoModelForCausalLM.from_pretrained(written[0], **options).eval()
    np.testing.assert_array_equal(reference_logits(placed, tokens), theirs)


def test_transformers_saves_what_it_can_load(written, model, tokens, theirs, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    data, before = (json.loads((at / "config.json").read_text()) for at in (tmp_path / "saved", written[0]))
    assert data["block_configs"] == before["block_configs"]
    again = load_reference(tmp_path / "saved", trust=True)
    np.testing.assert_array_equal(reference_logits(again, tokens), theirs)
