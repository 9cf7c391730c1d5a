"""A student computes what the child cut from the same values does, and only trainable weights have fp32 masters."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.model.child import cut_params, delta_leaves, with_delta
from puzzle_jax.model.spec import EXPERT_MATRICES
from puzzle_jax.model.stacked import VARIABLE, LayerRun, stack_params, unstack_params
from puzzle_jax.train.fake_quant import round_to_mxfp4
from puzzle_jax.train.losses.head import Head
from puzzle_jax.train.student import TRAINABLE, Student, head_of
from tests.train import toy_student as toy
from tests.train.toy_student import CHILD, close, jit, random_master_weights

ROUTER = {"router_weight", "router_bias"}
EXPERTS = {"gate_up", "gate_up_bias", "down", "down_bias"}
ENDS = {"embedding", "final_norm", "head"}
ATTENTION = {"norm", "q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias", "o_weight", "o_bias", "sinks"}


STUDENT_STATES = jit(toy.student_states)


@pytest.fixture(scope="module")
def parent():
    """The parent's weights, with packed experts and with dense ones."""
    packed = toy.packed_params()
    return packed, toy.dense(packed)


def owning(delta, trainable=TRAINABLE, **options):
    return Student(toy.replace_delta(delta), trainable, **options)


# Passes


def test_it_computes_what_the_parent_s_blocks_and_the_cut_child_do(parent):
    """With its own values for everything that can be trained, including experts off MXFP4's grid."""
    _, params = parent
    student, batch = Student(CHILD, TRAINABLE), toy.batch()
    assert student.runs == (LayerRun(0, 1, 1), LayerRun(1, 1, 2))
    base = student.stacked(params)
    trained = random_master_weights(student, base)
    found = jit(lambda r, t, b: student.hidden(r, t, b, keep_states=True))(base, trained, batch)
    delta = student.delta(trained)
    as_view = STUDENT_STATES(with_delta(params, delta), batch)
    np.testing.assert_allclose(found.states, as_view[1:], atol=1e-4)
    np.testing.assert_array_equal(found.x, found.states[-1])
    cut = toy.replace_delta(delta)
    windows = [block.window for block in cut.blocks]
    as_cut = jit(lambda p, b: toy.states(p, cut.config, b, windows))(cut_params(jax.device_get(params), cut), batch)
    np.testing.assert_allclose(found.states, as_cut[1:], atol=1e-4)
    live = batch.segment_ids > 0
    assert np.abs(as_view - STUDENT_STATES(params, batch))[:, live].mean() > 0.1  # without its own values
    close(head_of(trained), Head(delta["final_norm"], delta["head"]), 0)


def test_packed_parents_give_what_dense_ones_give(parent):
    """As a teacher, and as the base of a student with its own router."""
    packed, params = parent
    student, batch = Student(CHILD, ("router",)), toy.batch()
    base = student.stacked(packed)
    teacher = jit(lambda r, b: student.teacher_hidden(r, b, keep_states=True))(base, batch)
    np.testing.assert_allclose(teacher.states, toy.TEACHER_STATES(params, batch)[1:], atol=1e-4)
    trained = random_master_weights(student, base)
    own = jit(student.hidden)(base, trained, batch)
    expected = STUDENT_STATES(with_delta(params, student.delta(trained)), batch)
    np.testing.assert_allclose(own.x, expected[-1], atol=1e-4)
    assert own.states is None


def test_another_child_s_masks_and_windows_as_data(parent):
    """A student of the whole parent computes what a child's own does; gradients, too."""
    _, params = parent
    batch, own = toy.batch(), Student(CHILD, TRAINABLE)
    whole = replace(CHILD, blocks=tuple(replace(block, kept=tuple(range(8))) for block in CHILD.blocks))
    shared = Student(whole, TRAINABLE, variable=frozenset({1, 2}))
    assert shared.windows == (5, VARIABLE, VARIABLE) and shared.runs == own.runs
    base = own.stacked(params)
    trained = random_master_weights(own, base)

    def loss(student, view):
        return lambda trained: jnp.mean(jnp.square(student.hidden(base, trained, batch, view=view).x))

    expected = jit(jax.value_and_grad(loss(own, None)))(trained)
    found = jit(jax.value_and_grad(loss(shared, CHILD.view)))(trained)
    close(found, expected, 1e-4)
    assert abs(float(jit(loss(shared, whole.view))(trained)) - float(expected[0])) > 1e-4


# Master weights


