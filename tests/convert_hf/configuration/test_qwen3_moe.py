"""config.json of Qwen3-MoE: what is read, what is refused, and what children are written as."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from puzzle_jax.config import QWEN3_MOE, BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.convert_hf.configuration.config_json import is_plain, parse_config, parse_form, write_config
from puzzle_jax.convert_hf.configuration.quantization import Modules, unquantized
from puzzle_jax.errors import CheckpointError
from tests.convert_hf.qwen import qwen_config

SOURCE = Path("model/config.json")
PUBLISHED = {  # Qwen3-30B-A3B
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PLAIN_ROPE = RopeConfig(theta=1e6, factor=1.0, original_context=40_960, truncate=True)
MIXED = (BlockConfig(7, 9), BlockConfig(0), BlockConfig(4, 5), BlockConfig(3))
YARN = RopeConfig(10_000.0, 4.0, 16.0, 2.0, 64, False)


def plain(**changes: object) -> dict:
    """The config.json of a small model; None deletes a key."""
    return {name: value for name, value in {**write_config(qwen_config(), {}), **changes}.items() if value is not None}


def puzzle(**changes: object) -> dict:
    return {**write_config(qwen_config(MIXED), {}), **changes}


CONFIGS = {
    "plain": qwen_config(),
    "all mixtures": qwen_config((BlockConfig(7),) * 3),
    "mixed": qwen_config(MIXED),
    "other counts": qwen_config((BlockConfig(3), BlockConfig(4))),
    "windowed": qwen_config((BlockConfig(3, 8), BlockConfig(3, 8))),
    "yarn": qwen_config(rope=YARN),
    "biases, tied": qwen_config(variant=replace(QWEN3_MOE, attention_bias=True, tied_head=True)),
    "gates not normalised": qwen_config(variant=replace(QWEN3_MOE, normalized_gates=False), rms_norm_eps=1e-4),
}


def test_the_published_model():
    config = parse_config(dict(PUBLISHED), SOURCE)
    assert config == ModelConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=768,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        experts_per_token=8,
        blocks=(BlockConfig(128),) * 48,
        rope=PLAIN_ROPE,
        max_position=40_960,
        rms_norm_eps=1e-6,
        swiglu_limit=None,
        variant=QWEN3_MOE,
    )
    written = write_config(config, dict(PUBLISHED))
    dropped = {"rope_scaling", "max_window_layers"}
    assert {**written, **{name: PUBLISHED[name] for name in dropped}} == {**PUBLISHED, "num_local_experts": 128}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_round_trip(config):
    data = json.loads(json.dumps(write_config(config, {})))
    assert parse_config(data, SOURCE) == config
    assert parse_config(json.loads(json.dumps(write_config(config, data))), SOURCE) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_only_full_attention_and_one_count_are_written_as_qwen3_moe(name):
    expected = name not in ("mixed", "other counts", "windowed")
    data = write_config(CONFIGS[name], {})
    assert is_plain(CONFIGS[name]) is expected
    assert data["model_type"] == ("qwen3_moe" if expected else "qwen3_moe_puzzle")
    assert data["architectures"] == ["Qwen3MoeForCausalLM" if expected else "Qwen3MoePuzzleForCausalLM"]
    for key in ("auto_map", "block_configs", "per_layer_config", "model_file", "layer_types"):
        assert (key in data) is not expected


def test_puzzle_form():
    data = puzzle()
    assert data["block_configs"] == [
        {"num_local_experts": 7, "sliding_window": 9},
        {"num_local_experts": 0, "sliding_window": None},
        {"num_local_experts": 4, "sliding_window": 5},
        {"num_local_experts": 3, "sliding_window": None},
    ]
    assert data["per_layer_config"] == {
        "2": {"num_local_experts": 4, "sliding_window": 5},
        "3": {"num_local_experts": 3},
    }
    assert data["mlp_only_layers"] == [1] and data["decoder_sparse_step"] == 1
    assert data["sliding_window"] == 9 and data["use_sliding_window"] and data["num_experts"] == 7  # the largest
    assert [kind.split("_")[0] for kind in data["layer_types"]] == ["sliding", "full", "sliding", "full"]
    assert data["auto_map"] == {
        "AutoConfig": "configuration_qwen3_moe_puzzle.Qwen3MoePuzzleConfig",
        "AutoModel": "modeling_qwen3_moe_puzzle.Qwen3MoePuzzleModel",
        "AutoModelForCausalLM": "modeling_qwen3_moe_puzzle.Qwen3MoePuzzleForCausalLM",
    }
    assert data["model_file"] == "mlx_qwen3_moe_puzzle.py"


def test_missing_fields_have_the_values_of_transformers():
    required = {
        *("model_type", "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "num_experts"),
    }
    few = parse_config({name: PUBLISHED[name] for name in required}, SOURCE)
    assert few == replace(
        parse_config(dict(PUBLISHED), SOURCE),
        head_dim=64,  # 2048 / 32
        rope=RopeConfig(theta=10_000.0, factor=1.0, original_context=32_768, truncate=True),
        max_position=32_768,
        variant=replace(QWEN3_MOE, normalized_gates=False),
    )
    dense = {name: PUBLISHED[name] for name in required} | {"mlp_only_layers": [3]}
    assert parse_config(dense, SOURCE).dense_size == 6144
    window = {name: PUBLISHED[name] for name in required} | {"use_sliding_window": True}
    assert {block.window for block in parse_config(window, SOURCE).blocks} == {4096}


@pytest.mark.parametrize(
    "fields, dense",
    [
        ({"decoder_sparse_step": 2, "mlp_only_layers": []}, {0, 2}),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2, 3]}, None),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 3, 3]}, {0, 3}),
        ({"decoder_sparse_step": 4, "mlp_only_layers": None}, {0, 1, 2}),
    ],
)
def test_dense_layers(fields, dense):
    data = {**plain(), **fields}
    if dense is None:
        with pytest.raises(CheckpointError, match=r"mlp_only_layers is \[2, 3\] and decoder_sparse_step 3, which make"):
            parse_config(data, SOURCE)
        return
    config = parse_config(data, SOURCE)
    assert {layer for layer, block in enumerate(config.blocks) if not block.num_experts} == dense
    assert config.dense_size == 130
    assert parse_config(write_config(config, data), SOURCE) == config


def test_either_name_of_the_number_of_experts():
    for name in ("num_experts", "num_local_experts"):
        assert parse_config(plain(**{name: None}), SOURCE) == qwen_config()


def test_windows_count_only_where_they_are_used():
    windowed = {**plain(), "use_sliding_window": True, "sliding_window": 6}
    assert {block.window for block in parse_config(windowed, SOURCE).blocks} == {6}
    assert parse_config({**windowed, "max_window_layers": 0}, SOURCE) == parse_config(windowed, SOURCE)
    for changes in ({"use_sliding_window": False}, {"sliding_window": None}):
        assert parse_config({**windowed, **changes, "max_window_layers": 3}, SOURCE) == qwen_config()


def test_rotary_settings():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    expected = RopeConfig(10_000.0, 4.0, 32.0, 1.0, 64, True)
    assert parse_config(plain(rope_scaling=yarn), SOURCE).rope == expected
    alone = {key: value for key, value in yarn.items() if not key.startswith("original")}
    assert parse_config(plain(rope_scaling=alone), SOURCE).rope == replace(expected, original_context=512)
    base = RopeConfig(500.0, 1.0, original_context=512, truncate=True)
    for told in (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": None},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "yarn", "factor": 1.0}},
        {"rope_theta": 500.0, "rope_parameters": {}},
    ):
        assert parse_config(plain(**told), SOURCE).rope == base, told


def test_a_childs_own_yarn_factor_is_written_and_plain_rope_is_none():
    longer = replace(qwen_config(), rope=replace(qwen_config().rope, factor=2.0))
    data = write_config(longer, plain())
    assert data["rope_scaling"]["factor"] == 2.0 and data["rope_scaling"]["truncate"] is True
    assert data["rope_scaling"]["original_max_position_embeddings"] == 512
    assert parse_config(data, SOURCE) == longer
    again = write_config(qwen_config(), {**data, "rope_parameters": {"rope_type": "yarn"}})
    assert not {"rope_scaling", "rope_parameters"} & set(again) and again["rope_theta"] == 10_000.0


BAD = [
    (plain(hidden_act="gelu"), r"hidden_act is 'gelu', but only silu is supported"),
    (plain(dual_chunk_attention_config={"chunk_size": 4}), r"dual_chunk_attention_config is {.*, but only null is"),
    (plain(num_experts=3), r"num_experts is 3, but num_local_experts is 7; they must be equal"),
    (plain(num_experts=None, num_local_experts=None), r"num_experts is missing, but must be a whole number"),
    (plain(moe_intermediate_size=None), r"moe_intermediate_size is missing"),
    (plain(norm_topk_prob="yes"), r"norm_topk_prob is 'yes', but must be true or false"),
    ({**plain(), "attention_bias": None}, r"attention_bias is None, but must be true or false"),
    (plain(mlp_only_layers=[4]), r"mlp_only_layers is \[4\], but must be a list of layers, which are 0 to 3"),
    (plain(mlp_only_layers=[True]), r"mlp_only_layers is \[True\], but must be a list of layers"),
    (plain(mlp_only_layers=1), r"mlp_only_layers is 1, but must be a list of layers"),
    (plain(decoder_sparse_step=0), r"decoder_sparse_step is 0, but must be a whole number of at least 1"),
    (plain(decoder_sparse_step=5), r"decoder_sparse_step 5, which make all 4 layers dense, but at least one"),
    (plain(intermediate_size=0), r"intermediate_size is 0, but must be a whole number"),
    (
        plain(use_sliding_window=True, sliding_window=4, max_window_layers=2),
        r"max_window_layers is 2, but use_sliding_window is true, and releases of transformers differ",
    ),
    (plain(use_sliding_window=True, sliding_window=0), r"sliding_window is 0, but must be a whole number"),
    (
        plain(layer_types=["full_attention"] * 3 + ["sliding_attention"]),
        r"layer_types is .*, but without block_configs every layer is full_attention, by use_sliding_window",
    ),
    (
        plain(per_layer_config={"1": {"num_local_experts": 3}}),
        r"layer 1 has 3 experts, but mlp_only_layers and decoder_sparse_step make it dense",
    ),
    (puzzle(mlp_only_layers=[]), r"layer 1 has 0 experts, but .* make it a mixture of experts"),
    (
        puzzle(per_layer_config={"1": {"num_local_experts": 3}}),
        r"per_layer_config.1.num_local_experts is 3, but block_configs\[1\] has 0; they must be equal",
    ),
    ({**puzzle(), "layer_types": None}, r"layer_types\[1\] is 'sliding_attention', as it is taken to be where"),
    (plain(head_dim=7), r"head_dim is 7, but rotary embeddings need an even number"),
    ({**plain(), "head_dim": None}, r"head_dim is None, but must be a whole number"),
    (plain(rope_scaling={"rope_type": "linear", "factor": 2.0}), r"rope_scaling.rope_type is 'linear', but only yarn"),
    (plain(num_experts_per_tok=8), r"layer 0 has num_experts 7, but at least experts_per_token \(8\)"),
]


@pytest.mark.parametrize("data, message", BAD, ids=[message[:50] for _, message in BAD])
def test_bad_configurations_name_file_field_and_value(data, message):
    with pytest.raises(CheckpointError, match=r"^model/config\.json: .*" + message) as caught:
        parse_config(data, SOURCE)
    assert "\n" not in str(caught.value)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
BAD_FP8 = [
    ({"quant_method": "awq"}, r"quant_method is 'awq', but only fp8 \(or no quantization_config\)"),
    ({"quant_method": "mxfp4"}, r"quant_method is 'mxfp4', but only fp8"),
    ({**FP8, "weight_block_size": None}, r"weight_block_size is None, but only \[128, 128\] is supported"),
    ({**FP8, "weight_block_size": [1, 128]}, r"weight_block_size is \[1, 128\], but only"),
    ({**FP8, "activation_scheme": "static"}, r"activation_scheme is 'static', but only dynamic"),
    ({**FP8, "scale_fmt": "ue8m0"}, r"scale_fmt is 'ue8m0', but only float"),
    ({**FP8, "modules_to_not_convert": "lm_head"}, r"modules_to_not_convert is 'lm_head', but must be a list of str"),
    (
        {**FP8, "modules_to_not_convert": ["a"], "ignored_layers": ["b"]},
        r"modules_to_not_convert and \.ignored_layers differ",
    ),
]


@pytest.mark.parametrize("quantization, message", BAD_FP8, ids=[message[:30] for _, message in BAD_FP8])
def test_other_quantisation_is_refused(quantization, message):
    with pytest.raises(CheckpointError, match=r"^model/config\.json: quantization_config\." + message):
        parse_form(plain(quantization_config=quantization), SOURCE)


def test_modules_that_stay_in_bf16():
    assert parse_form(plain(), SOURCE) == "bf16"
    names = ["lm_head", "model.layers.0.mlp.gate", "model.layers.2", "o_proj"]
    for key in ("modules_to_not_convert", "ignored_layers"):
        data = plain(quantization_config={**FP8, key: names})
        assert parse_form(data, SOURCE) == "fp8"
        found = unquantized(data, SOURCE)
        assert "model.layers.2.self_attn.q_proj" in found and "model.layers.1.self_attn.o_proj" in found
        assert "model.layers.0.mlp.gate" in found and "model.layers.0.mlp.gate_proj" not in found
        assert "model.layers.20.self_attn.q_proj" not in found and "model.layers.1.mlp.experts" not in found
    assert "a" not in Modules() and "a.b" in Modules() | ["a"]


def test_modules_are_added_to_the_list_that_the_parent_has():
    added = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    for key, before in (("modules_to_not_convert", ["lm_head"]), ("ignored_layers", ["lm_head", added[0]])):
        base = plain(quantization_config={**FP8, key: before})
        written = write_config(qwen_config(), base, form="fp8", unquantized=added)["quantization_config"]
        assert written == {**FP8, key: [*before, *(name for name in added if name not in before)]}
    base = plain(quantization_config=FP8)
    assert write_config(qwen_config(), base, form="fp8", unquantized=added)["quantization_config"] == {
        **FP8,
        "modules_to_not_convert": list(added),
    }
    mixed = write_config(qwen_config(MIXED), base, form="fp8")["quantization_config"]
    assert mixed == {**FP8, "dequantize": True}  # transformers builds quantised experts with one count only
    assert write_config(qwen_config(), {"quantization_config": mixed})["quantization_config"] == FP8
    assert "quantization_config" not in write_config(qwen_config(), base, form="bf16")
