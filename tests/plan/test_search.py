"""The memory that the plan of a search reports is what a device holds, and bad input gives one sentence."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.convert_hf.configuration.config_json import write_config
from puzzle_jax.convert_hf.configuration.quantization import MXFP4_EXPERTS
from puzzle_jax.costs.hardware import HARDWARE
from puzzle_jax.errors import ConfigError
from puzzle_jax.generate import Engine
from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.engine import own_context
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.network import to_compute
from puzzle_jax.model.sharding import params_sharding
from puzzle_jax.plan import command
from puzzle_jax.plan.__main__ import main
from puzzle_jax.plan.abstract import device_bytes
from puzzle_jax.plan.record import GB, Plan, Usage, compiled
from puzzle_jax.plan.search import STAGES, PlannedSearch
from puzzle_jax.search.__main__ import SEARCH
from puzzle_jax.search.hours.measured import MeasuredSearch, StageHours
from puzzle_jax.search.hours.work import SearchTime
from puzzle_jax.search.rank.statistics import no_sums
from puzzle_jax.search.recipe import ScoreSettings, TraceSettings
from puzzle_jax.search.score import lens as lens_module
from puzzle_jax.search.score import replace_one as replace_module
from puzzle_jax.search.score.lens import fit_lens
from puzzle_jax.search.score.replace_one import Alternative, ReplaceOne
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.settings.verbs import parse
from tests.paths import ROOT
from tests.support import present, random_params
from tests.train.toy_student import PARENT, packed_params

TINY = parse(SEARCH, [])
RECIPE = replace(
    TINY,
    traces=TraceSettings(max_tokens={"low": 20, "medium": 30, "high": 37}, batch_size=4),
    score=ScoreSettings(per_call=3, keep_every=2, tokens_per_batch=200),
    mesh=MeshSettings(data=2, model=2),
)
RUN = PlannedSearch(PARENT, RECIPE, prompt_tokens=26)  # traces of up to 63 tokens, in batches of 64
STATE = 64 * 32 * 2  # bytes of a trace's hidden states


@pytest.fixture(scope="module")
def found():
    return compiled(RUN.programs)


def first_part(tree):
    """Bytes on the first device, of real arrays."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def half(tree):
    return jax.tree.map(lambda x: x if x.dtype == jnp.uint8 else x.astype(jnp.float16), tree)


def trace(prompt, completion, number=0):
    rng = np.random.default_rng(number)
    asked, answered = (tuple(rng.integers(0, 97, size).tolist()) for size in (prompt, completion))
    return Trace("t", "low", number, {}, asked, answered, 1.0, False)


# What is held ---------------------------------------------------------------------------------------------------------


def test_every_stage_is_planned_and_totals_are_all_of_it(found):
    assert tuple(found) == STAGES
    parts = {stage: {name for name, size in usage.held.items() if size} for stage, usage in found.items()}
    assert parts == {
        "load": {"weights"},
        "trace": {"weights", "caches", "slots", "group"},
        "rank": {"weights", "batch", "states", "sums"},
        "lens": {"weights", "batch", "states", "sums"},
        "score": {"weights", "batch", "states"},
        "calibrate": {"weights", "batch"},
    }
    shown = json.loads(json.dumps(Plan([], found, 1, {}, {}, []).to_json()))
    assert not shown["fits"]
    for stage, usage in found.items():
        assert usage.temporaries > 0 and usage.seconds > 0
        assert usage.total == sum(usage.held.values()) + usage.temporaries == shown["programs"][stage]["total"]


def test_parameters_are_as_loading_leaves_them(found):
    expected = params_sharding(PARENT, present(RUN.mesh))
    dense = jax.device_put(to_compute(packed_params(), jnp.float16), expected)
    assert found["load"].held["weights"] == first_part(dense) == device_bytes(RUN.params)
    packed = replace(RUN, recipe=replace(RUN.recipe, weights="packed"))
    stored = jax.device_put(half(packed_params()), expected)
    assert packed.programs["load"]().held["weights"] == first_part(stored) == device_bytes(packed.params)
    assert first_part(dense) > 1.5 * first_part(stored)


def test_packed_where_dense_weights_do_not_fit_twice():
    dense = device_bytes(RUN.params)
    by_memory = [replace(RUN, device_memory=size).packed for size in (2 * dense, 2 * dense - 1)]
    assert by_memory == [False, True]
    assert not replace(RUN, recipe=replace(RUN.recipe, weights="dense"), device_memory=1).packed
    with pytest.raises(ConfigError, match=r"weights is packed, but the checkpoint's experts are not stored as MXFP4"):
        replace(RUN, stored_packed=False, recipe=replace(RUN.recipe, weights="packed"))


