"""Exported children, as a user of transformers loads and runs them."""

import json
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.child import Child, ChildBlock
from puzzle_jax.model.network import forward, to_compute
from puzzle_jax.tasks.chat.embedded import write_chat_files
from tests.convert_hf.checkpoints import packable_config, write_random
from tests.parity.reference import (
    TOLERANCE,
    load_reference,
    our_greedy,
    our_logits,
    reference_logits,
    relative_difference,
)
from tests.support import random_tokens

pytestmark = pytest.mark.parity

STEPS = 14
PROMPTS = ([5, 17, 3, 88, 41, 9, 60, 2, 33, 71, 12], [7, 7, 90])  # longer and shorter than the windows


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("models") / "parent", packable_config())


@pytest.fixture(scope="module")
def child(parent) -> Child:
    config = packable_config()
    kept = ((0, 2, 3, 5, 6), tuple(range(7)), (1, 4), (0, 5, 6))
    return Child(config, tuple(map(ChildBlock, kept, (5, 9, 5, None))))


@pytest.fixture(scope="module")
def exported(parent, child):
    out = parent.parent / "child"
    export_child(parent, out, child.config, child.kept, provenance={})
    return out


@pytest.fixture(scope="module")
def model(exported):
    return load_reference(exported, trust=True)


def left_padded(prompts, pad=1):
    longest = max(map(len, prompts))
    tokens = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return tokens, mask


def generate(model, prompts, **options):
    """Greedy continuations of a left-padded batch."""
    import torch

    tokens, mask = left_padded(prompts)
    settings = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 1,
        **options,
    }
    out = model.generate(torch.tensor(tokens), attention_mask=torch.tensor(mask), **settings)
    return out[:, len(tokens[0]) :].tolist()


def test_the_exported_child_computes_what_the_view_on_its_parent_does(parent, child, model):
    tokens = random_tokens(child.parent, 2, 40)
    whole = load_checkpoint(parent, dtype=jnp.float32)
    masks, windows = child.view
    view = {"expert_masks": list(masks), "windows": [jnp.broadcast_to(w, (2,)) for w in windows]}
    run = jax.jit(lambda params, tokens: forward(params, child.parent, tokens, **view))
    viewed = np.asarray(run(to_compute(whole.params, jnp.float32), tokens))
    difference = relative_difference(viewed, reference_logits(model, np.asarray(tokens)))
    print(f"view against exported child: {difference:.2e}")
    assert difference < TOLERANCE


def test_greedy_generation_with_left_padding(exported, model):
    expected = [our_greedy(exported, prompt, STEPS) for prompt in PROMPTS]
    assert generate(model, PROMPTS) == expected
    assert generate(model, PROMPTS, use_cache=False) == expected
    assert generate(model, PROMPTS, cache_implementation="static") == expected
    assert len(set(map(tuple, expected))) == 2 and len(set(expected[0])) > 2  # not one token repeated


def test_tokenizer_and_template_come_along(tmp_path):
    """Tokenizer, chat template and model all load from the exported directory alone, as a user would load them."""
    from transformers import AutoTokenizer

    config = packable_config(vocab_size=128)
    parent = write_random(tmp_path / "parent", config)
    write_chat_files(parent)
    blocks = (BlockConfig(3, 5), BlockConfig(7, None), BlockConfig(4, 5), BlockConfig(7, 9))
    kept = [range(block.num_experts) for block in blocks]
    export_child(parent, tmp_path / "child", config.with_blocks(blocks), kept, provenance={})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "child", trust_remote_code=True)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1"}], reasoning_effort="low", add_generation_prompt=True, return_tensors="pt"
    )
    prompt = inputs["input_ids"][0].tolist()
    expected = "<|start|>system<|message|>Reasoning: low<|end|><|start|>user<|message|>1 + 1<|end|><|start|>assistant"
    assert tokenizer.decode(prompt) == expected
    model = load_reference(tmp_path / "child", trust=True)
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert out[0, len(prompt) :].tolist() == our_greedy(tmp_path / "child", prompt, 6)


