"""Distillation against a naive computation on whole logits, and blockwise distillation against one layer by layer."""

from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.sharding import make_training_mesh, on_mesh
from puzzle_jax.model.spec import EXPERT_MATRICES
from puzzle_jax.model.stacked import stack_params, unstack_params
from puzzle_jax.train.distill.blocks import Blocks
from puzzle_jax.train.distill.objectives import DISTRIBUTION, HIDDEN, Distillation, Fixed, LossSettings
from puzzle_jax.train.fake_quant import fake_quantize
from puzzle_jax.train.losses import definitions as losses
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.rows import pack
from puzzle_jax.train.student import TRAINABLE, Student
from tests.train import toy_student as toy
from tests.train.toy_student import LENGTH, ROWS, SHORT, close, jit, random_master_weights

K, TEMPERATURE = 6, 2.0
SETTINGS = LossSettings(
    forward_kl=0.5,
    reverse_kl=0.2,
    jsd=0.7,
    top_k_kl=0.3,
    next_token=0.1,
    hidden_cosine=1.5,
    hidden_mse=0.4,
    temperature=TEMPERATURE,
    token_chunk=32,  # 3 groups of the 96 tokens
    vocab_chunk=40,  # 3 slices of the 98 words
)
STUDENT = Student(SHORT, TRAINABLE)


@pytest.fixture(scope="module")
def setting():
    """The parent's weights, packed and dense; fp32 master weights for all of them; rows with a teacher's top k."""
    packed = toy.packed_params(SHORT)
    params = toy.dense(packed)
    return packed, params, random_master_weights(STUDENT, STUDENT.stacked(params)), toy.batch(random_top_k())


def random_top_k():
    """For every position, K distinct tokens that hold three quarters of the probability."""
    rng = np.random.default_rng(11)
    ids = rng.permuted(np.tile(np.arange(98, dtype=np.int32), (ROWS, LENGTH, 1)), axis=-1)[..., :K]
    logits = -np.sort(3 * rng.random((ROWS, LENGTH, K)), axis=-1).astype(np.float16)
    total = np.log(np.exp(logits.astype(np.float32) / TEMPERATURE).sum(-1) / 0.75)
    return {"teacher_ids": ids, "teacher_logits": logits, "teacher_log_total": total}


def with_gradient(objective):
    def run(trained, base, batch):
        loss = objective(trained, Fixed(base), batch)
        return loss.total, loss

    return jax.value_and_grad(run, has_aux=True)


DISTIL = jit(with_gradient(Distillation(STUDENT, SETTINGS)))


@pytest.fixture(scope="module")
def found(setting):
    _, params, trained, batch = setting
    (_, loss), gradient = DISTIL(trained, STUDENT.stacked(params), batch)
    return loss, gradient


def rounded(own):
    layers = [
        layer | {"moe": layer["moe"] | {name: fake_quantize(layer["moe"][name]) for name in EXPERT_MATRICES}}
        for layer in own["layers"]
    ]
    return own | {"layers": layers}


@jit
def naive_distillation(own, params, batch):
    """Value, terms and gradient of the definitions on whole logits; `own` holds the fp32 master weights by layer."""

    def total(own):
        own = rounded(own)
        x, y = toy.student_states(own, batch, SHORT), jax.lax.stop_gradient(toy.teacher_states(params, batch, SHORT))
        s, t = toy.logits(own, x[-1]), toy.logits(params, y[-1])
        top_k = losses.TopK(*(batch.extras[f"teacher_{name}"] for name in ("ids", "logits", "log_total")))
        per_token = {
            "forward_kl": losses.forward_kl(t, s, TEMPERATURE),
            "reverse_kl": losses.reverse_kl(t, s, TEMPERATURE),
            "jsd": losses.jsd(t, s, TEMPERATURE),
            "top_k_kl": losses.top_k_kl(top_k, s, TEMPERATURE),
            "next_token": losses.next_token(s, batch.targets),
            "hidden_cosine": losses.hidden_cosine(x[1:], y[1:]).mean(0),
            "hidden_mse": losses.hidden_mse(x[1:], y[1:]).mean(0),
        }
        terms = {name: jnp.sum(batch.weights * values) for name, values in per_token.items()}
        return sum(asdict(SETTINGS)[name] * value for name, value in terms.items()), terms

    return jax.value_and_grad(total, has_aux=True)(own)


# Distillation


def test_values_and_gradients_are_those_of_whole_logits(setting, found):
    _, params, trained, batch = setting
    loss, gradient = found
    (total, terms), expected = naive_distillation(unstack_params(trained, STUDENT.runs), params, batch)
    assert set(loss.terms) == {*DISTRIBUTION, *HIDDEN}
    close((loss.total, loss.terms), (total, terms))
    assert all(float(term) > 0.1 for term in terms.values())
    assert float(loss.weight) == batch.weights.sum() > 10
    close(unstack_params(gradient, STUDENT.runs), expected, 1e-4)