def test_packed_programs_need_less_beside_what_they_are_given(found):
    packed = replace(RUN, recipe=replace(RUN.recipe, weights="packed"))
    usages = compiled({stage: packed.programs[stage] for stage in ("rank", "score", "calibrate")})
    for stage, usage in usages.items():
        assert usage.total < found[stage].total, stage


def test_slots_are_the_engines(found):
    engine = Engine({"final_norm": jnp.zeros(1, jnp.float16)}, PARENT, stop_ids=[], context=256, slots=4, mesh=RUN.mesh)
    planned = RUN.engine
    assert (planned.context, planned.rows) == (engine.context, engine.rows)
    made = engine._new_slots(RUN.mesh)
    assert found["trace"].held["caches"] == first_part(made.caches)
    assert found["trace"].held["slots"] == first_part(made._replace(caches=[]))
    assert found["trace"].held["group"] == first_part(engine._new_group())


def test_batches_are_those_of_the_longest_traces():
    """Three rows of 64 tokens, which two devices of the data axis do not divide, and two rows, which they do."""
    batch = RUN.batch(tokens_per_batch=200)
    (real,) = micro_batches([trace(26, 37)], tokens_per_batch=200)
    for one, other in zip(batch, real, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert device_bytes(RUN.states(batch)) == 3 * STATE
    assert device_bytes(RUN.states(RUN.batch(tokens_per_batch=128), 3)) == 2 * 3 * STATE // 2


def test_sums_of_ranking_and_of_lenses_are_of_every_layer(found):
    assert found["rank"].held["sums"] == 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(no_sums(PARENT)))
    assert found["lens"].held["sums"] == 3 * 4 * (1 + 2 * 32 + 3 * 32 * 32)


WIDE = replace(PARENT, hidden_size=40, blocks=PARENT.blocks[:1] * 5)
"""A parent with a hidden size that nothing else here has."""


@pytest.fixture
def alone():
    """The plan of the wide parent on one device, made before `live` records the programs."""
    run = PlannedSearch(WIDE, replace(RECIPE, mesh=MeshSettings()), stored_packed=False, prompt_tokens=26)
    return compiled({stage: run.programs[stage] for stage in ("lens", "score")})


@pytest.fixture
def live(alone, monkeypatch):
    """The most bytes of hidden states of that size, two per number, that are live when each program is called."""
    most = {}

    def recorded(module, name):
        program = getattr(module, name)

        def called(*given):
            states = [x for x in jax.live_arrays() if x.shape[:1] == (3,) and x.shape[-2:] == (64, 40)]
            most[name] = max(most.get(name, 0), sum(x.size for x in states) * 2)
            return jax.block_until_ready(program(*given))

        monkeypatch.setattr(module, name, called)

    for name in ("run_attention", "run_mixture", "enter_mixture", "compare_states"):
        recorded(replace_module, name)
    for name in ("add_states", "through_lens"):
        recorded(lens_module, name)
    return most


def test_states_are_those_that_scoring_and_lenses_have(alone, live):
    planned, run = alone, ReplaceOne(random_params(WIDE), WIDE, per_call=3, keep_every=2)
    wanted = [(layer, Alternative(np.arange(8) < 5, 5)) for layer in (0, 1, 3, 4)]
    (batch,) = micro_batches([trace(26, 37, n) for n in range(3)], tokens_per_batch=200)
    one, suffix = (3 * n * 64 * 40 * 2 for n in (1, 3))
    run(batch, wanted)
    # Besides the states that the plan counts, programs are given one or two sets of alternatives' states.
    assert live["run_mixture"] == planned["score"].held["states"] + 2 * suffix
    assert live["enter_mixture"] <= planned["score"].held["states"] + suffix
    live.clear()
    fitted = fit_lens(run, [batch])
    assert planned["lens"].held["states"] - one <= live["add_states"] <= planned["lens"].held["states"]
    fitted(batch, wanted)
    assert live["through_lens"] <= planned["lens"].held["states"] + 2 * suffix


# Contexts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "context"),
    [(1, 256), (257, 512), (8192, 8192), (8193, 10240), (10241, 12288), (16384, 16384), (66_560, 81_920)],
)
def test_long_requests_get_contexts_between_powers_of_two(tokens, context):
    assert own_context(tokens, replace(PARENT, max_position=131_072)) == context
    assert own_context(tokens, replace(PARENT, max_position=9000)) == min(context, 9000)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0, but must be at least 1"),
        ({"prompt_tokens": 500}, "prompts of 500 tokens and answers of 37 are longer than the model's context of 512"),
        ({"config": replace(PARENT, hidden_size=40)}, "hidden_size is 40, but packed experts need a multiple of 32"),
    ],
)
def test_a_search_that_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(RUN, **change)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(write_config(PARENT, {"quantization_config": MXFP4_EXPERTS})))
    return path


