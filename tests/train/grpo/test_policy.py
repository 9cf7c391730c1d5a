"""The policy's objective and update against whole logits, plain policy gradients, and the sampler's results."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.generate import Request, generate
from puzzle_jax.model.child import identity_child
from puzzle_jax.model.network import forward, hidden_states
from puzzle_jax.model.sharding import make_training_mesh
from puzzle_jax.model.stacked import unstack_params
from puzzle_jax.train.distill.objectives import Fixed
from puzzle_jax.train.grpo.policy import Policy, answer_numbers, experts_differ, replayed
from puzzle_jax.train.grpo.policy_batches import with_scores
from puzzle_jax.train.grpo.policy_update import PolicyUpdate
from puzzle_jax.train.losses.policy_settings import PolicySettings
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.rows import Example, pack
from puzzle_jax.train.step import Shardings, init_state
from puzzle_jax.train.student import Student
from tests.support import present, random_params, small_config
from tests.train.toy_student import close, jit, random_master_weights

CONFIG = small_config((BlockConfig(7, 5), BlockConfig(5, None), BlockConfig(5, None)))
STUDENT = Student(identity_child(CONFIG))
LENGTH, PAD, K = 28, 96, 2
SIZES = ((12, 5), (15, 4), (19, 9), (11, 3), (17, 16))  # tokens, and how many of them are the prompt
ADVANTAGES = (0.75, -1.5, 0.5, -0.25, 2.0)
CHUNKS = {"token_chunk": 16, "vocab_chunk": 40}


@pytest.fixture(scope="module")
def model():
    params = random_params(CONFIG)
    return params, jax.jit(STUDENT.stacked)(params)


def example(number, **extras):
    size, prompt = SIZES[number]
    rng = np.random.default_rng(20 + number)
    predicts = slice(prompt - 1, size - 1)
    total = sum(size - prompt for size, prompt in SIZES)

    def at_targets(value):
        row = np.zeros(size, np.float32)
        row[predicts] = value
        return row

    given = {
        "coefficients": at_targets(1 / (size - prompt) / len(SIZES)),
        "shares": at_targets(1 / total),
        "advantages": at_targets(ADVANTAGES[number]),
        "sampler": at_targets(-1.0 - rng.random(size - prompt)),
    }
    given |= {name: value(size) for name, value in extras.items()}
    return Example(rng.integers(0, PAD, size).astype(np.int32), prompt, given)


def batch(**extras):
    """One row with two answers, three rows with one each, and an empty row."""
    rows = [[example(i, **extras) for i in row] for row in ((0, 1), (2,), (3,), (4,), ())]
    return pack(rows, LENGTH, PAD)


@jit
def plain_logs(params, tokens):
    """Log-probabilities of all tokens, from whole logits."""
    return jax.nn.log_softmax(forward(params, CONFIG, tokens))


def each_example(params, rows):
    """Yields row, positions and log-probabilities of every example, run alone; padding after it is not attended to."""
    for row in range(len(rows.tokens)):
        for segment in range(1, rows.segment_ids[row].max() + 1):
            here = np.flatnonzero(rows.segment_ids[row] == segment)
            alone = np.zeros((1, LENGTH), np.int32)
            alone[0, : len(here)] = rows.tokens[row, here]
            yield row, here, np.asarray(plain_logs(params, alone))[0, : len(here)]


def plain_log_probs(params, rows):
    """Log-probabilities of the targets."""
    found = np.zeros(rows.tokens.shape, np.float32)
    for row, here, logs in each_example(params, rows):
        found[row, here] = np.take_along_axis(logs, rows.targets[row, here][:, None], 1)[:, 0]
    return np.where(rows.weights > 0, found, 0.0)


@jit
def as_layers(base, masters):
    return unstack_params(STUDENT.params(base, masters), STUDENT.runs)


def policy(name="dapo", **settings):
    return Policy(STUDENT, PolicySettings(name=name, **settings).resolved, **CHUNKS)


@pytest.fixture(scope="module")
def plain_gradient(model):
    """Gradient of -sum of coefficient * advantage * log pi, from whole logits of the packed rows."""
    _, base = model
    rows = batch()

    def plain(trained):
        params = unstack_params(STUDENT.params(base, trained), STUDENT.runs)
        x, _ = hidden_states(
            params,
            CONFIG,
            jnp.asarray(rows.tokens),
            positions=jnp.asarray(rows.positions),
            segment_ids=jnp.asarray(rows.segment_ids),
        )
        x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + CONFIG.rms_norm_eps) * params["final_norm"]
        logs = jax.nn.log_softmax(x @ params["head"])
        chosen = jnp.take_along_axis(logs, jnp.asarray(rows.targets)[..., None], -1)[..., 0]
        factors = rows.extras["coefficients"] * rows.extras["advantages"]
        return -jnp.sum(jnp.where(rows.weights > 0, factors * chosen, 0))

    return jit(jax.grad(plain))(random_master_weights(STUDENT, base))


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_on_policy_the_gradient_is_the_plain_policy_gradient(model, plain_gradient, name):
    """Every ratio is exactly 1, too."""
    _, base = model
    masters, rows = random_master_weights(STUDENT, base), batch()
    objective = policy(name, kl=0.0)
    run = jit(jax.value_and_grad(lambda trained: objective(trained, Fixed(base), rows)[::2], has_aux=True))
    (_, terms), gradient = run(masters)
    assert float(terms["ratio_max"]) == 1.0
    assert float(terms["ratio_abs_log"]) == 0.0
    np.testing.assert_allclose(terms["ratio_mean"], 1.0, rtol=1e-6)
    assert float(terms["clipped"]) == 0.0
    close(gradient, plain_gradient, 1e-4)


def test_scores_are_log_probabilities_of_the_policy_and_of_the_first_one(model):
    params, base = model
    masters, rows = random_master_weights(STUDENT, base), batch()
    scored = jit(lambda m: policy().score(m, Fixed(base), rows, old=True, reference=True))(masters)
    moved = as_layers(base, masters)
    np.testing.assert_allclose(scored.old, plain_log_probs(moved, rows), atol=2e-5)
    np.testing.assert_allclose(scored.reference, plain_log_probs(params, rows), atol=2e-5)
    assert np.abs(scored.old - scored.reference).max() > 0.1
    none = jax.eval_shape(lambda m: policy().score(m, Fixed(base), rows, old=False, reference=False), masters)
    assert none.old is None and none.reference is None


def test_off_policy_ratio_kl_and_entropy(model):
    """Means over the batch's tokens, computed by hand from whole logits."""
    params, base = model
    masters, rows = random_master_weights(STUDENT, base, seed=5), batch()
    objective = policy("grpo", kl=0.3, entropy=0.2)
    start = STUDENT.master_weights(base)
    scored = jit(lambda m: objective.score(m, Fixed(base), rows, old=True, reference=True))(start)
    loss = jit(lambda m: objective(m, Fixed(base), with_scores(rows, scored)))(masters)
    moved = as_layers(base, masters)
    counts = rows.weights > 0
    own, old = plain_log_probs(moved, rows)[counts], plain_log_probs(params, rows)[counts]
    ratio, difference = np.exp(own - old), old - own
    k3 = np.exp(difference) - difference - 1
    advantages, factors = rows.extras["advantages"][counts], rows.extras["coefficients"][counts]
    surrogate = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    entropy = entropies(moved, rows)
    np.testing.assert_allclose(loss.terms["ratio_mean"], ratio.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss.terms["ratio_max"], ratio.max(), rtol=1e-5)
    np.testing.assert_allclose(loss.terms["kl"], k3.mean(), rtol=1e-4)
    np.testing.assert_allclose(loss.terms["entropy"], entropy.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss.weight, 1.0, rtol=1e-6)
    expected = np.sum(factors * (surrogate + 0.3 * k3 - 0.2 * entropy))
    np.testing.assert_allclose(loss.total, expected, rtol=1e-4, atol=1e-6)


