"""The primary process publishes its results to all processes."""

import numpy as np

from puzzle_jax.processes.published import decided, published, values_of
from tests.processes.start import ended, running


def test_a_process_alone_gets_what_it_gives():
    assert published(lambda: b"abc") == b"abc"
    assert decided(lambda: (1, {2: 3})) == (1, {2: 3})
    values = np.arange(6.0)
    assert values_of(values) is values


def test_all_processes_get_what_the_first_one_finds():
    actions = ["publish+publish-late"] * 3
    with running(*[["tests.processes.joined_program", "3", *actions]] * 3) as processes:
        found = ended(processes)
    assert [process.returncode for process in found] == [0, 0, 0], [process.stderr for process in found]
