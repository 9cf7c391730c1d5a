"""The memory that the plan of a step reports is what a device holds, phase by phase; the recipe of the published size
has what was published; and bad input gives one sentence."""

import json
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.convert_hf.configuration.config_json import write_config
from puzzle_jax.convert_hf.configuration.quantization import MXFP4_EXPERTS
from puzzle_jax.errors import ConfigError
from puzzle_jax.generate import Generated, Request, engine
from puzzle_jax.generate.slots import empty_group, empty_slots
from puzzle_jax.model import cache_format
from puzzle_jax.model.cache_format import FLOAT8, CacheFormat
from puzzle_jax.model.child import identity_child
from puzzle_jax.model.sharding import generation_mesh
from puzzle_jax.plan import command
from puzzle_jax.plan.__main__ import main
from puzzle_jax.plan.abstract import device_bytes
from puzzle_jax.plan.compilers import compiler
from puzzle_jax.plan.grpo import PHASES, PlannedPolicy
from puzzle_jax.plan.record import Usage, compiled
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.settings.verbs import parse
from puzzle_jax.tasks import Chat
from puzzle_jax.train.__main__ import VERBS
from puzzle_jax.train.grpo.policy import Scores
from puzzle_jax.train.grpo.policy_batches import Learnable, examples, micro_batches, with_scores
from puzzle_jax.train.grpo.primary_rewards import PrimaryRewards
from puzzle_jax.train.grpo.prompts import PromptSettings
from puzzle_jax.train.grpo.recipe import GrpoRecipe, RolloutSettings, UpdateSettings
from puzzle_jax.train.grpo.rollouts import Rollout, Sampler
from puzzle_jax.train.losses.policy_settings import PolicySettings
from puzzle_jax.train.optimizer import OptimizerSettings
from puzzle_jax.train.placement import Placement
from tests.train.toy_student import PARENT, SHORT, packed_params

RECIPE = GrpoRecipe(
    model=Path("model"),
    out=Path("out"),
    prompts=PromptSettings(efforts={"high": 1.0}, prompts=6),
    rollout=RolloutSettings(group=4, max_tokens={"high": 24}, slots=4),
    update=UpdateSettings(row_length=36, rows=4, updates=2),
    optimizer=OptimizerSettings(name="adam"),
    mesh=MeshSettings(data=2, sequence=2, model=2),
)
RUN = PlannedPolicy(identity_child(PARENT), RECIPE)
CACHED = 5 + 256 + 256  # positions of a slot in the three layers: one window, and the whole context


def with_fields(run=RUN, **sections):
    """The run with fields of its recipe's sections, or whole sections, replaced."""
    recipe = run.recipe
    return replace(
        run,
        recipe=replace(
            recipe,
            **{
                name: replace(getattr(recipe, name), **value) if isinstance(value, dict) else value
                for name, value in sections.items()
            },
        ),
    )


ALONE = with_fields(
    PlannedPolicy(identity_child(SHORT.parent), RECIPE), mesh=MeshSettings(), update={"updates": 1, "reference": False}
)  # its two layers are compiled as one


@pytest.fixture(scope="module")
def mesh():
    return RUN.mesh


@pytest.fixture(scope="module")
def found():
    return compiled(RUN.programs)


