"""Reports of training runs are written without figures, which take a second or two each to draw.

tests/report draws figures, and so does one run of each trainer, using `drawn_figures`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from puzzle_jax.report import training


@pytest.fixture(scope="package", autouse=True)
def drawn_figures() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Returns a context manager within which reports do get their figures."""
    draw = training.training_figures

    @contextmanager
    def drawn() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "training_figures", draw)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "training_figures", lambda metrics: {})
        yield drawn
