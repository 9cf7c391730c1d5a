"""The checks of `tests.type_checks` refuse what annotations do not allow, from the first call on."""

from typing import Any, cast

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation

from puzzle_jax.evaluate.frontier import Curve
from puzzle_jax.evaluate.statistics import Paired, wilson
from puzzle_jax.kernels.expert_mlp import combine


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


def test_dataclasses_are_checked_as_they_are_made():
    assert len(Curve(np.arange(3.0), np.arange(3.0)).rates) == 3
    with pytest.raises(jaxtyping.TypeCheckError, match="accuracies"):
        Curve(np.arange(3.0), np.arange(2.0))
    with pytest.raises(BeartypeCallHintViolation, match="won"):
        Paired(0.5, 0.1, 0.9, cast(Any, "three"), 1, 0.2)
