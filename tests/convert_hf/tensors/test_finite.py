"""Non-finite values are found anywhere in a tensor, and refused by its name wherever weights are read."""

import ml_dtypes
import numpy as np
import pytest

from puzzle_jax.convert_hf.child_of import load_delta
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import export_child, save_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.tensors.finite import _PIECE_BYTES, all_finite
from puzzle_jax.errors import CheckpointError, PuzzleError
from puzzle_jax.model.sharding import make_mesh
from tests.convert_hf.checkpoints import packable_config, rewrite, write_random
from tests.support import random_params, small_config

BF16 = np.dtype(ml_dtypes.bfloat16)
SIXTEEN_BITS = np.arange(2**16, dtype=np.uint16)


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)])
def test_every_value_of_sixteen_bits(dtype):
    values = SIXTEEN_BITS.view(dtype)
    finite = np.isfinite(values.astype(np.float32))
    assert all_finite(values[finite])
    assert [all_finite(values[i : i + 1]) for i in range(0, 2**16, 7)] == finite[::7].tolist()


def test_values_of_float32_are_finite_in_bfloat16_too():
    patterns = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32)
    edge = np.array([0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0x7FC00000, 0, 1], np.uint32)
    values = np.concatenate([patterns, edge, edge | 0x80000000]).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.isfinite(values.astype(BF16).astype(np.float32))
    assert [all_finite(value[None]) for value in values] == expected.tolist()
    assert all_finite(values[expected])


@pytest.mark.parametrize("place", [0, _PIECE_BYTES // 2 - 1, _PIECE_BYTES // 2, 3 * _PIECE_BYTES // 2 + 6])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_value_among_many(place, value):
    values = np.linspace(-3, 3, 3 * _PIECE_BYTES // 2 + 7).astype(BF16)
    assert all_finite(values)
    values[place] = value
    assert not all_finite(values) and not all_finite(values[None, ::-1])


def test_shapes_and_types_without_floats():
    assert all_finite(np.zeros((0, 3), BF16)) and all_finite(np.zeros((), np.float32))
    assert not all_finite(np.array(np.nan, np.float32)) and not all_finite(np.array([np.inf]))
    assert all_finite(np.array([255], np.uint8))


PLACES = {
    "model.embed_tokens.weight": (96, 95),
    "model.layers.2.self_attn.q_proj.weight": (0, 0),
    "model.layers.1.self_attn.sinks": (5,),
    "model.layers.3.mlp.experts.down_proj": (6, 63, 95),
    "model.layers.0.mlp.router.bias": (6,),
    "lm_head.weight": (3, 7),
}


def spoiled(directory, name: str, value: float, dtype=BF16) -> None:
    tensor = describe_checkpoint(directory).tensors[name].read().astype(dtype)
    tensor[PLACES[name]] = value
    rewrite(directory, **{name: tensor})


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("value, dtype", [(np.nan, BF16), (-np.inf, np.float16), (3.4e38, np.float32)])
def test_a_weight_that_is_not_finite_is_refused_by_tensor(tmp_path, name, value, dtype):
    model = write_random(tmp_path / "model", packable_config(), "bf16")
    spoiled(model, name, value, dtype)
    message = rf"model\.safetensors: {name} holds values that are not finite"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model)
    everything = [range(block.num_experts) for block in packable_config().blocks]
    with pytest.raises(CheckpointError, match=message):
        export_child(model, tmp_path / "child", packable_config(), everything, provenance={})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_every_process_finds_what_it_reads_itself(tmp_path):
    """Only the last device holds the last expert."""
    model = write_random(tmp_path / "model", packable_config(), "bf16")
    spoiled(model, "model.layers.3.mlp.experts.down_proj", np.nan)
    with pytest.raises(CheckpointError, match="down_proj holds values that are not finite"):
        load_checkpoint(model, mesh=make_mesh(1, 7))


def test_a_childs_own_values(tmp_path):
    parent = write_random(tmp_path / "parent", packable_config(), "bf16")
    config, everything = packable_config(), [range(block.num_experts) for block in packable_config().blocks]
    export_child(parent, tmp_path / "child", config, everything, provenance={})
    spoiled(tmp_path / "child", "lm_head.weight", np.nan)
    with pytest.raises(CheckpointError, match=r"lm_head.weight holds values that are not finite"):
        load_delta(parent, tmp_path / "child", ["head"])


@pytest.mark.parametrize("form", ["mxfp4", "bf16"])
@pytest.mark.parametrize("path", [("head",), ("layers", 2, "moe", "gate_up"), ("layers", 0, "attention", "sinks")])
def test_parameters_that_are_not_finite_are_not_written(tmp_path, form, path):
    params = random_params(packable_config())
    node = params
    for key in path[:-1]:
        node = node[key]
    values = np.array(node[path[-1]])
    values[(-1,) * values.ndim] = np.inf
    node[path[-1]] = values
    with pytest.raises(PuzzleError, match=rf"{'.'.join(map(str, path))} holds values that are not finite"):
        save_checkpoint(tmp_path / "out", packable_config(), params, config_base={}, form=form)
    assert not list(tmp_path.iterdir())


def test_finite_weights_are_what_they_were(tmp_path):
    model = write_random(tmp_path / "model", small_config(), "bf16")
    largest = ml_dtypes.finfo(ml_dtypes.bfloat16).max
    name = "model.norm.weight"
    rewrite(model, **{name: np.full(40, largest, BF16)})
    assert (np.asarray(load_checkpoint(model).params["final_norm"]) == largest).all()
