"""How processes of one search find each other, and what is said when they do not."""

import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.search.processes import Team


def test_a_process_alone_needs_nobody():
    with Team.join(1, 8) as team:
        assert (team.count, team.index) == (1, 0)
        team.say("nothing")


@pytest.mark.parametrize("index", ["2", "-1", "one", ""])
def test_an_index_that_no_process_has(monkeypatch, index):
    monkeypatch.setenv("JAX_PROCESS_ID", index)
    with pytest.raises(ConfigError, match=f"JAX_PROCESS_ID is '{index}', but must be from 0 to 1"):
        Team.join(2, 1)


def test_processes_that_nobody_told_of_each_other(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"mesh\.processes is 3, but they cannot be brought together") as raised:
        Team.join(3, 2)
    assert "\n" not in str(raised.value)