@pytest.fixture
def planned(monkeypatch, found):
    """Answers from the fixture instead of compiling, and records the search that was asked for."""
    asked = []
    monkeypatch.setattr(command, "compiled", lambda programs: asked.append(programs["load"].args[0]) or found)
    return asked


SHORT = ("--traces.max_tokens", "low=20,medium=30,high=37", "--prompt-tokens", "26", "--traces.batch_size", "4")


def test_hours_by_a_search_that_has_run(config, planned, tmp_path, capsys):
    """Stages grow by the ratio of the roofline's seconds; compiling takes as long as it took."""
    command_line = ["search", "--parent", str(config), *SHORT, "--measured-by", str(tmp_path), "--json"]
    assert main(command_line) == 2
    assert f"{tmp_path}/hours.json is missing" in capsys.readouterr().err
    stages = (StageHours("cost", 3.0, 1.0, 0.0), StageHours("score", 60.0, 20.0, 0.01))
    MeasuredSearch(HARDWARE["h100"], 26, 0.5, stages).write(tmp_path)
    assert main(command_line) == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    (run,) = planned
    work = SearchTime(run.config, run.recipe, "mxfp4" if run.packed else "bf16", HARDWARE["h100"], 26, 0.5)
    growth = (work.seconds["lens"] + work.seconds["score"]) / 0.01
    assert seconds == {"cost": 3.0, "score": pytest.approx(20.0 + growth * 40.0)}


def test_the_command_prints_the_plan(config, planned, found, capsys):
    assert main(["search", "--parent", str(config), *SHORT, "--mesh", "model=4", "--hardware", "h100"]) == 0
    out = capsys.readouterr().out
    (run,) = planned
    assert run.stored_packed and run.config == PARENT and run.recipe.mesh == MeshSettings(data=1, model=4)
    assert "config.json on 1 x 4 devices, traces of up to 63 tokens" in out
    assert re.search(r"GB per device +┃ +load +┃ +trace +┃ +rank +┃ +lens +┃ +score +┃ +calibrate", out)
    assert "parameters, experts in bfloat16" in out and "caches of 4 slots of 256" in out
    most = max(memory.total for memory in found.values())
    assert f"fits: {81_559 * 2**20 / GB - most / GB:.1f} GB are left" in out
    assert "every device holds all key-value heads: 4 do not divide 6" in out


def test_the_command_says_what_would_help(config, monkeypatch, capsys):
    sizes = {"load": (0, 5), "trace": (1, 9), "rank": (1, 2), "lens": (1, 1), "score": (1, 20)}
    memory = {stage: Usage({"weights": weights * 10**9}, beside * 10**9) for stage, (weights, beside) in sizes.items()}
    monkeypatch.setattr(command, "compiled", lambda programs: memory)
    assert main(["search", "--parent", str(config), *SHORT, "--hbm-gb", "8"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"trace does not fit: 2.0 GB too many; .*:\n  lower traces.batch_size or traces.max_tokens\n", out)
    assert re.search(r"score does not fit: 13.0 GB too many; .*:\n  lower score.per_call", out)
    assert "rank does not fit" not in out and "fits: " not in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mesh", "model=0"), "mesh.model is 0, but must be at least 1"),
        (("--mesh", "model=99"), "a mesh of 1 x 99 needs 99 devices, but 8 are present"),
        (("--hbm-gb", "-1"), "hbm_gb is -1.0, but must be above 0"),
        (("--score.per_call", "0"), "score.per_call is 0, but must be at least 1"),
        (("--recipe", "nowhere"), "nowhere"),
        (("--prompt-tokens", "501"), "prompts of 501 tokens and answers of 37 are longer"),
    ],
)
def test_bad_options_are_one_sentence(config, capsys, more, message):
    assert main(["search", "--parent", str(config), *SHORT, *more]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error


def test_a_parent_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert main(["search", "--parent", str(tmp_path / "gone")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-oss-120b-8xh100", "gpt-oss-120b-1xh100"])
def test_searches_of_the_published_size_fit_into_their_host(name, capsys):
    config = ROOT / "benchmarks" / "published" / "gpt-oss-120b.json"
    assert main(["search", "--parent", str(config), "--recipe", name]) == 0
    assert re.search(r"^fits: \d+\.\d GB are left", capsys.readouterr().out, re.MULTILINE)
