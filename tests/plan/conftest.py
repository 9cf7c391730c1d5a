"""Plans ask for virtual devices; here JAX has begun with those of all tests, whichever test is run first."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def _devices():
    jax.devices()
