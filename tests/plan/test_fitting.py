"""The smallest change by which a search fits: scaled by hand, chosen, and confirmed by compiling."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from puzzle_jax.model.weights import weight_bytes
from puzzle_jax.plan import fitting
from puzzle_jax.plan.fitting import estimates, smallest_change
from puzzle_jax.plan.record import Usage
from puzzle_jax.plan.search import CALIBRATE, LENS, LOAD, RANK, SCORE, STAGES, TRACE, PlannedSearch
from puzzle_jax.search.__main__ import SEARCH
from puzzle_jax.search.recipe import ScoreSettings, TraceSettings
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.settings.verbs import parse
from tests.train.toy_student import PARENT

RECIPE = replace(
    parse(SEARCH, []),
    traces=TraceSettings(max_tokens={"low": 20, "high": 38}, batch_size=16),
    score=ScoreSettings(per_call=4, tokens_per_batch=256),
    weights="dense",
)
RUN = PlannedSearch(PARENT, RECIPE, prompt_tokens=26)  # four traces of 64 tokens in a batch
DENSE, PACKED = (weight_bytes(PARENT, jnp.float16, packed=packed) for packed in (False, True))
FOUND = {
    LOAD: Usage({"weights": DENSE}, 1_000),
    TRACE: Usage({"weights": DENSE, "caches": 64_000, "slots": 1_600, "group": 4_000}, 500),
    RANK: Usage({"weights": DENSE, "batch": 100, "states": 2_000, "sums": 700}, 3_000),
    LENS: Usage({"weights": DENSE, "batch": 400, "states": 8_000, "sums": 900}, 40_000),
    SCORE: Usage({"weights": DENSE, "batch": 400, "states": 8_000}, 48_000),
    CALIBRATE: Usage({"weights": DENSE, "batch": 100}, 2_000),
}


@pytest.fixture
def compiles(monkeypatch):
    """Replaces compilation by given totals for changed stages, and records which stages were asked for."""
    asked = []

    def install(*totals):
        answers = iter(totals)

        def compiled(programs):
            asked.append(tuple(programs))
            total = next(answers)
            return {stage: Usage({"weights": 0}, total) for stage in programs}

        monkeypatch.setattr(fitting, "compiled", compiled)
        return asked

    return install


def test_nothing_changes_without_a_change():
    assert estimates(RUN, RUN, FOUND) == {stage: FOUND[stage].total for stage in STAGES}


def test_what_each_setting_scales():
    def changed(**sections):
        recipe = RECIPE
        for name, values in sections.items():
            value = replace(getattr(recipe, name), **values) if isinstance(values, dict) else values
            recipe = replace(recipe, **{name: value})
        return estimates(RUN, replace(RUN, recipe=recipe), FOUND)

    assert changed(traces={"batch_size": 4})[TRACE] == DENSE + 16_000 + 400 + 4_000 + 500
    assert changed(score={"per_call": 2})[SCORE] == DENSE + 8_400 + 24_000
    assert changed(score={"tokens_per_batch": 128})[LENS] == DENSE + 4_200 + 900 + 20_000
    packed = changed(weights="packed")
    assert packed[RANK] == PACKED + 100 + 2_000 + 700 + 3_000 and PACKED < 0.7 * DENSE
    mesh = MeshSettings(model=2)
    both = changed(mesh=mesh)
    half = both[CALIBRATE] - 100 - 1_000  # temporaries are divided between the devices, the batch is not
    assert DENSE / 2 < half < 0.7 * DENSE
    assert both[TRACE] == half + 32_000 + 1_600 + 2_000 + 500  # six key-value heads over two devices


def test_the_fewest_and_gentlest_changes_win(compiles):
    limit = max(usage.total for usage in FOUND.values()) - 10_000
    asked = compiles(limit)
    assert {stage for stage, usage in FOUND.items() if usage.total > limit} == {TRACE}
    change = smallest_change(RUN, FOUND, limit)
    assert change is not None and change.settings == {"weights": "packed"} and change.total == limit
    assert asked == [(TRACE,)]
    dense = replace(RUN, stored_packed=False)
    compiles(limit)
    change = smallest_change(dense, FOUND, limit)
    assert change is not None and change.settings == {"traces.batch_size": 8}
    assert str(change).startswith("the smallest change that is enough, as compiled: --traces.batch_size 8: ")


def test_where_the_compiler_does_not_agree_the_next_change_is_tried(compiles):
    limit = max(usage.total for usage in FOUND.values()) - 10_000
    asked = compiles(limit + 1, limit - 5)
    change = smallest_change(RUN, FOUND, limit)
    assert change is not None and change.settings == {"traces.batch_size": 8} and change.total == limit - 5
    assert len(asked) == 2
    compiles(*[limit + 1] * 3)
    assert smallest_change(RUN, FOUND, limit) is None


def test_several_changes_where_one_is_not_enough_and_devices_last(compiles):
    limit = PACKED + 10_000
    compiles(limit)
    change = smallest_change(RUN, FOUND, limit)
    assert change is not None
    assert change.settings["weights"] == "packed" and "mesh.model" not in change.settings
    found = replace(RUN, recipe=fitting.with_factors(RUN, fitting._Factors(1, 4, 0, 2, 0, 0)).recipe)
    assert (found.recipe.traces.batch_size, found.recipe.score.tokens_per_batch) == (1, 64)
    small = smallest_change(RUN, FOUND, PACKED // 2)
    assert small is not None and "mesh.model" in small.settings and "by estimate" in small.what
    assert smallest_change(RUN, FOUND, 10) is None
