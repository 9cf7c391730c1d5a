"""Pretraining losses against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.kernels.route import Routing
from puzzle_jax.model.network import LayerAux
from puzzle_jax.train.pretrain.loss import balance_loss, effective_experts, next_token_loss


def test_next_token_loss_counts_weighted_tokens_only():
    probabilities = jnp.asarray([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]])
    logits = jnp.log(probabilities) + 3.0
    targets = jnp.asarray([[0, 1, 1]])
    loss = next_token_loss(logits, targets, jnp.asarray([[1.0, 0.0, 1.0]]))
    assert float(loss) == pytest.approx(-(np.log(0.5) + np.log(0.2)) / 2, rel=1e-5)
    assert float(next_token_loss(logits, targets, jnp.zeros((1, 3)))) == 0.0


def test_balance_loss_is_one_when_even_and_ignores_padding():
    even = LayerAux(jnp.zeros((1, 3, 4)), Routing(jnp.asarray([[0, 1], [2, 3], [0, 0]]), jnp.full((3, 2), 0.5)))
    loss, load = balance_loss(even, jnp.asarray([True, True, False]))
    assert float(loss) == pytest.approx(1.0)
    np.testing.assert_allclose(load, [0.25] * 4)


def test_balance_loss_by_hand():
    logits = jnp.log(jnp.asarray([[[0.7, 0.2, 0.1], [0.6, 0.1, 0.3]]]))
    aux = LayerAux(logits, Routing(jnp.asarray([[0, 1], [0, 2]]), jnp.full((2, 2), 0.5)))
    loss, load = balance_loss(aux, jnp.asarray([True, True]))
    np.testing.assert_allclose(load, [0.5, 0.25, 0.25])
    assert float(loss) == pytest.approx(3 * (0.5 * 0.65 + 0.25 * 0.15 + 0.25 * 0.2), rel=1e-5)
    gradient = jax.grad(lambda x: balance_loss(aux._replace(router_logits=x), jnp.asarray([True, True]))[0])(logits)
    assert float(gradient[0, 0, 0]) > 0 > float(gradient[0, 0, 1])


def test_effective_experts():
    load = np.asarray([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    np.testing.assert_allclose(effective_experts(jnp.asarray(load)), [4.0, 1.0, 2.0], rtol=1e-6)