def entropies(params, rows):
    found = [
        (-np.sum(np.exp(logs) * logs, -1), rows.weights[row, here]) for row, here, logs in each_example(params, rows)
    ]
    return np.concatenate([entropy[weights > 0] for entropy, weights in found])


def test_replay_decides_the_experts_and_tells_how_many_would_differ(model):
    params, base = model
    masters, rng = STUDENT.master_weights(base), np.random.default_rng(3)

    def drawn(size):
        return rng.permuted(np.tile(np.arange(5, dtype=np.uint8), (size, 3, 1)), axis=-1)[..., :K]

    rows = batch(experts=drawn)
    found = jit(lambda m: policy().score(m, Fixed(base), rows, old=True, reference=False))(masters)
    whole_rows = np.moveaxis(rows.extras["experts"].astype(np.int32).reshape(-1, 3, K), 1, 0)
    padding = np.broadcast_to((rows.segment_ids == 0).reshape(1, -1, 1), whole_rows.shape)
    chosen = np.where(padding, np.arange(K, dtype=np.int32), whole_rows)

    @jit
    def plain(params, chosen):
        tokens, positions, segment_ids = (jnp.asarray(each) for each in (rows.tokens, rows.positions, rows.segment_ids))
        x, auxes = hidden_states(
            params, CONFIG, tokens, positions=positions, segment_ids=segment_ids, replay=list(chosen)
        )
        x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + CONFIG.rms_norm_eps) * params["final_norm"]
        return jax.nn.log_softmax(x @ params["head"]), [aux.router_logits for aux in auxes]

    logs, router_logits = plain(params, chosen)
    expected = np.take_along_axis(np.asarray(logs), rows.targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.old, np.where(rows.weights > 0, expected, 0), atol=2e-5)
    without = jit(lambda m: policy().score(m, Fixed(base), batch(), old=True, reference=False))(masters)
    assert np.abs(found.old - without.old).max() > 0.05

    routers = [np.asarray(logits).reshape(rows.tokens.size, -1) for logits in router_logits]
    own = np.stack([np.sort(np.argsort(-logits)[:, :K]) for logits in routers])
    differ = np.any(own != np.sort(chosen, -1), -1).mean(0)[(rows.weights > 0).reshape(-1)].mean()
    loss = jit(lambda m: policy()(m, Fixed(base), rows))(masters)
    np.testing.assert_allclose(loss.terms["experts_differ"], differ, rtol=1e-5)
    assert 0.3 < differ < 1
    assert "experts_differ" not in jax.eval_shape(lambda m: policy()(m, Fixed(base), batch()), masters).terms