def test_trainable_routers_and_kept_experts_have_gradients_and_lost_ones_none(setting, found):
    _, gradient = found
    for layer, block in zip(unstack_params(gradient, STUDENT.runs)["layers"], SHORT.blocks, strict=True):
        kept = np.isin(np.arange(8), block.kept)
        for name in ("gate_up", "gate_up_bias", "down", "down_bias", "router_bias"):
            learning = np.any(np.asarray(layer["moe"][name]).reshape(8, -1), axis=-1)
            assert not learning[~kept].any() and learning[kept].sum() >= 3  # a few are never routed to
        learning = np.any(np.asarray(layer["moe"]["router_weight"]), axis=0)
        assert not learning[~kept].any() and learning[kept].sum() >= 3


@pytest.mark.parametrize("trainable", [(), ("router",), ("experts",)])
def test_what_is_frozen_has_no_gradient(setting, trainable):
    packed, _, _, batch = setting
    student = Student(SHORT, trainable)
    base = jax.eval_shape(student.stacked, packed)
    trained = jax.eval_shape(student.master_weights, base)
    objective = with_gradient(Distillation(student, LossSettings()))
    _, gradient = jax.eval_shape(objective, trained, base, batch)
    for run in gradient["runs"]:
        moe = run[0]["moe"]
        assert (moe["router_weight"] is None) == ("router" not in trainable)
        assert (moe["down"] is None) == (moe["gate_up_bias"] is None) == ("experts" not in trainable)
        assert moe["norm"] is not None


def test_micro_batches_add_up(setting, found):
    """The first row and the other three, computed separately, add up to the batch."""
    _, params, trained, batch = setting
    base = STUDENT.stacked(params)
    nothing = pack([[]] * ROWS, LENGTH, toy.PAD)
    parts = []
    for rows in ([0], [1, 2, 3]):
        here = np.isin(np.arange(ROWS), rows)[:, None]
        part = jax.tree.map(
            lambda values, empty, here=here: np.where(here, values, empty), batch._replace(extras={}), nothing
        )
        (_, loss), gradient = DISTIL(trained, base, part._replace(extras=batch.extras))
        parts.append((loss, gradient))
    assert all(float(loss.weight) > 0 for loss, _ in parts)
    close(jax.tree.map(np.add, *parts), found, 1e-5)


def test_positions_of_weight_zero_do_not_count(setting, found):
    """Their targets and top k do not matter; and if all weights are 0, so are the losses and gradients."""
    _, params, trained, batch = setting
    base, dead = STUDENT.stacked(params), batch.weights == 0
    extras = dict(batch.extras)
    for name in ("teacher_logits", "teacher_log_total"):
        extras[name] = extras[name].copy()
        extras[name][dead] = np.nan
    (_, loss), gradient = DISTIL(trained, base, batch._replace(targets=batch.targets * ~dead, extras=extras))
    jax.tree.map(np.testing.assert_array_equal, (loss, gradient), found)
    (_, loss), gradient = DISTIL(trained, base, batch._replace(weights=np.zeros_like(batch.weights)))
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves((loss, gradient)))


@pytest.mark.parametrize("sizes,form", [((4, 1, 2), "dense"), ((2, 2, 2), "packed")])
def test_a_mesh_computes_what_one_device_does(setting, found, sizes, form):
    packed, params, trained, batch = setting
    placement = Placement(make_training_mesh(*sizes))
    # Placed from the host: resharding between devices would compile a program for every shape.
    base, trained = jax.device_get((STUDENT.stacked(packed if form == "packed" else params), trained))
    base = placement.base(base, SHORT.parent)
    experts = base["runs"][0][0]["moe"]["down"]
    stored = experts.codes if form == "packed" else experts
    assert stored.sharding.shard_shape(stored.shape)[:2] == (2, 4)  # 2 layers, half of the 8 experts
    shardings = placement.master_weights(trained)
    masters = jax.device_put(trained, shardings)
    for leaf in jax.tree.leaves(masters):
        if any(size % 8 == 0 for size in leaf.shape):
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    run = jit(with_gradient(Distillation(STUDENT, SETTINGS)), out_shardings=(None, shardings))
    with on_mesh(placement.mesh):
        (_, loss), gradient = run(masters, base, placement.rows(batch))
    assert jax.tree.map(lambda leaf: leaf.sharding, gradient) == shardings
    close((loss, gradient), found, 1e-4)


def test_a_student_with_values_of_its_own_compiles(setting):
    """`jax.jit` must be able to hash the objective."""
    _, params, _, batch = setting
    student = Student(replace(SHORT, dense_delta={"final_norm": np.ones(32, np.float32)}))
    base = jax.eval_shape(student.stacked, params)
    objective = jax.jit(Distillation(student, LossSettings(next_token=1.0)))
    loss = objective.eval_shape(jax.eval_shape(student.master_weights, base), Fixed(base), batch)
    assert loss.total.shape == () and list(loss.terms) == ["forward_kl", "next_token"]