def first_part(tree):
    """Bytes on the first device, of real arrays."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


# Exact parts ----------------------------------------------------------------------------------------------------------


def test_micro_batches_are_those_that_are_packed(found, mesh):
    def answer(tokens, prompt):
        experts = np.zeros((prompt + tokens - 1, 3, 2), np.uint8)
        generated = Generated(tuple(range(tokens)), False, (-1.0,) * tokens, experts)
        return Learnable(Mock(spec=Rollout, tokens=(1,) * prompt, generated=generated, length=tokens), 0.5)

    answers = [answer(24, 12), answer(20, 9), answer(3, 4)]
    settings = RECIPE.loss.resolved
    batch, *more = micro_batches(examples(answers, settings, {"high": 24}), rows=4, length=36, pad_id=0)
    assert not more
    scores = np.zeros((4, 36), np.float32)
    for scored, real in ((False, batch), (True, with_scores(batch, Scores(jnp.asarray(scores), jnp.asarray(scores))))):
        planned = RUN.batch(scored=scored)
        assert jax.tree.structure(planned) == jax.tree.structure(real)
        for one, other in zip(jax.tree.leaves(planned), jax.tree.leaves(real), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        phase = found["update" if scored else "score"].held
        assert phase["batch"] == device_bytes(planned) == first_part(Placement(mesh).rows(real))
    assert found["score"].held["batch"] == 4 * 36 // 4 * (5 * 4 + 4 * 4 + 3 * 2)


def test_extras_follow_the_recipe():
    def names(run):
        return set(run.batch(scored=True).extras)

    always = {"advantages", "coefficients", "sampler", "shares"}
    assert names(ALONE) == always | {"experts"}
    assert names(with_fields(ALONE, rollout={"replay": False})) == always
    assert names(with_fields(ALONE, update={"updates": 2})) == always | {"experts", "old"}
    assert names(with_fields(ALONE, loss=PolicySettings(kl=0.1))) == always | {"experts", "reference"}
    assert names(with_fields(ALONE, update={"reference": True})) == always | {"experts", "reference"}


def test_slots_are_where_generation_makes_them(found, mesh):
    made, dtype = generation_mesh(mesh), jnp.dtype(compiler().dtype)
    real = empty_slots(PARENT, 4, 256, dtype, CacheFormat(), log_probs=True, experts=True, mesh=made)
    planned = RUN.engine.state()
    for one, other in zip(jax.tree.leaves(planned), jax.tree.leaves(real), strict=True):
        assert (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding)
    assert found["rollout"].held["caches"] == first_part(real.caches)
    assert found["rollout"].held["slots"] == first_part(real._replace(caches=[]))
    # One row on each of 2 x 2 parts, three of six heads on each model device.
    assert found["rollout"].held["caches"] == RUN.caches_on_device(4) == 1 * CACHED * 2 * 3 * 6 * 2
    assert 0 < found["rollout"].held["slots"] - RUN.slots_on_device < 100  # counters and limits
    assert RUN.group_rows == 4
    group = empty_group(PARENT, 4, 256, dtype, CacheFormat(), experts=True, mesh=made)
    assert found["rollout"].held["group"] == first_part(group)


def test_caches_are_the_engines():
    alone = with_fields(mesh=MeshSettings())
    sampler = engine.Engine(
        {"final_norm": jnp.zeros((1,), compiler().dtype)},
        PARENT,
        stop_ids=[0],
        context=RUN.context,
        slots=4,
        experts=True,
    )
    assert (sampler.context, sampler.rows) == (alone.context, alone.group_rows) == (256, 2)
    assert sampler.cache_bytes() == 4 * RUN.slot_cache_bytes == device_bytes(alone.engine.state().caches)


@pytest.mark.parametrize(("length", "context"), [(36, 256), (256, 256), (260, 512), (500, 512)])
def test_contexts_are_those_that_generation_picks(monkeypatch, length, context):
    class Stop(Exception):
        pass

    def opened(*_, context, **__):
        raise Stop(context)

    monkeypatch.setattr(engine, "Engine", opened)
    with pytest.raises(Stop, match=f"^{context}$"):
        engine.generate({}, PARENT, [Request((1,) * (length - 24), 24)], stop_ids=[])
    assert with_fields(update={"row_length": length}).context == context


@pytest.mark.parametrize(
    ("rollout", "caches"),
    [
        ({"slots": 8}, 2 * CACHED * 2 * 3 * 6 * 2),
        ({"slots": 6}, 6 * CACHED * 2 * 3 * 6 * 2),  # replicated: four devices do not divide six slots
        ({"cache": FLOAT8}, 1 * CACHED * 2 * 3 * 6),
    ],
)
def test_more_slots_have_more_caches_and_bytes_half_of_them(rollout, caches, monkeypatch):
    monkeypatch.setattr(cache_format, "ROUNDED", 0)
    run = with_fields(rollout=rollout)
    scales = 3 * 2 * 4 if "cache" in rollout else 0
    assert device_bytes(run.engine.state().caches) == caches + scales
    assert run.caches_on_device(run.recipe.rollout.slots) == caches


def test_heads_that_do_not_divide_are_whole():
    run = with_fields(mesh=MeshSettings(model=4))
    assert device_bytes(run.engine.state().caches) == run.caches_on_device(4) == 4 * run.slot_cache_bytes


def test_weights_are_unstacked_as_the_sampler_does(found, mesh):
    held = RUN.always_held
    student, placement = RUN.student, Placement(mesh)
    params = jax.tree.map(lambda x: x if x.dtype == jnp.uint8 else x.astype(compiler().dtype), packed_params())
    base = placement.base(jax.jit(student.stacked)(params), PARENT)
    trained = jax.device_put(student.master_weights(base), placement.master_weights(RUN.state[0].params))
    assert held["experts"] + held["base"] == first_part(base)
    assert held["master_weights"] == first_part(trained)
    assert found["update"].held["sums"] - held["master_weights"] < 100  # scalars
    sampler = Sampler(
        student,
        Mock(spec=Chat),
        Mock(spec=PrimaryRewards),
        group=4,
        max_tokens={"high": 24},
        mesh=generation_mesh(mesh),
    )
    real = sampler.params(base, trained)
    planned = RUN.sampler_params
    assert [leaf.shape for leaf in jax.tree.leaves(planned)] == [leaf.shape for leaf in jax.tree.leaves(real)]
    assert found["rollout"].held["copy"] == device_bytes(planned) == first_part(real)


# Phases ---------------------------------------------------------------------------------------------------------------


def test_phases_hold_what_they_need_and_totals_are_all_of_it(found):
    assert tuple(found) == PHASES
    always = {"experts", "base", "master_weights", "optimizer"}
    assert {phase: {name for name, size in usage.held.items() if size} - always for phase, usage in found.items()} == {
        "rollout": {"copy", "caches", "slots", "group", "decoded"},
        "score": {"batch", "decoded"},
        "update": {"batch", "sums", "decoded"},
        "apply": {"sums"},
    }
    for usage in found.values():
        assert all(usage.held[name] for name in always) and usage.temporaries
        assert usage.total == sum(usage.held.values()) + usage.temporaries
        assert usage.held.get("decoded", 0) in (0, 8 // 2 * 3 * 32 * 64 * 2)  # half of a layer's experts
    assert found["update"].temporaries > found["score"].temporaries > 0


def test_one_device_and_one_update_without_a_reference():
    alone = compiled(ALONE.programs)
    assert tuple(alone) == ("rollout", "update", "apply")
    rollout, update = alone["rollout"].held, alone["update"].held
    assert rollout["experts"] == 2 * 8 * 3 * 32 * 64 * 17 // 32
    assert rollout["caches"] == 4 * 2 * 256 * 2 * 6 * 6 * 2
    assert rollout["copy"] == update["experts"] + update["base"]
    assert update["batch"] == 4 * 36 * (5 * 4 + 4 * 4 + 2 * 2)
    assert 0 < update["sums"] - update["master_weights"] < 100


def test_dense_experts_where_recipe_or_checkpoint_have_them():
    packed = RUN.always_held["experts"]
    for run in (with_fields(weights="dense"), replace(RUN, packed=False)):
        assert not run.packed
        assert run.always_held["experts"] * 17 == packed * 64
    assert with_fields(weights="packed").packed


# Arithmetic -----------------------------------------------------------------------------------------------------------


def test_a_step_at_most():
    assert RUN.needs == (24, 24 * 24, 24, 6, 24 * 36 * 3 * 2)
    more = with_fields(rollout={"resample": 2}, prompts={"prompts": 5}, update={"rows": 6})
    # Updates of three and of two prompts: 12 and 8 answers in rows of six.
    assert more.needs == (60, 60 * 24, 20, 4, 60 * 36 * 3 * 2)
    assert with_fields(rollout={"replay": False}).needs.expert_bytes == 0


def sizes(scale=1):
    always = {"experts": 400, "base": 100, "master_weights": 80, "optimizer": 160}
    slots = {"copy": 500, "caches": 2000 * scale, "slots": 40, "group": 20}
    return {
        "rollout": Usage({**always, **slots}, temporaries=1000 * scale),
        "score": Usage({**always, "batch": 10}, temporaries=200_000),
        "update": Usage({**always, "batch": 12, "sums": 84, "decoded": 7}, temporaries=300_000),
        "apply": Usage({**always, "sums": 84}, temporaries=60),
    }


def test_an_estimate_of_the_run_itself_is_what_was_found():
    given = sizes()
    for phase, held in (("score", {"batch": 12}), ("update", {"decoded": 49152})):
        given[phase] = replace(given[phase], held={**given[phase].held, **held})
    assert RUN.estimated_phases(given, RUN) == given


def test_estimates_scale_what_each_axis_cuts():
    before = sizes()

    def estimated(run, other):
        return run.estimated_phases(before, other)

    def rollout(usage):
        return usage["rollout"].held["caches"], usage["rollout"].temporaries, usage["rollout"].held["copy"]

    twice = estimated(RUN, with_fields(mesh={"model": 4}))["rollout"].held
    # Four devices do not divide six heads, so caches get larger.
    assert (twice["copy"], twice["caches"], twice["experts"]) == (250, 4000, 200)
    run = with_fields(rollout={"slots": 8})
    for axis in ("data", "sequence"):
        assert rollout(estimated(run, with_fields(run, mesh={axis: 4}))) == (1000, 500, 500)
    more = estimated(run, with_fields(run, mesh={"data": 4}))
    assert rollout(more) == (1000, 500, 500)
    apply = more["apply"]
    assert (apply.held["sums"], apply.held["master_weights"], apply.temporaries) == (42, 40, 30)
    assert more["update"].temporaries < 200_000 < before["update"].temporaries
    assert more["score"].temporaries == pytest.approx(more["update"].temporaries * 2 / 3, abs=1)


def test_changes_are_the_least_with_which_a_phase_fits():
    run = with_fields(rollout={"slots": 16})
    given = sizes(scale=100)

    def would(phase, limit):
        return {change.what: change.settings for change in run.changes(given, phase, limit)}

    assert would("rollout", 270_000) == {
        "fewer slots": {"rollout.slots": 12},
        "more devices, each with fewer rows": {"mesh.data": 4},
        "more devices, each with a part of every row": {"mesh.sequence": 4},
    }
    assert would("update", 280_000) == {
        "smaller micro-batches, more of them": {"update.rows": 2},
        "shorter rows and answers": {"update.row_length": 18, "rollout.max_tokens": {"high": 12}},
        "more devices, each with fewer rows": {"mesh.data": 4},
        "more devices, each with fewer experts and heads": {"mesh.model": 8},
    }
    assert would("update", 500) == {}
    ways = with_fields(update={"rows": 2}).device_ways("update.rows")
    assert next(iter(ways["more devices, each with fewer rows"])) == {"mesh.data": 4, "update.rows": 4}


# The recipe of the published size -------------------------------------------------------------------------------------


def test_the_recipe_says_what_was_published():
    recipe = parse(VERBS["grpo"], ["--recipe", "grpo-gpt-oss-puzzle-88b", "--model", "m", "--out", "o"])
    assert (recipe.prompts.prompts, recipe.rollout.group, recipe.update.updates) == (128, 16, 1)
    assert (recipe.prompts.efforts, recipe.rollout.limit("high")) == ({"high": 1.0}, 49_152)
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps) == (
        "adam",
        3e-6,
        "constant",
        10,
    )
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.999, 0.0, 1.0)
    loss = recipe.loss.resolved
    assert (loss.name, loss.ratio, loss.surrogate, loss.clip_low, loss.clip_high) == (
        "dapo",
        "token",
        "clip",
        0.2,
        0.28,
    )
    assert (loss.kl, loss.entropy, loss.normalization) == (0.0, 0.0, "token")
    assert (loss.baseline, loss.scale_by_std, loss.overlong_filter) == ("leave_one_out", True, True)
    assert (recipe.train, recipe.rollout.replay) == ((), True)
    names = ("math", "code", "stem", "instruction_following", "structured_outputs", "long_context")
    assert recipe.prompts.tasks == {f"data/{name}.jsonl": 1.0 for name in names}
    assert (recipe.mesh.devices, recipe.mesh.processes) == (64, 8)
    assert recipe.rollout.slots == recipe.prompts.prompts * recipe.rollout.group
    assert recipe.rollout.slots % (recipe.mesh.data * recipe.mesh.sequence) == 0
    needs = PlannedPolicy(
        identity_child(PARENT),
        replace(
            recipe,
            update=replace(recipe.update, row_length=512),
            mesh=RECIPE.mesh,
            rollout=replace(recipe.rollout, max_tokens={"high": 400}),
        ),
    ).needs
    assert (needs.answers, needs.rows, needs.micro_batches) == (2048, 2048, 1024)


# Input and output -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A model's directory and a recipe."""
    (tmp_path / "model").mkdir()
    config = write_config(PARENT, {"quantization_config": MXFP4_EXPERTS})
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "prompts: {prompts: 6, efforts: {high: 1}}\n"
        "rollout: {group: 4, slots: 4, max_tokens: {high: 24}}\n"
        "update: {row_length: 36, rows: 4, updates: 2}\n"
        "optimizer: {name: adam}\n"
        "mesh: {data: 2, sequence: 2, model: 2}\n"
    )
    return tmp_path / "model", recipe


