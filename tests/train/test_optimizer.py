"""Optimisers: first updates and schedules by hand, and which parameters do not decay."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.train.optimizer import OptimizerSettings, decays, make_optimizer, make_schedule

PLAIN = OptimizerSettings(learning_rate=0.5, schedule="constant", clip_norm=None, b1=0.8, b2=0.6)


def rates(steps, counts, **changes):
    schedule = make_schedule(replace(PLAIN, learning_rate=2.0, final_fraction=0.25, **changes), steps)
    return [float(schedule(count)) for count in counts]


def test_schedules_by_hand():
    assert rates(10, [0, 5, 10, 99], schedule="constant") == [2.0] * 4
    assert rates(10, [0, 1, 3, 4], schedule="constant", warmup_steps=4) == [0.5, 1.0, 2.0, 2.0]
    assert rates(12, [3, 4, 8, 12, 20], schedule="linear", warmup_steps=4) == [2.0, 2.0, 1.25, 0.5, 0.5]
    cosine = rates(12, [0, 4, 6, 8, 12], schedule="cosine", warmup_steps=4)
    quarter = 0.5 + 1.5 * (1 + np.cos(np.pi / 4)) / 2
    np.testing.assert_allclose(cosine, [0.5, 2.0, quarter, 1.25, 0.5], rtol=1e-6)
    assert rates(20, [0, 1, 14, 15, 17, 20], schedule="wsd", warmup_steps=2, decay_fraction=0.25) == pytest.approx(
        [1.0, 2.0, 2.0, 2.0, 1.4, 0.5]
    )
    # A decay that would begin during the warmup begins after it; a run that is all warmup has no decay.
    assert rates(4, [1, 2, 3], schedule="wsd", warmup_steps=2, decay_fraction=1.0) == [2.0, 2.0, 1.25]
    assert rates(2, [0, 1], schedule="linear", warmup_steps=2) == [1.0, 2.0]


def tree(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    layer = {"norm": draw(2, 5), "q_weight": draw(2, 5, 7), "q_bias": draw(2, 7), "sinks": draw(2, 3), "down": None}
    return {"embedding": draw(11, 5), "runs": [[{"attention": layer}]], "final_norm": draw(5), "head": draw(5, 11)}


def first_update(settings):
    """Gradients, parameters and the first update as flat dictionaries, and the optimiser's state."""
    optimizer = make_optimizer(settings, 10)
    gradients, params = tree(0), tree(1)
    updates, state = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(gradients, params)
    names = lambda t: {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(t)}  # noqa: E731
    return names(gradients), names(params), names(updates), state


DIRECTIONS = {
    "adamw": lambda g: g / (np.abs(g) + 1e-8),
    "adam": lambda g: g / (np.abs(g) + 1e-8),
    "lion": np.sign,
    "sgd": lambda g: g,
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_first_updates_by_hand(name):
    decay = 0.0 if name == "adam" else 0.3
    gradients, params, updates, state = first_update(replace(PLAIN, name=name, weight_decay=decay))
    assert len(updates) == 7
    for path, gradient in gradients.items():
        matrix = any(name in path for name in ("embedding", "q_weight", "head"))
        expected = -0.5 * (DIRECTIONS[name](gradient) + decay * matrix * params[path])
        np.testing.assert_allclose(updates[path], expected, rtol=2e-5, atol=1e-6, err_msg=path)
    assert float(optax.tree_utils.tree_get(state, "learning_rate")) == 0.5


def test_only_matrices_decay():
    found = {
        jax.tree_util.keystr(path[-1:], simple=True) for path, yes in jax.tree.leaves_with_path(decays(tree(0))) if yes
    }
    assert found == {"embedding", "q_weight", "head"}
    bias = {"gate_up_bias": jnp.ones((4, 3, 2)), "router_weight": jnp.ones((4, 3)), "gate_up": jnp.ones((4, 3, 2, 2))}
    assert decays(bias) == {"gate_up_bias": False, "router_weight": True, "gate_up": True}


def test_clipping_scales_the_whole_gradient_down_and_never_up():
    settings = replace(PLAIN, name="sgd", b1=0.0)
    gradients, _, plain, _ = first_update(settings)
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradients.values()))
    _, _, clipped, _ = first_update(replace(settings, clip_norm=norm / 4))
    _, _, loose, _ = first_update(replace(settings, clip_norm=norm * 4))
    for path, update in plain.items():
        np.testing.assert_allclose(clipped[path], update / 4, rtol=1e-5)
        np.testing.assert_array_equal(loose[path], update)


def test_muon_takes_each_layer_of_a_stack_by_itself_and_adam_the_rest():
    gradients, params, updates, _ = first_update(replace(PLAIN, name="muon", weight_decay=0.3))
    path = next(path for path in updates if "q_weight" in path)
    for layer in range(2):
        left, _, right = np.linalg.svd(gradients[path][layer], full_matrices=False)
        direction = -updates[path][layer] / 0.5 - 0.3 * params[path][layer]
        direction /= 0.2 * np.sqrt(7)
        # Five Newton-Schulz iterations bring singular values to between 0.7 and 1.2, no nearer to 1.
        values = np.diag(left.T @ direction @ right.T)
        assert values.min() > 0.6 and values.max() < 1.3
        np.testing.assert_allclose(left @ np.diag(values) @ right, direction, atol=1e-3)
    for name in ("embedding", "head", "q_bias", "final_norm"):
        path = next(path for path in updates if name in path)
        direction = -updates[path] / 0.5 - 0.3 * params[path] * (name in ("embedding", "head"))
        # Nesterov looks one step ahead: (b1 m / (1 - b1^2) + (1 - b1) g / (1 - b1)) / sqrt(v) with m = (1 - b1) g.
        size = 0.8 * 0.2 / (1 - 0.8**2) + 1
        np.testing.assert_allclose(direction, size * np.sign(gradients[path]), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adagrad"}, "optimizer.name is 'adagrad', but must be one of adamw, adam, sgd, lion, muon"),
        ({"schedule": "step"}, "optimizer.schedule is 'step', but must be one of constant, cosine, linear, wsd"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate is 0.0, but must be above 0"),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate is nan, but must be a finite number"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm is -1.0, but must be above 0"),
        ({"eps": 0.0}, "optimizer.eps is 0.0, but must be above 0"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps is -1, but must be at least 0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay is -0.1, but must be at least 0"),
        ({"b2": 1.0}, "optimizer.b2 is 1.0, but must be at least 0 and below 1"),
        ({"final_fraction": 1.5}, "optimizer.final_fraction is 1.5, but must be from 0 to 1"),
        ({"name": "adam", "weight_decay": 0.1}, "optimizer.weight_decay is 0.1, but adam has none; adamw does"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerSettings(**changes)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(
        ConfigError, match=r"optimizer.warmup_steps is 11, but must be at most the 10 updates of the run"
    ):
        make_optimizer(replace(PLAIN, warmup_steps=11), 10)
