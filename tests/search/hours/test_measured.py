"""Hours of a search, predicted from those that another search took."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from puzzle_jax.compiling import compile_seconds
from puzzle_jax.costs.hardware import HARDWARE
from puzzle_jax.errors import PuzzleError
from puzzle_jax.search.hours.measured import HOURS_FILE, MeasuredSearch, StageHours, read_measured

MEASURED = MeasuredSearch(
    HARDWARE["h100"],
    97,
    0.25,
    (StageHours("cost", 7.0, 2.0, 0.0), StageHours("rank", 31.0, 11.0, 4.0), StageHours("score", 5.0, 6.0, 3.0)),
)


def test_work_grows_with_the_rooflines_and_compiling_does_not():
    found = MEASURED.seconds({"rank": 12.0, "score": 30.0, "trace": 9.0})
    # For score only compiling was measured; trace was not measured at all.
    assert found == {"cost": 7.0, "rank": 11.0 + 3 * 20.0, "score": 6.0}


def test_hours_are_read_as_they_were_written(tmp_path):
    MEASURED.write(tmp_path)
    assert read_measured(tmp_path) == MEASURED
    content = json.loads((tmp_path / HOURS_FILE).read_text())
    content["stages"][1]["seconds"] = -1
    (tmp_path / HOURS_FILE).write_text(json.dumps(content))
    with pytest.raises(PuzzleError, match=r"hours.json: .*seconds is -1, but must be at least 0"):
        read_measured(tmp_path)
    with pytest.raises(PuzzleError, match=r"nothing/hours.json is missing; a search writes it when all"):
        read_measured(tmp_path / "nothing")


def test_only_compiling_counts_as_compiling():
    before = compile_seconds()
    program = jax.jit(lambda x: jnp.tanh(x) @ x.T)
    x = jnp.ones((11, 7))
    between = compile_seconds()
    program(x).block_until_ready()
    compiled = compile_seconds()
    assert compiled > between >= before
    program(x).block_until_ready()
    assert compile_seconds() == compiled
    assert dataclasses.replace(MEASURED.stages[1], compile_seconds=0.0).working == 31.0