def test_without_terms_of_a_teacher_none_is_asked(setting):
    _, params, trained, batch = setting
    base = jax.eval_shape(STUDENT.stacked, params)

    def program(**terms):
        settings = LossSettings(**{"forward_kl": 0.0, **terms})
        return jax.jit(Distillation(STUDENT, settings)).lower(trained, Fixed(base), batch).as_text(debug_info=True)

    assert "teacher/" not in program(top_k_kl=1.0, next_token=1.0)
    assert "teacher/" in program(hidden_mse=1.0)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"forward_kl": 0.0}, "all terms of loss are 0, but at least one must be above"),
        ({"jsd": -0.5}, "loss.jsd is -0.5, but must be at least 0"),
        ({"hidden_cosine": float("nan")}, "loss.hidden_cosine is nan, but must be a finite number"),
        ({"next_token": float("inf")}, "loss.next_token is inf, but must be a finite number"),
        ({"temperature": 0.0}, "loss.temperature is 0.0, but must be at least 0.001"),
        ({"temperature": float("nan")}, "loss.temperature is nan, but must be from 0.001 to 1e"),
        ({"token_chunk": 0}, "loss.token_chunk is 0, but must be at least 1"),
        ({"vocab_chunk": -1}, "loss.vocab_chunk is -1, but must be at least 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as refused:
        LossSettings(**changes)
    assert "\n" not in str(refused.value)


def test_terms_that_count():
    assert LossSettings(hidden_mse=0.5).shares == {"forward_kl": 1.0, "hidden_mse": 0.5}


# Blocks

LOCAL = Student(SHORT, ("experts",), ends=False)
BLOCKS = jit(with_gradient(Blocks(LOCAL)))


@jit
def naive_blocks(own, params, batch):
    """Runs each layer on the parent's input to it; `own` holds the fp32 master weights by layer, None where frozen."""
    live = (batch.segment_ids > 0).astype(jnp.float32)[..., None]
    states = toy.teacher_states(params, batch, SHORT)
    table = rope_table(SHORT.viewed.rope, SHORT.parent.head_dim, batch.positions)

    def total(own):
        errors = []
        for index, (layer, of_parent) in enumerate(zip(own["layers"], params["layers"], strict=True)):
            moe = {name: of_parent["moe"][name] if value is None else value for name, value in layer["moe"].items()}
            (layer,) = rounded({"layers": [layer | {"moe": moe}]})["layers"]
            x, block = states[index], SHORT.blocks[index]
            added = toy.one_layer(layer, SHORT.viewed, x, table, batch, block.window, block.kept) - x
            wanted = states[index + 1] - x
            errors.append(jnp.sum(live * (added - wanted) ** 2) / jnp.sum(live * wanted**2))
        return live.sum() * sum(errors) / len(errors), jnp.stack(errors)

    return jax.value_and_grad(total, has_aux=True)(own)


def test_blocks_are_compared_layer_by_layer_and_learn_alone(setting):
    packed, params, _, batch = setting
    base = LOCAL.stacked(packed)
    trained = random_master_weights(LOCAL, base)
    (total, loss), gradient = BLOCKS(trained, base, batch)
    (expected, errors), expected_gradient = naive_blocks(unstack_params(trained, LOCAL.runs), params, batch)
    close(total, expected, 1e-4)
    tokens = 9 + 11 + 24 + 13 + 6
    assert float(loss.weight) == tokens
    close(loss.terms, {"block_mse": expected, "worst_block_mse": tokens * errors.max()}, 1e-4)
    assert errors.min() > 0.01 and errors.max() > 1.2 * errors.min()
    by_layer = unstack_params(gradient, LOCAL.runs)
    close(by_layer, expected_gradient, 3e-4)
    assert by_layer["embedding"] is None and by_layer["layers"][0]["moe"]["router_weight"] is None
    # If another layer of the same run, the first, changes, only that layer's gradient does.
    other = unstack_params(trained, LOCAL.runs)
    other["layers"][0] = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, other["layers"][0])
    _, gradient = BLOCKS(stack_params(other, LOCAL.runs), base, batch)
    changed = unstack_params(gradient, LOCAL.runs)["layers"]
    jax.tree.map(np.testing.assert_array_equal, changed[1], by_layer["layers"][1])
    for one, before in zip(jax.tree.leaves(changed[0]), jax.tree.leaves(by_layer["layers"][0]), strict=True):
        assert not np.array_equal(one, before)


def test_blocks_have_no_use_for_ends():
    with pytest.raises(ValueError, match="embedding, final norm and head have no block to learn in"):
        Blocks(STUDENT)
