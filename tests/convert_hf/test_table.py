import pytest

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.convert_hf.table import bytes_by_part, checkpoint_tensors, expert_bytes, tensor_bytes
from puzzle_jax.errors import ConfigError
from puzzle_jax.model.spec import count_params
from tests.convert_hf.checkpoints import MIXED, packable_config, stored_bytes, write_random
from tests.support import small_config


def gpt_oss(layers: int, experts: int) -> ModelConfig:
    blocks = tuple(BlockConfig(experts, None if layer % 2 else 128) for layer in range(layers))
    return ModelConfig(201_088, 2880, 2880, 64, 8, 64, 4, blocks)


@pytest.mark.parametrize("layers, experts, total", [(24, 32, 13_761_264_768), (36, 128, 65_248_815_744)])
def test_published_sizes(layers, experts, total):
    assert tensor_bytes(gpt_oss(layers, experts), "mxfp4") == total
    assert expert_bytes(gpt_oss(layers, experts), "mxfp4") == 13_236_480


def test_one_more_expert_costs_its_bytes_and_its_row_of_the_router():
    small, large = (
        packable_config(),
        packable_config(tuple(BlockConfig(8, b.window) for b in packable_config().blocks)),
    )
    for form in ("mxfp4", "bf16"):
        router_row = 2 * (small.hidden_size + 1)
        grown = tensor_bytes(large, form) - tensor_bytes(small, form)
        assert grown == small.num_layers * (expert_bytes(small, form) + router_row)


def test_bf16_form_counts_two_bytes_per_parameter():
    config = small_config(MIXED)
    assert tensor_bytes(config, "bf16") == 2 * count_params(config)


@pytest.mark.parametrize("form", ["mxfp4", "bf16"])
def test_predicted_bytes_are_the_bytes_on_disk(tmp_path, form):
    config = packable_config(MIXED)
    stored = stored_bytes(write_random(tmp_path / "model", config, form))
    assert tensor_bytes(config, form) == sum(map(len, stored.values()))
    assert {spec.name: spec.nbytes for spec in checkpoint_tensors(config, form)} == {
        name: len(data) for name, data in stored.items()
    }


def test_parts_sum_to_the_whole():
    config = packable_config(MIXED)
    parts = bytes_by_part(config, "mxfp4")
    assert parts.total == tensor_bytes(config, "mxfp4")
    assert [layer.experts for layer in parts.layers] == [
        block.num_experts * expert_bytes(config, "mxfp4") for block in config.blocks
    ]
    assert parts.experts == sum(layer.experts for layer in parts.layers)
    # q and o: hidden x 60, k and v: hidden x 30, biases 60 + 30 + 30 + hidden, one sink per head
    hidden = config.hidden_size
    assert parts.layers[0].attention == 2 * (2 * hidden * 60 + 2 * hidden * 30 + 120 + hidden + 6)
    assert parts.layers[0].router == 2 * 5 * (hidden + 1)
    assert parts.layers[0].norm == 2 * 2 * hidden
    assert parts.embedding == parts.head == 2 * 97 * hidden


def test_impossible_forms_are_refused():
    with pytest.raises(ConfigError, match=r"hidden_size is 40, but MXFP4 experts need a multiple of 32"):
        checkpoint_tensors(small_config(), "mxfp4")
