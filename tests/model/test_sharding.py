"""Training meshes: how parameters, optimiser state and batches are sharded, and that the model computes the same."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from puzzle_jax.config import BlockConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.network import hidden_states
from puzzle_jax.model.sharding import (
    fully_sharded,
    make_training_mesh,
    on_mesh,
    rows_sharding,
    stacked_sharding,
)
from tests.support import random_params, random_tokens, small_config

MESH = make_training_mesh(2, 2, 2)
# 12 heads, 4 key-value heads and 8 experts, all of which the axes divide.
CONFIG = small_config(blocks=(BlockConfig(8, 5), BlockConfig(8, None)), num_heads=12, num_kv_heads=4)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_axes_and_devices_of_a_training_mesh():
    mesh = make_training_mesh(1, 2, 3)
    assert dict(mesh.shape) == {"data": 1, "sequence": 2, "model": 3}
    assert [device.id for device in mesh.devices.flat] == [device.id for device in jax.devices()[:6]]


def test_meshes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="mesh of 3 x 1 x 3 needs 9 devices, but 8 are present"):
        make_training_mesh(3, 1, 3)
    with pytest.raises(ConfigError, match="mesh of 2 x 0 x 2 needs 0 devices"):
        make_training_mesh(2, 0, 2)
    hosts = [SimpleNamespace(process_index=process) for process in (0, 0, 1, 1)]
    with pytest.raises(ConfigError, match=r"takes 2 of 4 devices, but .* process 1 would have none"):
        make_training_mesh(2, 1, 1, hosts)


@pytest.mark.parametrize(
    "sizes,spec,piece",
    [
        ((24, 40), (None, ("model", "sequence", "data")), (24, 5)),  # the larger of two dimensions that 8 divides
        ((48, 40), (("model", "sequence", "data"), None), (6, 40)),
        ((7, 24, 5), (None, ("model", "sequence", "data"), None), (7, 3, 5)),
        ((4, 6), (("model", "sequence"), "data"), (1, 3)),  # 8 divides neither
        ((10, 6), ("model", "sequence"), (5, 3)),  # at most 4 devices divide it
        ((12, 9), (("model", "sequence"), None), (3, 9)),  # 4 devices, in one dimension rather than two
        ((7, 9), (None, None), (7, 9)),
        ((), (), ()),
        ((0, 8), (None, ("model", "sequence", "data")), (0, 1)),
    ],
)
def test_arrays_are_cut_over_as_many_devices_as_divide_them(sizes, spec, piece):
    sharding = fully_sharded({"weight": shape(*sizes), "frozen": None}, MESH)["weight"]
    assert sharding.spec == PartitionSpec(*spec)
    assert sharding.shard_shape(sizes) == piece


def test_axes_of_one_device_cut_nothing():
    mesh = make_training_mesh(4, 1, 2)
    assert fully_sharded(shape(3, 16), mesh).spec == PartitionSpec(None, ("model", "data"))
    assert fully_sharded(shape(4, 2), make_training_mesh(1, 1, 1)).spec == PartitionSpec(None, None)


def test_rows_and_positions():
    assert rows_sharding(MESH).shard_shape((6, 10)) == (3, 5)


def test_stacked_layers_are_cut_behind_their_first_axis():
    """The model axis shards heads, experts and vocabulary where it divides them; it does not divide 97 tokens."""
    params = random_params(CONFIG)
    run = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])
    run["moe"]["down"] = None  # not trained
    stacked = {**{name: params[name] for name in ("embedding", "final_norm")}, "runs": [[run]], "head": None}
    shardings = stacked_sharding(stacked, CONFIG, MESH)
    assert shardings["embedding"].spec == PartitionSpec(None, None) and shardings["head"] is None
    attention, moe = (shardings["runs"][0][0][block] for block in ("attention", "moe"))
    assert attention["q_weight"].spec == PartitionSpec(None, None, "model")
    assert attention["o_weight"].spec == PartitionSpec(None, "model", None)
    assert attention["sinks"].spec == PartitionSpec(None, "model")
    assert moe["gate_up"].spec == PartitionSpec(None, "model", None, None)
    assert moe["router_weight"].spec == PartitionSpec(None, None, None) and moe["down"] is None
    placed = jax.device_put(stacked, shardings)["runs"][0][0]["moe"]["gate_up"]
    assert placed.shape == (2, 8, 40, 48) and placed.addressable_shards[0].data.shape == (2, 4, 40, 48)
    # A run's own number of experts counts, not the configuration's: 7 are not divided.
    few = {"runs": [[{"moe": {"gate_up": shape(3, 7, 40, 48)}}]]}
    assert stacked_sharding(few, CONFIG, MESH)["runs"][0][0]["moe"]["gate_up"].spec == PartitionSpec(*[None] * 4)


def test_packed_experts_are_cut_between_experts():
    packed = object.__new__(MXFP4)  # bypasses the shape checks, which are for one layer
    object.__setattr__(packed, "codes", shape(3, 8, 48, 16))
    object.__setattr__(packed, "scales", shape(3, 8, 48, 1))
    sharding = stacked_sharding({"runs": [[{"moe": {"gate_up": packed}}]]}, CONFIG, MESH)["runs"][0][0]["moe"][
        "gate_up"
    ]
    assert sharding.shard_shape((3, 8, 48, 16)) == (3, 4, 48, 16)


def test_the_model_computes_on_a_training_mesh_what_it_does_on_one_device():
    """Positions, heads and experts are sharded; parameters start sharded over all devices."""
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 4, 24)
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, tokens.shape)))

    def run(params, tokens, segments):
        x, auxes = hidden_states(params, CONFIG, tokens, segment_ids=segments)
        return x, [aux.routing for aux in auxes]

    expected = jax.jit(run)(params, tokens, segments)
    rows = jax.device_put((tokens, segments), rows_sharding(MESH))
    with on_mesh(MESH):
        found = jax.jit(run)(jax.device_put(params, fully_sharded(params, MESH)), *rows)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(jax.device_get(one), other, atol=2e-5)
