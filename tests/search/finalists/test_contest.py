"""Who is trained, who is chosen by what training led to, and what a killed process need not do again."""

import json
from dataclasses import replace

import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.search.artifacts import FINALISTS, SOLUTIONS, chosen_candidate
from puzzle_jax.search.finalists.contest import contenders, hold, reach
from puzzle_jax.search.recipe import FinalistSettings, Recipe, TraceSettings
from puzzle_jax.search.score.measurements import Score
from puzzle_jax.search.score.whole_children import Measurements
from puzzle_jax.search.solve.problem import Candidate
from puzzle_jax.search.space import ExpertChoice
from puzzle_jax.settings.mesh import MeshSettings
from tests.support import small_config

PARENT = small_config((BlockConfig(7, 5), BlockConfig(7), BlockConfig(7)))
TOKENS = np.array([4, 9, 7])


def candidate(name, counts, windows, score=0.5):
    choices = tuple(ExpertChoice(count, tuple(range(count)), "reap") for count in counts)
    blocks = tuple(map(BlockConfig, counts, windows))
    return Candidate(name, blocks, choices, score, {}, {"chat": 3}, (), "optimal", 0.0)


NEAR = candidate("near", (7, 5, 4), (5, 3, None))
SAME = candidate("same reach", (7, 6, 4), (5, 2, None))
FAR = candidate("far", (7, 5, 3), (5, None, 3))
NOWHERE = candidate("nowhere", (7, 6, 6), (5, 3, 3))


def test_those_who_see_far_elsewhere_are_trained_beside_the_choice():
    assert reach(NEAR, PARENT) == (True, False, True) and reach(NOWHERE, PARENT) == (True, False, False)
    pool, patterns = [NEAR, replace(NEAR, name="again"), SAME], [FAR, replace(NEAR, score=0.4), NOWHERE]
    assert contenders(pool, patterns, PARENT, 3) == [NEAR, FAR, NOWHERE]
    assert contenders(pool, patterns, PARENT, 2) == [NEAR, FAR]
    # Too few patterns are filled up by other blocks.
    assert contenders(pool, patterns, PARENT, 9) == [NEAR, FAR, NOWHERE, SAME]
    assert contenders(pool, [NEAR], PARENT, 2) == [NEAR, SAME]


def measured(*kls):
    scores = [Score(kl, 0.1, 1.0, 1.0, 3, {}) for kl in kls]
    return Measurements(scores, np.repeat(np.array(kls)[:, None], 3, 1), TOKENS)


AFTER = {"near": [0.4, 0.2, 0.3], "far": [0.1, 0.2, 0.1], "nowhere": [0.1, 0.3, 0.2]}


def test_the_lowest_kl_after_training_is_chosen(tmp_path):
    contest = hold([NEAR, FAR, NOWHERE], measured(0.3, 0.9, 0.6), lambda c: np.array(AFTER[c.name]), 11, tmp_path / "k")
    assert contest.chosen == 1
    assert [kl for kl, _ in contest.kl] == pytest.approx([5.5 / 20, 2.9 / 20, 4.5 / 20])
    above = contest.above_chosen
    # Differences by trace are 0.3, 0, 0.2 with 4, 9, 7 tokens: 2.6 / 20; residuals 0.17, -0.13, 0.07.
    assert (above[1].mean, above[1].se) == (0, 0) and above[0].mean == pytest.approx(0.13)
    assert above[0].se == pytest.approx((1.5 * (0.68**2 + 1.17**2 + 0.49**2)) ** 0.5 / 20)
    told = json.loads(json.dumps(contest.to_json()))
    assert told["steps"] == 11 and [entry["before"]["kl"] for entry in told["finalists"]] == [0.3, 0.9, 0.6]
    assert told["finalists"][0]["above_chosen"]["mean"] == pytest.approx(0.13)
    run = tmp_path / "run"
    for artifact, value in ((FINALISTS, told), (SOLUTIONS, {"chosen": 0, "pool": [NEAR.to_json()]})):
        (run / artifact.path).parent.mkdir(parents=True)
        artifact.write((run / artifact.path).parent, value)
    assert chosen_candidate(run, finalists=True).blocks == FAR.blocks
    assert chosen_candidate(run).blocks == NEAR.blocks
    [layers, predicted, before, after, above, chosen] = [
        list(map(str, column.cells)) for column in contest.table().columns
    ]
    assert layers[1] == "7 5, 5 full, 3 3" and predicted[1] == "0.5000" and before[1] == "0.9000 ±0.1000"
    assert after[1].startswith("0.1450 ±") and above[1:] == ["", above[2]] and above[0].startswith("+0.1300 ±")
    assert chosen == ["", "yes", ""]


