"""The memory that the plan reports is what a device holds, totals are complete, and bad input gives one sentence."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.convert_hf.configuration.config_json import write_config
from puzzle_jax.convert_hf.configuration.quantization import MXFP4_EXPERTS
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.expert_mlp import IMPLEMENTATIONS, Experts, expert_mlp
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.kernels.route import Routing
from puzzle_jax.model.sharding import make_training_mesh
from puzzle_jax.plan import command
from puzzle_jax.plan.__main__ import main
from puzzle_jax.plan.abstract import device_bytes, kernel_shapes
from puzzle_jax.plan.distill import PlannedDistillation
from puzzle_jax.plan.record import Usage, compiled, with_settings
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.train.distill.objectives import LossSettings
from puzzle_jax.train.distill.recipe import DataSettings, DistillRecipe
from puzzle_jax.train.optimizer import OptimizerSettings, make_optimizer
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.step import init_state
from tests.train.toy_student import CHILD, PARENT, packed_params

MESH = MeshSettings(data=2, sequence=2, model=2)
# A plan only reads how many experts a child keeps, and assumes the first ones.
FIRST = replace(CHILD, blocks=tuple(replace(block, kept=tuple(range(len(block.kept)))) for block in CHILD.blocks))
RECIPE = DistillRecipe(
    parent=Path("parent"),
    child=Path("child"),
    traces=Path("-"),
    out=Path("-"),
    data=DataSettings(row_length=36, rows=4, micro_batches=3),
    mesh=MESH,
)
JOB = PlannedDistillation(FIRST, RECIPE)
EXPERTS = 3 * 8 * 3 * 32 * 64  # numbers in the matrices of three layers' 8 experts


def with_fields(**settings):
    """The job with settings, or sections of settings, replaced."""
    return replace(JOB, recipe=replace(RECIPE, **settings))


@pytest.fixture(scope="module")
def usage():
    return compiled(JOB.programs)["step"]


@pytest.fixture(scope="module")
def memory(usage):
    return usage.held


# Exact parts ----------------------------------------------------------------------------------------------------------


def test_what_is_placed_is_what_real_arrays_take_on_a_device(memory):
    mesh = make_training_mesh(2, 2, 2)
    placement, student = Placement(mesh), JOB.student
    stacked = jax.jit(lambda params: student.stacked(jax.tree.map(_computed, params)))(packed_params())
    base = placement.base(stacked, PARENT)
    optimizer = make_optimizer(OptimizerSettings(), 10)
    begin = jax.eval_shape(lambda tree: init_state(student.master_weights(tree), optimizer, jax.random.key(0)), base)
    state = jax.tree.map(_real, begin, placement.master_weights(begin))
    whole = partial(np.zeros, (3, 4, 36))
    batch = placement.micro_batches(Packed(whole("i4"), whole("i4"), whole("f4"), whole("i4"), whole("i4"), {}))

    experts = [layer["moe"].pop(name) for run in base["runs"] for layer in run for name in ("gate_up", "down")]
    assert (
        memory["experts"] == _held(experts) == EXPERTS * 17 // 32 // 2
    )  # half a byte, and a scale for every 32 numbers, on 2 model devices
    assert memory["base"] == _held(base)
    assert memory["master_weights"] == _held(state.params)
    assert memory["optimizer"] == _held(state._replace(params=None))
    assert memory["batch"] == _held(batch) == 3 * 4 * 36 * 5 * 4 // 4


def _computed(leaf):
    return leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf


def _real(leaf, sharding):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), sharding)
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), sharding)


def _held(tree):
    """Bytes on the first device."""
    leaves = jax.tree.leaves(tree)
    leaves = [jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf for leaf in leaves]
    return sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards[:1])


def test_the_total_is_all_of_it_and_temporaries_are_no_less_than_gradients(usage, memory):
    assert set(memory) == {"experts", "base", "master_weights", "optimizer", "batch", "decoded"}
    assert usage.held_bytes == sum(memory.values())
    assert usage.total == usage.held_bytes + usage.temporaries > max(memory.values())
    assert usage.temporaries > memory["master_weights"]
    assert memory["decoded"] == EXPERTS // 3 // 2 * 2  # a layer's, half of them on each device


@pytest.mark.parametrize(
    ("change", "experts", "optimizer"),
    [
        ({"weights": "dense"}, EXPERTS * 2 // 2, 2),
        ({"optimizer": OptimizerSettings(name="lion")}, EXPERTS * 17 // 32 // 2, 1),
        ({"mesh": MeshSettings(model=8)}, EXPERTS * 17 // 32 // 8, 2),
    ],
)
def test_dense_experts_other_optimisers_and_other_meshes(change, experts, optimizer):
    found = with_fields(**change).held
    assert found["experts"] == experts
    assert 0 <= found["optimizer"] - optimizer * found["master_weights"] < 100  # counters, a rate and a key


def test_one_device_holds_everything(memory):
    found = with_fields(mesh=MeshSettings()).held
    assert found["experts"] == 2 * memory["experts"]
    assert found["master_weights"] > 7 * memory["master_weights"]


def test_a_teachers_cache_is_part_of_the_batch():
    loss = LossSettings(forward_kl=0.0, top_k_kl=1.0)
    job = with_fields(loss=loss, teacher_cache=Path("cache"), top_k=7, mesh=MeshSettings())
    extras = {name: (leaf.shape, leaf.dtype) for name, leaf in job.batch.extras.items()}
    assert extras == {
        "teacher_ids": ((3, 4, 36, 7), jnp.int32),
        "teacher_logits": ((3, 4, 36, 7), jnp.float16),
        "teacher_log_total": ((3, 4, 36), jnp.float32),
    }
    assert device_bytes(job.batch) == 3 * 4 * 36 * (5 * 4 + 7 * (4 + 2) + 4)
    assert not job.asks_teacher
    assert JOB.asks_teacher


# Experts by their shapes ----------------------------------------------------------------------------------------------


def test_experts_stand_in_by_shape_and_what_runs_later_is_untouched():
    def mixture(x, gates, codes, scales, more):
        experts = Experts(MXFP4(codes, scales), jnp.zeros((8, 128)), MXFP4(*more), jnp.zeros((8, 32)))
        return expert_mlp(x, Routing(jnp.zeros((5, 2), jnp.int32), gates), experts, limit=1.5)

    u8 = jnp.uint8
    given = (
        jax.ShapeDtypeStruct((5, 32), jnp.float16),
        jax.ShapeDtypeStruct((5, 2), jnp.float32),
        jax.ShapeDtypeStruct((8, 128, 16), u8),
        jax.ShapeDtypeStruct((8, 128, 1), u8),
        (jax.ShapeDtypeStruct((8, 32, 32), u8), jax.ShapeDtypeStruct((8, 32, 2), u8)),
    )
    known = list(IMPLEMENTATIONS)
    with pytest.raises(RuntimeError, match="on the way"), kernel_shapes():
        found = jax.eval_shape(mixture, *given)
        slope = jax.eval_shape(jax.grad(lambda *given: mixture(*given).sum(), argnums=(0, 1)), *given)
        text = str(jax.make_jaxpr(mixture)(*given))
        assert "f32[1,128,32]" in text  # one expert is decoded
        assert "f32[8,128,32]" not in text
        raise RuntimeError("on the way")
    assert list(IMPLEMENTATIONS) == known
    assert (found.shape, found.dtype) == ((5, 32), jnp.float16)
    assert [(leaf.shape, leaf.dtype) for leaf in slope] == [((5, 32), jnp.float16), ((5, 2), jnp.float32)]


# Arithmetic -----------------------------------------------------------------------------------------------------------


def test_large_parts_by_hand(memory):
    tokens = 4 * 36 // 4
    padded = (2 * tokens + 4 * 7) // 8 * 8
    masters = memory["master_weights"]
    assert JOB.temporaries(masters) == {
        "sums of gradients, float32": masters,
        "student and gradients of a micro-batch, bfloat16": 2 * (8 * masters // 4) * 2 // 2,
        "output heads and a gradient, not sharded": 98 * 32 * (2 + 2 + 4),
        "input of every layer": 3 * tokens * 32 * 2,
        "attention of one layer": 2 * 3 * (36 * 7 - 7 * 6 // 2) * (4 + 2),  # 2 rows, 12 / 4 heads, windows of 7
        "experts of one layer": padded * (32 * (2 + 8) + 64 * (8 + 2)),
    }
    assert JOB.gathered_on_cpus == (2 * tokens + 4 * 15) // 16 * 3 * 32 * 64 * 2


def test_losses_on_hidden_states_keep_those_of_both_models(memory):
    parts = with_fields(loss=LossSettings(forward_kl=0.0, hidden_cosine=1.0)).temporaries(memory["master_weights"])
    assert parts["hidden states of both models"] == 2 * parts["input of every layer"]
    assert parts["output heads and a gradient, not sharded"] == 98 * 32 * (2 + 4)


HELD = {"experts": 400, "base": 100, "master_weights": 80, "optimizer": 160, "batch": 10, "decoded": JOB.decoded}
FIGURES = Usage(HELD, temporaries=300_000)


def changes(limit):
    return {change.what: change for change in JOB.changes({"step": FIGURES}, "step", limit)}


def test_an_estimate_of_the_job_itself_is_what_was_found():
    assert JOB.estimated(FIGURES, JOB) == FIGURES


def test_half_the_tokens_on_twice_the_devices():
    job = with_fields(mesh=replace(MESH, data=4))
    found = JOB.estimated(FIGURES, job)
    parts, others = JOB.temporaries(80), job.temporaries(40)
    grow = [name for name in parts if "layer" in name]
    assert len(grow) == 3
    ratio = sum(others[name] for name in grow) / sum(parts[name] for name in grow)
    assert 0.5 < ratio < 0.7  # experts' rows are padded
    beyond = FIGURES.temporaries - sum(parts.values())
    assert found.temporaries == pytest.approx(sum(others.values()) + ratio * beyond, abs=1)
    assert found.held == {**HELD, "master_weights": 40, "optimizer": 80, "batch": 5}


def test_changes_are_the_least_that_fit():
    limit = FIGURES.total - 50_000
    found = {what: change for what, change in changes(limit).items() if change.total is not None}
    assert {what: change.settings for what, change in found.items()} == {
        "smaller micro-batches, more of them": {"data.rows": 2, "data.micro_batches": 6},
        "shorter rows": {"data.row_length": 18},
        "more devices, each with fewer rows": {"mesh.data": 4},
        "more devices, each with a part of every row": {"mesh.sequence": 4},
        "more devices, each with fewer experts and heads": {"mesh.model": 8},
    }
    for change in found.values():
        other = replace(JOB, recipe=with_settings(RECIPE, change.settings))
        assert change.total == JOB.estimated(FIGURES, other).total <= limit


def test_nothing_is_found_where_nothing_does():
    assert all(change.total is None for change in changes(1000).values())


# Input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.rows": 5}, "data.rows is 5, but must be a multiple of mesh.data (2)"),
        ({"data.row_length": 35}, "data.row_length is 35, but must be a multiple of mesh.sequence (2)"),
        ({"data.micro_batches": 0}, "micro_batches is 0, but must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        with_settings(RECIPE, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k is 0, but must be at least 1"),
        (
            {"teacher_cache": Path("cache")},
            "loss.top_k_kl is 0.0 and teacher_cache is cache, but the one needs the other",
        ),
        ({"train": ("experts",)}, "train has 'experts', but a plan is for experts that are frozen"),
    ],
)
def test_a_job_that_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        with_fields(**change)


def test_experts_that_cannot_be_packed_are_refused():
    child = replace(FIRST, parent=replace(PARENT, hidden_size=40))
    with pytest.raises(ConfigError, match="hidden_size is 40, but packed experts need a multiple of 32"):
        PlannedDistillation(child, RECIPE)
    assert not PlannedDistillation(child, RECIPE, packed=False).packed


def _config(model):
    return json.dumps(write_config(model, {"quantization_config": MXFP4_EXPERTS}))


@pytest.fixture
def configs(tmp_path):
    """Paths of a parent's and a child's config.json, the second in a directory."""
    parent, child = tmp_path / "parent.json", tmp_path / "child"
    child.mkdir()
    parent.write_text(_config(PARENT))
    (child / "config.json").write_text(_config(CHILD.config))
    return parent, child


def _main(parent, child, *more):
    shape = ["--mesh", "data=2,sequence=2,model=2", "--data", "row_length=36,rows=4,micro_batches=3"]
    return main(["distill", "--parent", str(parent), "--child", str(child), *shape, *more])


@pytest.fixture
def planned(monkeypatch, usage):
    """Replaces compilation, and checks that the command's job is the one of these tests."""

    def found(programs):
        job = programs["step"].__self__
        assert (job.child, job.packed) == (JOB.child, True)
        assert all(getattr(job.recipe, name) == getattr(RECIPE, name) for name in ("data", "loss", "mesh", "optimizer"))
        return {"step": usage}

    monkeypatch.setattr(command, "compiled", found)


