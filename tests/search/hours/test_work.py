"""Hours of a search: work counted by hand for small settings, and how it grows."""

from dataclasses import replace
from pathlib import Path

import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.convert_hf.table import tensor_bytes
from puzzle_jax.costs.hardware import HARDWARE
from puzzle_jax.costs.roofline import Roofline
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.generate.traces import Trace
from puzzle_jax.search.hours.left import _given, by_stage
from puzzle_jax.search.hours.work import DISK_BYTES_PER_SECOND, SearchTime, hours_table
from puzzle_jax.search.rank.rules import PROPOSING
from puzzle_jax.search.recipe import Recipe, ScoreSettings, SpaceSettings, TraceSettings
from puzzle_jax.settings.mesh import MeshSettings
from tests.support import small_config

CONFIG = replace(
    small_config((BlockConfig(6, 5), BlockConfig(6, None), BlockConfig(6, None)), vocab_size=97), max_position=4096
)
TRACES = TraceSettings(
    tasks=("chain", "add"),
    efforts=("low", "high"),
    calibration=7,
    validation=3,
    confirmation=2,
    heldout=5,
    max_tokens={"low": 20, "high": 300},
    batch_size=4,
)
RECIPE = Recipe(
    Scenario("chat", 160, 128, batch=16),
    Target(max_expert_bytes_ratio=0.65),
    traces=TRACES,
    space=SpaceSettings(fractions=(1.0, 0.75, 0.5), windows=(64, 16)),
)
H100 = HARDWARE["h100"]
TIME = SearchTime(CONFIG, RECIPE, "bf16", H100, prompt_tokens=50)


def with_(**sections):
    """The same search with fields of a section, or of the recipe, replaced."""
    changed = {n: replace(getattr(RECIPE, n), **v) if isinstance(v, dict) else v for n, v in sections.items()}
    return replace(TIME, recipe=replace(RECIPE, **changed))


def test_work_by_hand():
    assert TIME.answers(7) == {"low": 14, "high": 14}
    assert (TIME.answer_tokens("low"), TIME.answer_tokens("high")) == (10, 150)
    assert TIME.trace_tokens(7) == 14 * (50 + 10) + 14 * (50 + 150)
    # Counts of 6, 4 and 3 of six experts give two alternatives to the parent in each of three layers, windows two in
    # each of two layers.
    assert TIME.alternatives == (6, 4)
    assert TIME._exact_alternatives() == (6 * 3 + 4, 28)
    assert with_(score={"first": 11})._exact_alternatives() == (22, pytest.approx((18 * 16.5 + 4 * 28) / 22))
    assert with_(score={"method": "exact", "keep_sets": 0})._exact_alternatives() == (6 * len(PROPOSING) + 4, 28)
    assert with_(score={"method": "lens"})._exact_alternatives() == (0, 0)


def test_a_pass_is_the_rooflines_prefill():
    one = with_(traces={"efforts": ("high",), "tasks": ("chain",)})
    steps = Roofline(H100).steps(CONFIG, Scenario("s", 200, 1, batch=7), "bf16")
    seconds = [
        part.total().prefill_seconds
        for block in CONFIG.blocks
        for part in (steps.attention(block.window), steps.experts(block.num_experts))
    ]
    assert one.a_pass(7) == pytest.approx(sum(seconds))


def test_decoding_is_the_rooflines_step_for_every_token():
    one = with_(traces={"efforts": ("high",), "tasks": ("chain",), "batch_size": 7})
    steps = Roofline(H100).steps(CONFIG, Scenario("s", 50, 150, batch=7), "bf16")
    parts = [steps.rest().total()]
    for block in CONFIG.blocks:
        parts += [steps.attention(block.window).total(), steps.experts(block.num_experts).total()]
    expected = sum(part.prefill_seconds + 150 * part.decode_seconds for part in parts)
    assert one.answering(7) == pytest.approx(expected)
    half = replace(one, recipe=replace(one.recipe, traces=replace(one.recipe.traces, batch_size=1)))
    assert half.answering(7) == pytest.approx(7 * half.answering(1))