def test_a_finalist_that_breaks_a_floor_is_chosen_only_if_all_do(tmp_path):
    """FAR has the lowest KL after training."""
    breaking = [replace(FAR, violated=("KL of high",)), NEAR]
    trained = {"near": 0.5, "far": 0.2}
    some = hold(breaking, measured(0.9, 0.3), lambda c: np.full(3, trained[c.name]), 11, tmp_path / "some")
    assert some.chosen == 1
    none = [replace(each, violated=("KL of high",)) for each in breaking]
    assert hold(none, measured(0.9, 0.3), lambda c: np.full(3, trained[c.name]), 11, tmp_path / "none").chosen == 0


def test_a_killed_stage_trains_no_finished_one_again(tmp_path):
    asked = []

    def train(child):
        asked.append(child.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return np.array(AFTER[child.name])

    both = [NEAR, FAR]
    with pytest.raises(KeyboardInterrupt):
        hold(both, measured(0.3, 0.9), train, 11, tmp_path)
    found = hold(both, measured(0.3, 0.9), train, 11, tmp_path)
    assert asked == ["near", "far", "far"] and found.chosen == 1
    np.testing.assert_array_equal(found.after, [AFTER["near"], AFTER["far"]])
    # Other experts are another child.
    moved = replace(NEAR, choices=(*NEAR.choices[:2], ExpertChoice(4, (0, 1, 2, 6), "reap")))
    hold([moved], measured(0.3), lambda _: np.zeros(3), 11, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_training_that_diverges_is_told(tmp_path):
    with pytest.raises(PuzzleError, match=r"training finalist 2 diverged; lower finalists\.learning_rate"):
        hold(
            [NEAR, FAR],
            measured(0.3, 0.9),
            lambda child: np.full(3, np.nan if child is FAR else 1.0),
            11,
            tmp_path,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 1}, "finalists.count is 1, but a choice needs at least 2; 0 trains none"),
        ({"count": -1}, "finalists.count"),
        ({"steps": 0}, "finalists.steps"),
        ({"problems": 0}, "finalists.problems"),
        ({"train": ("norms",)}, "finalists.train has 'norms', but must be of router, experts"),
        ({"learning_rate": 0.0}, "finalists.learning_rate"),
        ({"row_length": 1}, "finalists.row_length"),
        ({"rows": 0}, "finalists.rows"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FinalistSettings(**settings)


def recipe(**sections):
    return Recipe(Scenario("chat", 12, 6, batch=3), Target(min_speedup=1.1), **sections)


def test_traces_to_train_on_are_a_set_of_their_own_where_finalists_are_trained():
    traces = TraceSettings(calibration=11, validation=7, confirmation=5, heldout=13)
    without = recipe(traces=traces)
    assert without.trace_sets == {"calibration": 11, "validation": 7, "confirmation": 5, "heldout": 13}
    having = replace(without, finalists=FinalistSettings(count=2, problems=17))
    assert having.trace_sets == {**without.trace_sets, "training": 17}
    assert list(having.trace_sets)[-1] == "training"


def test_meshes_are_refused():
    message = (
        "finalists.count is 3, but finalists are trained on one device, and mesh has 2; leave finalists.count at 0"
    )
    with pytest.raises(ConfigError, match=message):
        recipe(finalists=FinalistSettings(count=3), mesh=MeshSettings(data=2))
    with pytest.raises(ConfigError, match=message):
        recipe(finalists=FinalistSettings(count=3), mesh=MeshSettings(model=2, processes=2))
    recipe(mesh=MeshSettings(data=2))
