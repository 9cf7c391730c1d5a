"""The table of tile sizes: which entry serves which device and size."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.kernels import tiles
from puzzle_jax.kernels.grouped_matmul import BLOCK_ROWS, grouped_matmul, mosaic_tpu
from puzzle_jax.kernels.platform import lowering_for
from tests.support import normal


@pytest.fixture
def table(tmp_path, monkeypatch):
    entries = {
        "op": [{"up_to": 8, "block": 16, "steps": 2}, {"up_to": 64, "block": 32}],
        "grouped_matmul.blocked": [{"up_to": 1000, "block": 24}],
    }
    gpu = {"grouped_matmul.mosaic_gpu.packed_block": [{"up_to": 4, "block": 8}, {"up_to": 9, "block": 24}]}
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({jax.local_devices()[0].device_kind: entries, tiles.KINDS["gpu"]: gpu}))
    monkeypatch.setattr(tiles, "TABLE", path)
    tiles._table.cache_clear()
    yield
    tiles._table.cache_clear()


def test_the_first_entry_that_is_large_enough_serves(table):
    asked = {size: tiles.tiles("op", size, block=4, steps=7) for size in (3, 8, 8.5, 64, 9000)}
    assert asked[3] == asked[8] == {"block": 16, "steps": 2}
    assert asked[8.5] == asked[64] == asked[9000] == {"block": 32, "steps": 7}  # entries may leave open a setting
    assert tiles.tiles("another", 3, block=4) == {"block": 4}


def test_entries_are_those_of_the_device_that_is_lowered_for(table):
    assert BLOCK_ROWS["mosaic_gpu"](128 * 9, 128, True) == 8  # the default: this device has no entry
    with lowering_for("gpu"):
        assert BLOCK_ROWS["mosaic_gpu"](128 * 9, 128, True) == 24
        assert BLOCK_ROWS["mosaic_gpu"](128 * 3, 128, True) == 8
        assert BLOCK_ROWS["mosaic_gpu"](128 * 9, 128, False) == 64
    with lowering_for("tpu"):
        assert tiles.device_kind() == "TPU v5 lite"


def test_tables_change_how_and_not_what(table):
    assert BLOCK_ROWS["blocked"](100, 5) == 24
    given = *normal(0, (100, 24), (5, 24, 7)), jnp.asarray([30, 0, 41, 9, 20])
    found, expected = (
        jax.jit(partial(grouped_matmul, implementation=name))(*given) for name in ("blocked", "reference")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_settings_in_force_go_before_the_table(table):
    with tiles.using({"op": {"block": 5}}):
        assert tiles.tiles("op", 3, block=4, steps=7) == {"block": 5, "steps": 7}
        assert BLOCK_ROWS["blocked"](100, 5) == 24
    assert tiles.tiles("op", 3, block=4, steps=7) == {"block": 16, "steps": 2}


def test_tiles_of_tpus_hold_to_the_most_that_is_asked_for():
    with tiles.using({"grouped_matmul.mosaic_tpu.dense": {"tile_in": 256, "tile_out": 128}}):
        rows, weights = jnp.ones((32, 512)), jnp.ones((3, 512, 300))
        program = jax.jit(lambda *given: mosaic_tpu.block_matmul(*given, interpret=True)).trace(
            rows, weights, jnp.asarray([0, 2]), jnp.int32(2)
        )
    assert "grid=(2, 3, 2)" in str(program.jaxpr)  # blocks, tiles of outputs, tiles of inputs