def plan_of(files, *more):
    model, recipe = files
    return main(["grpo", "--model", str(model), "--recipe", str(recipe), *more])


@pytest.fixture
def planned(monkeypatch):
    """Replaces compilation, and checks that the command's run is the one of these tests."""
    given = sizes()

    def found(programs):
        run = programs["rollout"].__self__
        own = {name: getattr(run.recipe, name) for name in vars(RECIPE)}
        assert (run.child, run.packed) == (RUN.child, True)
        assert own == {**vars(RECIPE), "model": run.recipe.model, "out": Path("-")}
        return given

    monkeypatch.setattr(command, "compiled", found)


def test_the_command_prints_the_plan(files, planned, capsys):
    assert plan_of(files) == 0
    out = capsys.readouterr().out
    assert "model on 2 x 2 x 2 devices" in out
    assert "6 prompts x 4 answers a step, tokens up to 24 at high effort" in out
    assert re.search(r"GB per device +┃ +rollout +┃ +score +┃ +update +┃ +apply", out)
    assert "fits: 80.0 GB are left" in out
    assert "24 answers of 0.0 million tokens, 24 rows of 36, 6 micro-batches" in out
    assert "a slot: 256 positions" in out
    assert "holds all slots" not in out


def test_the_command_says_what_would_do(files, planned, capsys):
    assert plan_of(files, "--hbm-gb", "0.000250") == 0
    out = capsys.readouterr().out
    assert "update does not fit: 0.0 GB too many; each of these should be enough alone" in out
    assert "smaller micro-batches, more of them: --update.rows 2: 0.0 GB" in out
    assert "shorter rows and answers: --rollout.max_tokens high=12 --update.row_length 18: 0.0 GB" in out
    assert "rollout does not fit" not in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--hbm-gb", "nan"), "hbm_gb is nan, but must be a finite number above 0"),
        (("--mesh.data", "16", "--update.rows", "16"), "a mesh of 16 x 2 x 2 needs 64 devices, but 8 are present"),
        (("--mesh.data", "3"), "update.rows is 4, but must be a multiple of mesh.data (3)"),
        (("--update.row_length", "600"), "update.row_length is 600, but the model's context is 512"),
        (("--train", "experts"), "train has 'experts', but a plan is for experts that are frozen"),
        (("--slots", "4"), "there is no option --slots"),
        (("--rollout.slots", "0"), "rollout.slots is 0, but must be at least 1"),
        (("--rollout.nothing", "4"), "there is no option --rollout.nothing"),
        (("--recipe", "no-such"), "recipe is 'no-such', but there is no such file, and the names are grpo-accuracy"),
        (("--model", "no-such.json"), "no-such.json cannot be read: No such file or directory"),
    ],
)
def test_bad_options_are_one_sentence(files, capsys, more, message):
    assert plan_of(files, *more) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error


def test_experts_that_cannot_be_packed_are_refused():
    config = replace(PARENT, hidden_size=40)
    with pytest.raises(ConfigError, match="hidden_size is 40, but packed experts need a multiple of 32"):
        PlannedPolicy(identity_child(config), RECIPE)
    assert not PlannedPolicy(identity_child(config), RECIPE, packed=False).packed
