"""A training step: against NumPy, across micro-batches and meshes, and without effect on non-finite values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from puzzle_jax.model.sharding import fully_sharded, make_training_mesh
from puzzle_jax.train.optimizer import OptimizerSettings, make_optimizer
from puzzle_jax.train.step import Shardings, init_state, make_step
from tests.train import toy_job as toy

SGD = make_optimizer(OptimizerSettings("sgd", 0.25, "constant", b1=0.0, clip_norm=None), 10)
STEP = make_step(toy.loss, SGD)


def start(params=None, key=3):
    return init_state(toy.params() if params is None else params, SGD, jax.random.key(key))


def test_a_step_is_what_numpy_says():
    batch, fixed, params = toy.draw(np.random.default_rng(7)), toy.fixed(0.0), toy.params()
    x, weights = (batch[name].reshape(-1, *batch[name].shape[2:]).astype(np.float64) for name in ("x", "weights"))
    head = np.asarray(params["layers"][0]["head"], np.float64)
    error = x @ head - x @ np.asarray(fixed["teacher"], np.float64)
    gradient = 2 * x.T @ (weights[:, None] * error) / weights.sum()
    norm_gradient = (2 * weights[:, None] * error @ head.T * x).sum(0) / weights.sum()
    state, metrics = STEP(start(), fixed, batch)
    np.testing.assert_allclose(metrics["loss"], (weights[:, None] * error**2).sum() / weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["absolute"], (weights[:, None] * abs(error)).sum() / weights.sum(), rtol=1e-6)
    size = np.sqrt((gradient**2).sum() + (norm_gradient**2).sum())
    np.testing.assert_allclose(metrics["grad_norm"], size, rtol=1e-6)
    np.testing.assert_allclose(state.params["layers"][0]["head"], head - 0.25 * gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.params["norm"], 1 - 0.25 * norm_gradient, rtol=1e-5, atol=1e-6)
    assert (metrics["learning_rate"], metrics["skipped"], state.step, state.skipped) == (0.25, 0.0, 1, 0)


def test_micro_batches_are_one_batch():
    """Micro-batches of unequal weight, one of them 0."""
    batch = toy.draw(np.random.default_rng(8))
    batch["weights"][1] = 0
    whole = {name: x.reshape(1, -1, *x.shape[2:]) for name, x in batch.items()}
    one, one_metrics = STEP(start(), toy.fixed(0.0), whole)
    two, two_metrics = STEP(start(), toy.fixed(0.0), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), one.params, two.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one_metrics, two_metrics)


def test_frozen_leaves_have_no_state_and_masters_are_copies_in_float32():
    given = {"norm": jnp.ones(toy.INPUTS), "layers": [{"head": jnp.ones((7, 3), jnp.bfloat16), "frozen": None}]}
    optimizer = make_optimizer(OptimizerSettings("adamw"), 10)
    state = init_state(given, optimizer, jax.random.key(0))
    assert state.params["layers"][0]["frozen"] is None
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.optimizer))
    assert shapes == sorted([(), (), (), (7,), (7, 3), (7,), (7, 3)])  # two counts, a rate, two moments of two leaves
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    state, _ = STEP(start(given), toy.fixed(), toy.draw(np.random.default_rng(9)))
    assert state.params["layers"][0]["frozen"] is None
    assert float(given["norm"].sum()) == toy.INPUTS  # not donated with the state


def test_noise_depends_on_key_step_and_micro_batch_only():
    batch = toy.draw(np.random.default_rng(8))
    batch = {name: np.stack([x[0], x[0]]) for name, x in batch.items()}  # equal micro-batches get different noise
    one = {name: np.stack([x[0], 0 * x[0]]) for name, x in batch.items()}
    losses = {}
    for name, key, at, rows in (
        ("a", 3, 0, batch),
        ("b", 3, 0, batch),
        ("key", 4, 0, batch),
        ("step", 3, 1, batch),
        ("one", 3, 0, one),
    ):
        state = start(key=key)._replace(step=jnp.int32(at))
        losses[name] = float(STEP(state, toy.fixed(0.5), rows)[1]["loss"])
    assert losses["a"] == losses["b"]
    assert len(set(losses.values())) == 4


@pytest.mark.parametrize("bad", ["nan", "inf", "no weight"])
def test_what_is_not_finite_changes_nothing_and_is_counted(bad):
    step, _ = toy.programs()
    state, _ = step(toy.initial(), toy.fixed(), toy.draw(np.random.default_rng(10)))
    before = jax.tree.map(np.array, (state.params, state.optimizer))
    batch = toy.draw(np.random.default_rng(11))
    if bad == "no weight":
        batch["weights"][:] = 0
    else:
        batch["x"][1, 2, 3] = float(bad)
    for count in (1, 2):
        state, metrics = step(state, toy.fixed(), batch)
        jax.tree.map(np.testing.assert_array_equal, (state.params, state.optimizer), before)
        assert (metrics["skipped"], state.skipped, state.step) == (1.0, count, 1 + count)
        assert not np.isfinite(metrics["loss"])
    state, metrics = step(state, toy.fixed(), toy.draw(np.random.default_rng(12)))
    assert (metrics["skipped"], state.skipped, state.step) == (0.0, 0, 4)
    assert not np.array_equal(state.params["norm"], before[0]["norm"])


def test_a_mesh_computes_the_same_and_state_and_gradients_stay_cut():
    """8 inputs are sharded over 8 devices, 6 rows over 2."""
    mesh = make_training_mesh(2, 1, 4)
    rng = np.random.default_rng(13)
    head, x = rng.standard_normal((8, 3)), rng.standard_normal((2, 6, 8)).astype(np.float32)
    batch = {"x": x, "weights": np.ones((2, 6), np.float32)}
    params = {"norm": np.ones(8, np.float32), "layers": [{"head": head.astype(np.float32), "frozen": None}]}
    fixed = {"teacher": np.ones((8, 3), np.float32), "noise": np.float32(0)}
    optimizer = make_optimizer(toy.SETTINGS, 100)

    def initial():
        return init_state(params, optimizer, jax.random.key(3))

    state = fully_sharded(jax.eval_shape(initial), mesh)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, "data")))
    shardings = Shardings(state, rows)
    step = make_step(toy.loss, optimizer, shardings=shardings)
    cut = jax.jit(initial, out_shardings=state)()
    plain, plain_metrics = toy.programs()[0](initial(), fixed, batch)
    cut, metrics = step(cut, fixed, placed)
    assert cut.params["layers"][0]["head"].addressable_shards[0].data.shape == (1, 3)
    assert jax.tree.map(lambda x: x.sharding, cut) == state
    for one, other in zip(jax.tree.leaves(plain[1:3]), jax.tree.leaves(cut[1:3]), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    assert metrics == pytest.approx({name: float(x) for name, x in plain_metrics.items()}, rel=1e-5)
