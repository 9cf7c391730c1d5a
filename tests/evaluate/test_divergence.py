import jax
import numpy as np
import pytest

from puzzle_jax.evaluate.divergence import divergence
from tests.support import random_params, small_config


@pytest.mark.parametrize("chunk", [8, 32, 97, 8192])
def test_chunks_of_the_vocabulary_give_the_whole_divergence(chunk):
    config = small_config()
    params = random_params(config)
    parent = jax.random.normal(jax.random.key(0), (3, 5, 40))
    child = jax.random.normal(jax.random.key(1), (2, 3, 5, 40))  # two children at once
    found = divergence(params, config, parent, child, chunk=chunk)

    def log_probabilities(x):
        x = np.asarray(x, np.float64)
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(params["final_norm"], np.float64)
        logits = y @ np.asarray(params["head"], np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    p, q = log_probabilities(parent), log_probabilities(child)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.agreement, p.argmax(-1) == q.argmax(-1))
    a, b = np.asarray(parent, np.float64), np.asarray(child, np.float64)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-5)


def test_a_model_does_not_differ_from_itself():
    config = small_config()
    x = jax.random.normal(jax.random.key(0), (2, 3, 40))
    found = divergence(random_params(config), config, x, x, chunk=10)
    np.testing.assert_allclose(found.kl, 0.0, atol=1e-6)
    np.testing.assert_array_equal(found.agreement, 1.0)
