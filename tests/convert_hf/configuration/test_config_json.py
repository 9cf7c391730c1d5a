import json
from dataclasses import replace
from pathlib import Path

import pytest

from puzzle_jax.config import BlockConfig, RopeConfig
from puzzle_jax.convert_hf.configuration.config_json import is_plain, parse_config, parse_form, write_config
from puzzle_jax.errors import CheckpointError
from tests.convert_hf.checkpoints import MIXED
from tests.support import small_config

SOURCE = Path("model/config.json")


def plain(**changes: object) -> dict:
    """The config.json of a small gpt_oss model; None deletes a key."""
    data = {**write_config(small_config(), {}), **changes}
    return {name: value for name, value in data.items() if value is not None}


def puzzle(**changes: object) -> dict:
    return {**write_config(small_config(MIXED), {}), **changes}


CONFIGS = {
    "plain": small_config(),
    "one layer": small_config((BlockConfig(3, 8),)),
    "mixed": small_config(MIXED),
    "all full": small_config((BlockConfig(4), BlockConfig(4))),
    "swapped": small_config((BlockConfig(4), BlockConfig(4, 6))),
    "truncate": small_config(rope=RopeConfig(20_000.0, 8.0, 16.0, 2.0, 64, True), max_position=99, rms_norm_eps=1e-4),
    "no scaling": small_config(rope=RopeConfig(factor=1.0)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_round_trip(config):
    data = json.loads(json.dumps(write_config(config, {})))
    assert parse_config(data, SOURCE) == config


@pytest.mark.parametrize(
    "name, expected",
    [("plain", True), ("one layer", True), ("mixed", False), ("all full", False), ("swapped", False)],
)
def test_only_the_alternation_of_the_published_models_is_written_as_gpt_oss(name, expected):
    data = write_config(CONFIGS[name], {})
    assert is_plain(CONFIGS[name]) is expected
    assert data["model_type"] == ("gpt_oss" if expected else "gpt_oss_puzzle")
    for key in ("auto_map", "block_configs", "per_layer_config", "model_file"):
        assert (key in data) is not expected
    assert "model_file" not in write_config(CONFIGS["plain"], data)


def test_layers_are_told_in_the_sparse_schema_of_transformers_too():
    data = puzzle()
    del data["block_configs"]
    assert parse_config({**data, "model_type": "gpt_oss"}, SOURCE) == small_config(MIXED)
    told = {
        int(layer): {"num_local_experts": block.num_experts, "sliding_window": block.window}
        for layer, block in enumerate(MIXED)
    }
    largest = {
        "num_local_experts": max(block.num_experts for block in MIXED),
        "sliding_window": max(block.window or 0 for block in MIXED),
    }
    for layer, block in told.items():
        differs = {key: value for key, value in block.items() if value not in (None, largest[key])}
        assert data["per_layer_config"].get(str(layer), {}) == differs


def test_puzzle_form():
    data = puzzle()
    assert data["architectures"] == ["GptOssPuzzleForCausalLM"]
    assert data["block_configs"][1:3] == [
        {"num_local_experts": 7, "sliding_window": None},
        {"num_local_experts": 4, "sliding_window": 5},
    ]
    assert data["layer_types"] == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "sliding_attention",
    ]
    assert data["sliding_window"] == 9 and data["num_local_experts"] == 7  # the largest
    assert set(data["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_base_keys_are_kept_and_ours_replaced():
    base = {
        "eos_token_id": [3, 4],
        "rope_parameters": {"rope_type": "yarn"},
        "block_configs": [],
        "hidden_size": 1,
    }
    data = write_config(small_config(), base, form="mxfp4")
    assert data["eos_token_id"] == [3, 4] and data["hidden_size"] == 40
    assert "rope_parameters" not in data and "block_configs" not in data
    assert data["quantization_config"]["quant_method"] == "mxfp4" and "dequantize" not in data["quantization_config"]
    assert write_config(small_config(MIXED), data)["quantization_config"]["dequantize"] is True
    assert "quantization_config" not in write_config(small_config(), data, form="bf16")
    assert base["hidden_size"] == 1


def test_rope_parameters_of_transformers_5():
    old = plain()
    scaling, theta = old.pop("rope_scaling"), old.pop("rope_theta")
    inside = parse_config({**old, "rope_parameters": {**scaling, "rope_theta": theta}}, SOURCE)
    beside = parse_config({**old, "rope_parameters": scaling, "rope_theta": theta}, SOURCE)
    default = parse_config({**old, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, SOURCE)
    assert inside == beside == small_config()
    assert default.rope == RopeConfig(theta=500.0, factor=1.0)


def test_rotary_fields_that_are_missing_have_the_values_of_transformers():
    scaling = {"type": "yarn", "factor": 4.0}
    rope = parse_config(plain(rope_scaling=scaling, initial_context_length=None), SOURCE).rope
    assert rope == RopeConfig(10_000.0, 4.0, 32.0, 1.0, plain()["max_position_embeddings"], truncate=True)
    beside = plain(rope_scaling=scaling, initial_context_length=None, original_max_position_embeddings=32)
    assert parse_config(beside, SOURCE).rope == replace(rope, original_context=32)
    assert parse_config(plain(rope_scaling=None), SOURCE).rope == RopeConfig(10_000.0, 32.0, 32.0, 1.0, 4096, False)
    assert parse_config(plain(rope_theta=None), SOURCE).rope.theta == 150_000.0


def test_what_is_written_contradicts_nothing_that_the_base_says():
    base = {"num_experts": 9, "original_max_position_embeddings": 7, "partial_rotary_factor": 1.0}
    assert parse_config(write_config(small_config(), base), SOURCE) == small_config()


def test_the_names_of_experts_per_token():
    assert parse_config(plain(experts_per_token=None), SOURCE).experts_per_token == 2
    four = plain(num_experts_per_tok=None, experts_per_token=4)
    assert parse_config(four, SOURCE).experts_per_token == 4


def test_either_name_of_the_number_of_experts():
    data = plain()
    count = data.pop("num_local_experts")
    assert parse_config({**data, "num_experts": count}, SOURCE) == small_config()


def test_layer_types_default_to_the_alternation():
    assert parse_config(plain(layer_types=None), SOURCE) == small_config()
    types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    windows = [block.window for block in parse_config(plain(layer_types=types), SOURCE).blocks]
    assert windows == [None, None, 5, None]


def scaled(**changes: object) -> dict:
    return plain(rope_scaling={**plain()["rope_scaling"], **changes})


BAD = [
    (plain(per_layer_config={"9": {}}), r"per_layer_config has the key '9', but there are layers 0 to \d"),
    (plain(per_layer_config={"0": {"head_dim": 3}}), r"per_layer_config.0.head_dim is 3, but only num_local_experts"),
    (
        puzzle(per_layer_config={"1": {"num_local_experts": 3}}),
        r"per_layer_config.1.num_local_experts is 3, but block_configs\[1\] has 7; they must be equal",
    ),
    (plain(model_type="llama"), r"model_type is 'llama', but only gpt_oss, gpt_oss_puzzle, qwen3_moe and qwen3_moe_pu"),
    (plain(model_type=None), r"model_type is missing"),
    (plain(hidden_size=None), r"hidden_size is missing, but must be a whole number"),
    (plain(hidden_size="40"), r"hidden_size is '40', but must be a whole number"),
    (plain(num_hidden_layers=True), r"num_hidden_layers is True"),
    (plain(num_local_experts=0), r"num_local_experts is 0"),
    (plain(num_attention_heads=7), r"num_heads is 7, but must be a multiple of num_kv_heads \(3\)"),
    (plain(rms_norm_eps="small"), r"rms_norm_eps is 'small', but must be a number"),
    (plain(num_local_experts=1), r"layer 0 has num_experts 1"),
    (plain(experts_per_token=3), r"num_experts_per_tok is 2, but experts_per_token is 3"),
    (plain(num_experts_per_tok=None, experts_per_token=None), r"num_experts_per_tok is missing"),
    (
        plain(num_experts_per_tok=None),
        r"num_experts_per_tok is missing, for which transformers takes 4, but experts_per_token is 2; write",
    ),
    (plain(num_experts=3), r"num_local_experts is 7, but num_experts is 3; they must be equal"),
    ({**plain(), "rms_norm_eps": None}, r"rms_norm_eps is None, but must be a number"),
    ({**plain(), "max_position_embeddings": None}, r"max_position_embeddings is None, but must be a whole number"),
    (plain(transformers_weights="a.bin"), r"transformers_weights is 'a.bin', but only model.safetensors or"),
    (plain(sliding_window=None), r"sliding_window is missing"),
    (plain(layer_types=["full_attention"]), r"one entry for each of the 4 layers"),
    (plain(layer_types=["full_attention"] * 3 + ["chunked"]), r"layer_types\[3\] is 'chunked'"),
    (plain(tie_word_embeddings=True), r"tie_word_embeddings is True, but only false"),
    (plain(attention_bias=False), r"attention_bias is False, but only true"),
    (plain(swiglu_alpha=1.0), r"swiglu_alpha is 1.0, but only 1.702"),
    ({**plain(), "rope_theta": None}, r"rope_theta is None, but must be a number from 1e-12 to 1e\+12"),
    ({**plain(), "rope_scaling": None}, r"rope_scaling is None, but releases of transformers differ"),
    (plain(rope_scaling={}), r'rope_scaling is {}, but .*; {"rope_type": "default"} is no scaling'),
    (plain(rope_scaling=None, rope_parameters={}), r"rope_parameters is {}, but must have rope_type"),
    (plain(original_max_position_embeddings=9), r"rope_scaling.original_max_position_embeddings is 32, but .* is 9"),
    (plain(partial_rotary_factor=0.5), r"partial_rotary_factor is 0.5, but only rotary embeddings of whole heads"),
    (
        plain(rope_parameters={**plain()["rope_scaling"], "factor": 9.0}),
        r"rope_scaling and rope_parameters contradict each other \(factor is 4.0 and 9.0\); remove the one",
    ),
    (
        plain(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        r"rope_scaling.original_max_position_embeddings is missing, for which transformers takes 512, "
        r"but initial_context_length is 32; write it into rope_scaling",
    ),
    (plain(rope_scaling="yarn"), r"rope_scaling is 'yarn', but must be an object"),
    (scaled(rope_type="llama3"), r"rope_scaling.rope_type is 'llama3', but only yarn and default"),
    (scaled(factor=None), r"rope_scaling.factor is None, but must be a number"),
    (scaled(rope_theta=7.0), r"rope_scaling.rope_theta is 7.0, but rope_theta beside it is 10000.0; they"),
    (scaled(full_attention={}), r"rope_scaling.full_attention is {}, but only one setting for all layers"),
    (scaled(partial_rotary_factor=0.25), r"rope_scaling.partial_rotary_factor is 0.25"),
    (scaled(truncate=None), r"rope_scaling.truncate is None, but must be true or false"),
    (scaled(original_max_position_embeddings=None), r"rope_scaling.original_max_position_embeddings is None"),
    (scaled(beta_fast=0), r"rope_scaling.beta_fast is 0, but must be a number from 1e-12"),
    (plain(rope_scaling={"factor": 4.0}), r"rope_scaling.rope_type is None, but it must be given"),
    (scaled(factor=0.5), r"rope factor is 0.5"),
    (scaled(truncate="no"), r"rope_scaling.truncate is 'no', but must be true or false"),
    (scaled(attention_factor=2.0), r"rope_scaling.attention_factor is 2.0, but only YaRN's own, 1.138629"),
    (scaled(mscale=1.0), r"rope_scaling.mscale is 1.0"),
    (puzzle(block_configs=None), r"block_configs is None, but must be a list"),
    (puzzle(block_configs=puzzle()["block_configs"][:2]), r"one entry for each of the 4 layers"),
    (
        puzzle(block_configs=[{"ffn": {}}] * 4),
        r"block_configs\[0\] is {'ffn': {}}, but must be an object with",
    ),
    (puzzle(block_configs=[{"num_local_experts": 2, "sliding_window": -1}] * 4), r"sliding_window is -1"),
    (
        puzzle(layer_types=["full_attention"] * 4),
        r"layer_types\[0\] is 'full_attention', but block_configs\[0\]",
    ),
    (
        {name: value for name, value in puzzle().items() if name != "layer_types"},
        r"layer_types\[3\] is 'full_attention', as it is taken to be where layer_types is missing, but block_configs",
    ),
]


@pytest.mark.parametrize("data, message", BAD, ids=[message[:50] for _, message in BAD])
def test_bad_configurations_name_file_field_and_value(data, message):
    with pytest.raises(CheckpointError, match=r"^model/config\.json: .*" + message) as caught:
        parse_config(data, SOURCE)
    assert "\n" not in str(caught.value)


def quantised(method: str) -> dict:
    return {"model_type": "gpt_oss", "quantization_config": {"quant_method": method}}


def test_quantisation_methods():
    assert parse_form({"model_type": "gpt_oss"}, SOURCE) == "bf16"
    assert parse_form(quantised("mxfp4"), SOURCE) == "mxfp4"
    with pytest.raises(CheckpointError, match=r"quantization_config.quant_method is 'awq', but only mxfp4"):
        parse_form(quantised("awq"), SOURCE)


def test_a_childs_own_yarn_factor_is_written():
    longer = replace(small_config(), rope=replace(small_config().rope, factor=16.0))
    assert write_config(longer, plain())["rope_scaling"]["factor"] == 16.0