def test_the_samplers_log_probabilities_and_experts_are_the_trainers(model):
    """On the same weights they agree within float32 rounding, so no choice of experts would differ without replay."""
    params, base = model
    rng = np.random.default_rng(4)
    requests = [Request(tuple(rng.integers(0, PAD, n).tolist()), limit, n) for n, limit in ((9, 13), (5, 8), (14, 11))]
    found = generate(params, CONFIG, requests, stop_ids=[], temperature=1.0, slots=2, log_probs=True, experts=True)
    rows = []
    for request, generated in zip(requests, found, strict=True):
        tokens, start = (*request.prompt, *generated.tokens), len(request.prompt)
        sampler = np.zeros(len(tokens), np.float32)
        sampler[start - 1 : len(tokens) - 1] = generated.log_probs
        share = np.where(sampler != 0, 1 / 32, 0).astype(np.float32)
        extras = dict.fromkeys(("coefficients", "shares", "advantages"), share) | {"sampler": sampler}
        extras["experts"] = replayed(present(generated.experts), len(tokens))
        rows.append([Example(tokens, start, extras)])
    packed = pack(rows, LENGTH, PAD)
    loss = jit(lambda m: policy()(m, Fixed(base), packed))(STUDENT.master_weights(base))
    assert float(loss.terms["experts_differ"]) == 0.0
    assert float(loss.terms["sampler_gap_max"]) < 1e-4
    assert float(loss.terms["sampler_gap"]) < 1e-5


