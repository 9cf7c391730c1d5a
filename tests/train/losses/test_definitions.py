"""Definitions of losses against hand-written float64 computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.train.losses import definitions as losses
from puzzle_jax.train.losses.definitions import TopK

TOKENS, VOCAB, K, HIDDEN = 5, 11, 3, 7
RNG = np.random.default_rng(0)
TEACHER, STUDENT = (3.0 * RNG.standard_normal((TOKENS, VOCAB)) for _ in range(2))
X, Y = (RNG.standard_normal((TOKENS, HIDDEN)) for _ in range(2))


def probabilities(logits, temperature):
    p = np.exp(logits / temperature)
    return p / p.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def f32(array):
    return jnp.asarray(array, jnp.float32)


def top_k(k, temperature):
    ids = np.argsort(-TEACHER, axis=-1)[:, :k]
    total = np.log(np.exp(TEACHER / temperature).sum(-1))
    return TopK(jnp.asarray(ids, jnp.int32), f32(np.take_along_axis(TEACHER, ids, -1)), f32(total))


# One program; as separate operations, they would be compiled one by one.
top_k_kl = jax.jit(losses.top_k_kl, static_argnums=2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_by_hand(temperature):
    p, q = probabilities(TEACHER, temperature), probabilities(STUDENT, temperature)
    beta = 0.3
    m = beta * p + (1 - beta) * q
    pairs = {
        "forward": (losses.forward_kl(f32(TEACHER), f32(STUDENT), temperature), kl(p, q)),
        "reverse": (losses.reverse_kl(f32(TEACHER), f32(STUDENT), temperature), kl(q, p)),
        "jsd": (losses.jsd(f32(TEACHER), f32(STUDENT), temperature, beta), beta * kl(p, m) + (1 - beta) * kl(q, m)),
    }
    for name, (found, expected) in pairs.items():
        np.testing.assert_allclose(found, temperature**2 * expected, rtol=1e-5, err_msg=name)


def test_of_equal_and_of_disjoint_distributions():
    logits = f32(TEACHER)
    for loss in (losses.forward_kl, losses.reverse_kl, losses.jsd):
        np.testing.assert_allclose(loss(logits, logits), 0.0, atol=1e-6)
    apart = f32([[200.0, 0.0, 0.0]]), f32([[0.0, 200.0, 0.0]])
    assert float(losses.jsd(*apart)[0]) == pytest.approx(np.log(2), rel=1e-6)  # its largest value
    assert float(losses.forward_kl(*apart)[0]) == pytest.approx(200.0, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_kl_is_the_kl_of_merged_outcomes(temperature):
    found = top_k_kl(top_k(K, temperature), f32(STUDENT), temperature)
    p, q = probabilities(TEACHER, temperature), probabilities(STUDENT, temperature)
    ids = np.argsort(-TEACHER, axis=-1)[:, :K]

    def merged(r):
        top = np.take_along_axis(r, ids, -1)
        return np.concatenate([top, 1 - top.sum(-1, keepdims=True)], axis=-1)

    np.testing.assert_allclose(found, temperature**2 * kl(merged(p), merged(q)), rtol=1e-4)


def test_top_k_kl_rises_to_the_whole_kl():
    whole = np.asarray(losses.forward_kl(f32(TEACHER), f32(STUDENT)))
    one, three, ten, everything = (np.asarray(top_k_kl(top_k(k, 1.0), f32(STUDENT), 1.0)) for k in (1, K, 10, VOCAB))
    assert np.all(one >= 0) and np.all(three >= one) and np.all(three < whole)
    # Only one token is left over, so nothing is merged and nothing is lost.
    np.testing.assert_allclose(ten, whole, rtol=1e-4)
    np.testing.assert_allclose(everything, whole, rtol=1e-5)


def test_top_k_kl_punishes_mass_that_leaves_the_top():
    student = f32(TEACHER)
    best = np.asarray(top_k_kl(top_k(K, 1.0), student, 1.0))
    np.testing.assert_allclose(best, 0.0, atol=1e-6)
    moved = student.at[jnp.arange(TOKENS), jnp.argmin(student, axis=-1)].add(20.0)  # equal within the top k
    assert np.all(np.asarray(top_k_kl(top_k(K, 1.0), moved, 1.0)) > 1.0)


def test_top_k_of_a_teacher_without_a_rest():
    """float32 rounds the rest to 0 or below; a student with mass there still gets a finite loss and gradient."""
    certain = TopK(jnp.asarray([[2]], jnp.int32), f32([[50.0]]), f32([49.999996]))
    loss, gradient = jax.jit(jax.value_and_grad(lambda s: losses.top_k_kl(certain, s)[0]))(f32([[0.0, 0.0, 1.0, 0.0]]))
    assert float(loss) == pytest.approx(np.log(np.e + 3) - 1, rel=1e-5)
    np.testing.assert_allclose(gradient[0], probabilities(np.array([0, 0, 1.0, 0]), 1) - [0, 0, 1, 0], rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_next_token_is_the_log_probability(temperature):
    targets = np.array([0, 10, 3, 3, 7])
    found = losses.next_token(f32(STUDENT), jnp.asarray(targets), temperature)
    expected = -np.log(probabilities(STUDENT, temperature)[np.arange(TOKENS), targets])
    np.testing.assert_allclose(found, temperature**2 * expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entropy_by_hand(temperature):
    q = probabilities(STUDENT, temperature)
    found = losses.entropy(f32(STUDENT), temperature)
    np.testing.assert_allclose(found, temperature**2 * -(q * np.log(q)).sum(-1), rtol=1e-5)


def test_entropy_of_certain_and_of_undecided_students():
    certain = jnp.full((2, VOCAB), -1e4).at[0, 4].set(1e4).at[1].set(1e4)
    value, gradient = jax.vmap(jax.value_and_grad(losses.entropy))(certain)
    np.testing.assert_allclose(value, [0.0, np.log(VOCAB)], rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_hidden_losses_by_hand():
    cosine = (X * Y).sum(-1) / np.linalg.norm(X, axis=-1) / np.linalg.norm(Y, axis=-1)
    np.testing.assert_allclose(losses.hidden_cosine(f32(X), f32(Y)), 1 - cosine, rtol=1e-5)
    np.testing.assert_allclose(losses.hidden_cosine(f32(1e4 * X), f32(X)), 0.0, atol=1e-6)  # only the direction counts
    ratio = ((X - Y) ** 2).sum(-1) / (Y**2).sum(-1)
    np.testing.assert_allclose(losses.hidden_mse(f32(X), f32(Y)), ratio, rtol=1e-5)
    np.testing.assert_allclose(losses.hidden_mse(f32(0 * X), f32(Y)), 1.0, rtol=1e-6)


def test_hidden_losses_of_zero_states_are_finite():
    zero, y = jnp.zeros((1, HIDDEN)), f32(Y[:1])
    value, gradient = jax.value_and_grad(lambda x: losses.hidden_cosine(x, y)[0])(zero)
    assert float(value) == 1.0
    np.testing.assert_array_equal(gradient, 0.0)
    assert np.isfinite(losses.hidden_mse(zero, zero)).all()


def test_losses_of_bfloat16_are_float32_and_of_nothing_are_empty():
    half = f32(TEACHER).astype(jnp.bfloat16), f32(STUDENT).astype(jnp.bfloat16)
    rounded = np.asarray(half[0], np.float64), np.asarray(half[1], np.float64)
    found = losses.forward_kl(*half)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, kl(*(probabilities(r, 1) for r in rounded)), rtol=1e-5)
    assert losses.jsd(jnp.zeros((0, VOCAB)), jnp.zeros((0, VOCAB))).shape == (0,)