def test_the_command_prints_the_plan(configs, usage, planned, capsys):
    assert _main(*configs) == 0
    out = capsys.readouterr().out
    assert "parent.json -> child on 2 x 2 x 2 devices, 3 x 4 rows of 36 tokens a step" in out
    assert re.search(r"GB per device +┃ +step +┃ +step by arithmetic", out)
    by_arithmetic = sum(JOB.temporaries(usage.held["master_weights"]).values())
    assert re.search(rf"temporaries +│ +{usage.temporaries / 1e9:.3f} +│ +{by_arithmetic / 1e9:.3f}", out)
    assert "experts, MXFP4" in out
    assert f"fits: {80 - usage.total / 1e9:.1f} GB are left" in out


def test_the_command_says_what_would_do(configs, usage, planned, capsys):
    limit = (usage.total - 100_000) / 1e9
    assert _main(*configs, "--hbm-gb", str(limit)) == 0
    out = capsys.readouterr().out
    assert "0.0 GB too many" in out
    assert "shorter rows: --data.row_length 18: " in out
    assert "a teacher's cache would save its pass" in out


def test_the_command_prints_json(configs, usage, planned, capsys):
    limit = (usage.total - 100_000) / 1e9
    assert _main(*configs, "--hbm-gb", str(limit), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["programs"]["step"]["held"] == usage.held
    assert (found["fits"], found["device_bytes"]) == (False, usage.total - 100_000)
    assert {"data.row_length": 18} in [change["settings"] for change in found["changes"]["step"]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mesh", "2,2"), "--mesh is '2,2', but must be a mapping of data, sequence, model, processes"),
        (("--mesh", "data=3,sequence=1,model=1"), "data.rows is 4, but must be a multiple of mesh.data (3)"),
        (("--mesh", "data=4,sequence=4,model=4"), "a mesh of 4 x 4 x 4 needs 64 devices, but 8 are present"),
        (("--mesh", "data=0,sequence=1,model=1"), "mesh.data is 0, but must be at least 1"),
        (("--hbm-gb", "nan"), "hbm_gb is nan, but must be a finite number above 0"),
        (("--hardware", "h10"), "hardware is 'h10', but must be one of a100, h100"),
        (("--loss", "kl=1"), "--loss has the field loss.kl, which does not exist"),
        (("--loss", "jsd=much"), "loss.jsd is 'much', but must be a number"),
        (("--teacher-cache", "cache", "--loss", "jsd=1"), "loss.top_k_kl is 0.0 and teacher_cache is cache"),
    ],
)
def test_bad_options_are_one_sentence(configs, capsys, more, message):
    assert _main(*configs, *more) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("child", "message"),
    [
        (
            replace(PARENT, blocks=(BlockConfig(8, 5), BlockConfig(9, None), BlockConfig(8, None))),
            "layer 1 has 9 experts, but its parent",
        ),
        (replace(PARENT, vocab_size=99), "vocab_size is 99, but its parent"),
        (replace(PARENT, blocks=PARENT.blocks[:2]), "num_layers is 2, but its parent"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_child_of_another_parent_is_one_sentence(configs, tmp_path, capsys, child, message):
    path = tmp_path / "other.json"
    if child is not None:
        path.write_text(_config(child))
    assert _main(configs[0], path) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error