def test_micro_batches_and_rows_of_other_answers_add_up(model):
    """An update from five micro-batches of one row, and its metrics, are those from one of five rows. Every program
    is compiled once for all micro-batches and updates."""
    base = jax.device_put(model[1], jax.devices()[0])  # loaded weights are committed to a device
    rows = batch()
    single = [jax.tree.map(lambda x, i=i: x[i : i + 1], rows) for i in range(5)]
    results = []
    for batches in ([rows], single):
        update = PolicyUpdate(policy(), optax.sgd(0.5))
        state = init_state(random_master_weights(STUDENT, base), update.optimizer, jax.random.key(0))
        results.append(update(jax.device_put(state, jax.devices()[0]), Fixed(base), batches))
    (one, of_one), (many, of_many) = results
    close(many.params, one.params, 1e-5)
    assert of_one.keys() == of_many.keys()
    for name in of_one:
        np.testing.assert_allclose(of_many[name], of_one[name], rtol=1e-4, atol=1e-7, err_msg=name)
    assert int(many.step) == 1
    assert float(of_one["ratio_max"]) == 1.0
    update(many, Fixed(base), single)
    compiled_once(update)


def compiled_once(update):
    programs = (update._zeros, update._accumulate, update._apply)
    assert [program._cache_size() for program in programs] == [1, 1, 1]


@pytest.fixture(scope="module")
def of_one_device(model):
    """The rows of an update, the state after it, and its metrics."""
    _, base = model
    rows = pack([[example(0), example(1)], [example(2)], [example(3)], [example(4)]], LENGTH, PAD)
    update = PolicyUpdate(policy(), optax.sgd(0.5))
    state = init_state(random_master_weights(STUDENT, base), update.optimizer, jax.random.key(0))
    return rows, *update(state, Fixed(base), [rows])


@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 2, 1)])
def test_on_a_mesh_the_update_is_that_of_one_device(model, of_one_device, shape):
    _, base = model
    rows, expected, metrics = of_one_device
    mesh = make_training_mesh(*shape)
    placement = Placement(mesh)
    placed, optimizer = placement.base(base, CONFIG), optax.sgd(0.5)
    state = init_state(random_master_weights(STUDENT, base), optimizer, jax.random.key(0))
    shardings = placement.master_weights(state)
    on_devices = PolicyUpdate(policy(), optimizer, Shardings(shardings), mesh)
    state = jax.device_put(state, shardings)
    found, on_mesh_metrics = on_devices(state, Fixed(placed), [placement.rows(rows)])
    close(found.params, expected.params, 2e-5)
    for name in metrics:
        np.testing.assert_allclose(on_mesh_metrics[name], metrics[name], rtol=2e-4, atol=1e-6, err_msg=name)
    on_devices(found, Fixed(placed), [placement.rows(rows)] * 2)
    compiled_once(on_devices)


def test_answers_have_numbers_of_their_own():
    numbers = np.asarray(answer_numbers(batch())).reshape(5, LENGTH)
    assert numbers[0, 0] == 0 and numbers[0, 12] == 1 and numbers[1, 0] == LENGTH and numbers[2, 5] == 2 * LENGTH
    assert len(np.unique(numbers)) == 6  # five answers and the empty row
    assert numbers.max() < 5 * LENGTH


def test_experts_differ_as_sets():
    one = jnp.asarray([[[0, 3], [4, 1], [2, 5]]])
    other = jnp.asarray([[[3, 0], [4, 2], [2, 5]]])
    np.testing.assert_array_equal(experts_differ(one, other), [[False, True, False]])


def test_the_last_token_goes_where_the_one_before_went():
    experts = np.arange(12, dtype=np.uint16).reshape(3, 2, 2)
    found = replayed(experts, 4)
    assert found.shape == (4, 2, 2) and found.dtype == np.uint16
    np.testing.assert_array_equal(found[:3], experts)
    np.testing.assert_array_equal(found[3], experts[2])


def test_frozen_parameters_have_no_gradients(model):
    _, base = model
    trainable = replace(STUDENT, trainable=("router",))
    assert all(moe["router_weight"] is None for run in STUDENT.master_weights(base)["runs"] for moe in [run[0]["moe"]])
    assert all(run[0]["moe"]["router_weight"] is not None for run in trainable.master_weights(base)["runs"])
    assert all(run[0]["moe"]["down"] is None for run in trainable.master_weights(base)["runs"])
