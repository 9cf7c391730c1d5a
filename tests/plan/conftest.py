"""Plans ask for virtual devices; JAX is initialised here with those of all tests, whichever test runs first."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def _devices():
    jax.devices()