def test_stages_grow_with_what_they_do():
    seconds = TIME.seconds
    assert list(seconds) == ["load", "trace", "rank", "lens", "score", "solve", "refine", "assemble", "evaluate"]
    assert all(value > 0 for value in seconds.values())
    assert seconds["load"] * DISK_BYTES_PER_SECOND == pytest.approx(tensor_bytes(CONFIG, "bf16"))
    assert with_(traces={"file": RECIPE.parent}).seconds["trace"] == 0
    assert with_(score={"method": "lens"}).seconds["score"] == 0
    assert with_(score={"keep_sets": 0}).seconds["lens"] == 0
    assert with_(refine={"rounds": 0, "swaps": 0}).seconds["refine"] == 0
    more = with_(refine={"rounds": 2}).seconds["refine"] - seconds["refine"]
    assert more > seconds["score"]
    assert with_(refine={"swaps_by": "gradients"}).seconds["refine"] > seconds["refine"]
    none, guided = (with_(refine={"swaps": 0, "swaps_by": by}) for by in ("removal_error", "gradients"))
    assert guided.seconds["refine"] == none.seconds["refine"]
    assert with_(evaluate={"problems": 200}).seconds["evaluate"] > seconds["evaluate"]
    # Scoring is linear in traces and in alternatives.
    one, two = (TIME._scoring(10, traces) for traces in (400, 800))
    assert two == pytest.approx(2 * one, rel=0.1)
    one, two = (TIME._scoring(count, 400) for count in (1000, 2000))
    assert two == pytest.approx(2 * one, rel=0.01)
    assert TIME.host_bytes > 3e9 and TIME.disk_bytes > 100_000


def test_finalists_take_steps_of_teacher_and_student():
    one, two = (with_(finalists={"count": 3, "steps": steps, "rows": 2, "row_length": 400}) for steps in (10, 20))
    named = list(one.seconds)
    assert named[named.index("solve") :] == ["solve", "finalists", "refine", "assemble", "evaluate"]
    row = one._time.forward(400, 2) + one._time.heads(800)
    assert two.seconds["finalists"] - one.seconds["finalists"] == pytest.approx(3 * 10 * 4 * row)
    assert one.seconds["trace"] - TIME.seconds["trace"] == pytest.approx(TIME.answering(200))
    assert list(by_stage(one)) == ["trace", "rank", "score", "solve", "finalists", "refine", "assemble", "evaluate"]


def test_more_devices_take_less_time_and_packed_experts_less_disk():
    assert with_(mesh=MeshSettings(model=2)).a_pass(1000) < TIME.a_pass(1000)
    assert with_(mesh=MeshSettings(data=2)).a_pass(1000) == pytest.approx(TIME.a_pass(1000) / 2, rel=0.1)
    wide = replace(CONFIG, hidden_size=64, intermediate_size=96)
    packed, dense = (replace(TIME, config=wide, form=form).disk_bytes for form in ("mxfp4", "bf16"))
    assert packed < 0.8 * dense
    assert replace(TIME, config=wide, form="bf16", stored="mxfp4").disk_bytes == packed


def test_the_table_has_hours_of_all_devices_and_their_price():
    table = hours_table({"trace": 3600.0, "rank": 1800.0}, 4, 2.5)
    cells = [list(column.cells) for column in table.columns]
    assert cells == [["trace", "rank", "total"], ["1.00", "0.50", "1.50"], ["4.00", "2.00", "6.00"],
                     ["10.00", "5.00", "15.00"]]  # fmt: skip
    assert len(hours_table({"trace": 1.0}, 1, None).columns) == 3


def test_contexts_are_cut_to_the_models():
    long = replace(TIME, prompt_tokens=5_000)
    assert long.a_pass(7) == replace(TIME, prompt_tokens=4_095).a_pass(7)
    assert long.answering(7) > TIME.answering(7) > 0 and sum(long.seconds.values()) < float("inf")


def test_adaptive_scoring_never_takes_more_than_all_traces():
    assert with_(score={"first": 1000})._exact_alternatives()[1] == 28
    assert isinstance(RECIPE.score, ScoreSettings) and RECIPE.score.first == 24


def test_given_traces_are_as_if_they_had_been_asked_for():
    def traces(count, effort, length):
        return [Trace("mine", effort, i, {}, (1, 2, 3), (4,) * length, 1.0, False) for i in range(count)]

    nothing = TraceSettings(file=Path("mine.parquet"), max_tokens={}, tasks=())
    assert replace(TIME, recipe=replace(RECIPE, traces=nothing)).seconds["rank"] == 0  # before the traces are read
    sets = {"calibration": traces(5, "low", 9) + traces(4, "high", 70), "heldout": traces(3, "high", 80)}
    given = _given(nothing, sets)
    assert given.max_tokens == {"low": 9, "high": 80} and (given.calibration, given.heldout) == (5, 2)
    time = replace(TIME, recipe=replace(RECIPE, traces=given))
    assert time.seconds["rank"] > 0 and time.seconds["trace"] == 0