@pytest.mark.parametrize("trainable", [(), ("router",), ("experts",), ("router", "experts")])
@pytest.mark.parametrize("ends", [True, False])
def test_masters_are_there_for_what_learns_alone(parent, trainable, ends):
    student = Student(CHILD, trainable, ends=ends)
    learns = ATTENTION | (ENDS if ends else set())
    learns |= (ROUTER if "router" in trainable else set()) | (EXPERTS if "experts" in trainable else set())
    for weights in parent:
        base = jax.eval_shape(student.stacked, weights)
        masters = jax.eval_shape(student.master_weights, base)
        assert set(masters) == set(base)
        assert {name for name in ENDS if masters[name] is not None} == ENDS & learns
        for masters_of, base_of in zip(masters["runs"], base["runs"], strict=True):
            (layer,), (of_parent,) = masters_of, base_of
            for block in ("attention", "moe"):
                assert set(layer[block]) == set(of_parent[block])
                there = {name for name, master in layer[block].items() if master is not None}
                assert there == set(of_parent[block]) & learns
        assert {leaf.dtype for leaf in jax.tree.leaves(masters)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_masters_begin_as_copies_of_the_parent_s(parent, form):
    student = Student(CHILD, TRAINABLE)
    base = student.stacked(parent[form == "dense"])
    begin = jit(student.master_weights)(base)
    close(unstack_params(begin, student.runs), parent[1], 0)
    assert begin["head"].unsafe_buffer_pointer() != base["head"].unsafe_buffer_pointer()
    close(jit(student.params)(base, begin), stack_params(parent[1], student.runs), 0)  # experts survive rounding


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_masters_begin_at_what_a_child_was_trained_to(parent, form):
    """Layer 1 lacks its own values for a bias and an expert matrix; layer 2 of the same run has both."""
    delta = toy.own_delta(parent[1])
    delta["layers"][1]["moe"]["down"] = None
    student = owning(delta)
    begin = unstack_params(jit(student.master_weights)(student.stacked(parent[form == "dense"])), student.runs)
    close(begin, with_delta(parent[1], delta), 0)
    np.testing.assert_array_equal(begin["layers"][1]["moe"]["down"], parent[1]["layers"][1]["moe"]["down"])
    np.testing.assert_array_equal(begin["layers"][2]["moe"]["down"], delta["layers"][2]["moe"]["down"])


def test_a_delta_may_hold_few_names(parent):
    norm = np.full(32, 2.0, np.float32)
    delta = {"layers": [None, {"attention": {"norm": norm}}, None]}
    student = owning(delta, ())
    begin = unstack_params(jit(student.master_weights)(student.stacked(parent[1])), student.runs)
    np.testing.assert_array_equal(begin["layers"][1]["attention"]["norm"], norm)
    np.testing.assert_array_equal(begin["layers"][2]["attention"]["norm"], parent[1]["layers"][2]["attention"]["norm"])
    assert begin["layers"][1]["moe"]["router_weight"] is None


# Export


def test_the_delta_is_the_parent_s_structure_with_experts_on_the_grid(parent):
    student = Student(CHILD, TRAINABLE)
    base = student.stacked(parent[0])
    trained = random_master_weights(student, base)
    delta = student.delta(trained)
    assert jax.tree.structure(delta) == jax.tree.structure(parent[1])
    assert len(delta_leaves(CHILD.parent, delta)) == len(jax.tree.leaves(parent[1]))
    masters = unstack_params(trained, student.runs)
    used = unstack_params(jit(student.params)(base, trained), student.runs)
    close(delta, used, 0)
    for layer, of_masters in zip(delta["layers"], masters["layers"], strict=True):
        for name in EXPERT_MATRICES:
            np.testing.assert_array_equal(round_to_mxfp4(jnp.asarray(layer["moe"][name])), layer["moe"][name])
            assert 0.01 < np.abs(layer["moe"][name] - of_masters["moe"][name]).max() < 0.3
            layer["moe"][name] = of_masters["moe"][name]
    close(delta, masters, 0)


def test_what_is_frozen_goes_out_as_none_and_keeps_its_arrays(parent):
    student = Student(CHILD, ends=False)
    base = student.stacked(parent[0])
    trained = student.master_weights(base)
    delta = student.delta(trained)
    assert delta["head"] is None and delta["layers"][2]["moe"]["gate_up"] is None
    assert delta["layers"][2]["moe"]["norm"].shape == (32,)
    params = student.params(base, trained)
    assert params["head"] is base["head"]
    for positions, of_base in zip(params["runs"], base["runs"], strict=True):
        for name in EXPERT_MATRICES:
            assert positions[0]["moe"][name].codes is of_base[0]["moe"][name].codes


def test_parameters_are_used_in_the_resident_s_dtype(parent):
    student = Student(CHILD, TRAINABLE)

    def in_half(weights):
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
        base = student.stacked(half)
        return student.params(base, student.master_weights(base))

    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(in_half, parent[1]))} == {np.dtype(jnp.bfloat16)}


def test_routers_alone(parent):
    student = Student(CHILD, ("router",), dense=False)
    trained = student.master_weights(student.stacked(parent[1]))
    names = {path[-1].key for path, _ in jax.tree.leaves_with_path(trained)}
    assert names == ROUTER
    found = {name for name in ATTENTION | ENDS | EXPERTS | ROUTER if student.learns(name)}
    assert found == ROUTER


# Refusals


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="train has 'experts_router', but must be of router, experts"):
        Student(CHILD, ("router", "experts_router"))


def test_something_has_to_learn():
    with pytest.raises(ConfigError, match="dense is false and train is empty, but something has to learn; name router"):
        Student(CHILD, (), dense=False)


def test_dense_values_are_not_lost_either(parent):
    with pytest.raises(ConfigError, match=r"its own for .*; set dense to true"):
        owning(toy.own_delta(parent[1]), dense=False)


@pytest.mark.parametrize(
    "trainable,ends,message",
    [
        (("router",), True, r"its own for layers\.0\.moe\.gate_up, .*; name experts in train"),
        (("experts",), True, r"its own for layers\.0\.moe\.router_weight, .*; name router in train"),
        (TRAINABLE, False, "its own for embedding, .*; train it as a whole, not its blocks"),
    ],
)
def test_a_child_s_own_values_are_not_lost_by_freezing_them(parent, trainable, ends, message):
    with pytest.raises(ConfigError, match=message):
        owning(toy.own_delta(parent[1]), trainable, ends=ends)
