"""The checks of `tests.type_checks` refuse what annotations do not allow, from the first call on."""

from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float

from puzzle_jax.evaluate.frontier import Curve
from puzzle_jax.evaluate.statistics import Paired, wilson
from puzzle_jax.kernels.expert_mlp import combine
from tests.type_checks import from_the_first_call


@pytest.mark.parametrize("call", ["first", "second"])
def test_sizes_that_disagree_between_arguments(call):
    with pytest.raises(jaxtyping.TypeCheckError, match="gates"):
        combine(jnp.zeros((3, 2, 5)), jnp.zeros((4, 2)))
    assert combine(jnp.zeros((3, 2, 5)), jnp.zeros((3, 2))).shape == (3, 5)


@pytest.mark.parametrize("call", ["first", "second"])
def test_types_of_functions_without_arrays(call):
    with pytest.raises(BeartypeCallHintViolation, match="successes"):
        wilson(cast(Any, "1"), 2)
    assert wilson(1, 2)[0] < 0.5


def test_functions_within_functions_share_checks_but_not_what_they_captured():
    """Functions are decorated as by the import hook; one calls another with the same code."""

    def scaling(factor: int, after: Callable | None = None) -> Callable:
        @from_the_first_call(typechecker=beartype)
        def scaled(x: Float[np.ndarray, "n"], by: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
            return factor * x * by if after is None else after(x, by) + factor

        return scaled

    def repeating(default: int) -> Callable:
        @from_the_first_call(typechecker=beartype)
        def repeated(text: str, times: int = default) -> str:
            return text * times

        return repeated

    x, by = np.arange(3.0), np.full(3, 2.0)
    inner = scaling(5)
    np.testing.assert_array_equal(scaling(7, inner)(x, by), 10 * x + 7)
    np.testing.assert_array_equal(inner(x, by), 10 * x)
    for _ in range(2):
        with pytest.raises(jaxtyping.TypeCheckError, match="by"):
            inner(x, by[:2])
    np.testing.assert_array_equal(scaling(11)(x=x, by=by), 22 * x)
    assert [repeating(2)("ab"), repeating(3)("ab"), repeating(4)("ab", times=1)] == ["abab", "ababab", "ab"]
    with pytest.raises(BeartypeCallHintViolation, match="times"):
        repeating(2)("ab", "3")


def test_dataclasses_are_checked_as_they_are_made():
    assert len(Curve(np.arange(3.0), np.arange(3.0)).rates) == 3
    with pytest.raises(jaxtyping.TypeCheckError, match="accuracies"):
        Curve(np.arange(3.0), np.arange(2.0))
    with pytest.raises(BeartypeCallHintViolation, match="won"):
        Paired(0.5, 0.1, 0.9, cast(Any, "three"), 1, 0.2)