def test_cached_steps_give_the_logits_of_one_pass(model):
    """Decoding token by token past the point where windowed caches are full equals a single forward pass."""
    import torch

    tokens = torch.tensor(np.asarray(random_tokens(packable_config(), 2, 33)))
    with torch.no_grad():
        whole, cache, steps = model(tokens).logits, None, []
        for start, stop in [(0, 7), (7, 8), (8, 20), *((i, i + 1) for i in range(20, 33))]:
            out = model(tokens[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert relative_difference(torch.cat(steps, 1).numpy(), whole.numpy()) < 1e-5


def test_hidden_states_can_be_recorded(model, child):
    import torch

    with torch.no_grad():
        out = model(torch.tensor([PROMPTS[0]]), output_hidden_states=True)
    assert len(out.hidden_states) == child.config.num_layers + 1


def test_bfloat16_and_the_bare_model(exported):
    import torch
    from transformers import AutoModel

    model = load_reference(exported, dtype="auto", trust=True)
    assert model.dtype == torch.bfloat16
    tokens = np.asarray(random_tokens(packable_config(), 1, 20))
    exact, rounded = our_logits(exported, tokens), reference_logits(model, tokens)
    # Rounding may route a token to other experts, so single logits may be far off; most are close.
    assert np.median(np.abs(exact - rounded)) < 0.02 * np.abs(exact).max()
    assert all(len(row) == STEPS for row in generate(model, PROMPTS))
    bare = AutoModel.from_pretrained(exported, dtype=torch.float32, trust_remote_code=True)
    assert type(bare).__name__ == "GptOssPuzzleModel"
    with torch.no_grad():
        assert bare(torch.tensor(tokens)).last_hidden_state.shape == (1, 20, 96)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(exported, model, device_map):
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "trust_remote_code": True, "device_map": device_map}
    placed = AutoModelForCausalLM.from_pretrained(exported, **options).eval()
    tokens = np.asarray(random_tokens(packable_config(), 2, 20))
    np.testing.assert_array_equal(reference_logits(placed, tokens), reference_logits(model, tokens))
    assert generate(placed, PROMPTS) == generate(model, PROMPTS)


def test_scales_of_an_fp8_cache_are_passed_over_in_silence(parent, child, model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    scales = KVScales(jnp.full(4, 0.5), jnp.full(4, 0.25))
    export_child(parent, tmp_path / "child", child.config, child.kept, provenance={}, kv_scales=scales)
    options = {"dtype": torch.float32, "trust_remote_code": True, "output_loading_info": True}
    loaded, info = cast(tuple[Any, dict[str, Any]], AutoModelForCausalLM.from_pretrained(tmp_path / "child", **options))
    assert not any(info[kind] for kind in ("unexpected_keys", "missing_keys", "mismatched_keys"))
    tokens = np.asarray(random_tokens(packable_config(), 1, 20))
    np.testing.assert_array_equal(reference_logits(loaded.eval(), tokens), reference_logits(model, tokens))


def test_configuration_by_layer(exported, child, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    for layer, block in enumerate(child.config.blocks):
        one = config.get_gpt_oss_config_for_layer(layer)
        assert (one.num_local_experts, one.sliding_window) == (block.num_experts, block.window)
        said = config.block_configs[layer]
        assert (said.num_local_experts, said.sliding_window) == (block.num_experts, block.window)
    assert (config.num_local_experts, config.sliding_window) == (7, 9)
    config.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["block_configs"] == json.loads((exported / "config.json").read_text())["block_configs"]


@pytest.mark.parametrize("form", ["mxfp4", "bf16"])
def test_a_homogeneous_child_needs_no_remote_code(tmp_path, form):
    parent = write_random(tmp_path / "parent", packable_config(), form)
    config: ModelConfig = packable_config(tuple(BlockConfig(3, b.window) for b in packable_config().blocks))
    kept = ((0, 1, 5), (2, 3, 4), (0, 3, 6), (1, 2, 6))
    export_child(parent, tmp_path / "child", config, kept, provenance={})
    model = load_reference(tmp_path / "child")
    tokens = np.asarray(random_tokens(config, 2, 40))
    assert relative_difference(our_logits(tmp_path / "child", tokens), reference_logits(model, tokens)) < TOLERANCE
    assert generate(model, PROMPTS[:1]) == [our_greedy(tmp_path / "child", PROMPTS[0], STEPS)]
