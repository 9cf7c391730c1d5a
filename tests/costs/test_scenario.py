"""Limits on the KL of groups, by the names that a target gives them."""

import pytest

from puzzle_jax.costs.scenario import Group, KlLimit, MaxKl, Target
from puzzle_jax.errors import ConfigError

KINDS = [("chain", "low"), ("chain", "high"), ("lib/sums.py", "low"), ("lib/sums.py", "medium")]


def test_names_become_groups_and_what_is_named_itself_has_its_own_limit():
    limits = MaxKl(
        nats={"lib/sums.py": 0.2, "tasks": 0.4, "lib/sums.py/medium": 0.3},
        times_mean={"high": 1.5, "efforts": 2},
        share_of_entropy={"chain/high": 0.125},
    ).limits(KINDS)
    assert set(limits) == {
        KlLimit(Group("chain", None), "nats", 0.4),
        KlLimit(Group("lib/sums.py", None), "nats", 0.2),
        KlLimit(Group("lib/sums.py", "medium"), "nats", 0.3),
        KlLimit(Group(None, "low"), "times_mean", 2),
        KlLimit(Group(None, "high"), "times_mean", 1.5),
        KlLimit(Group(None, "medium"), "times_mean", 2),
        KlLimit(Group("chain", "high"), "share_of_entropy", 0.125),
    }
    assert len(limits) == 7
    assert [group.name for group in (Group("a", None), Group(None, "low"), Group("a", "low"))] == ["a", "low", "a/low"]
    group = Group("chain", None)
    assert group.holds("chain", "low") and not group.holds("lib/sums.py", "low")
    assert Group("chain", "high").holds("chain", "high") and not Group("chain", "high").holds("chain", "low")


@pytest.mark.parametrize("name", ["heroic", "poetry", "lib/sums.py/high", "chain/", "/low", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(
        ConfigError, match=r"target.max_kl.nats names .*, but must name efforts, tasks, an effort \(low"
    ):
        MaxKl(nats={name: 0.5}).limits(KINDS)


@pytest.mark.parametrize(("form", "value"), [("nats", 0), ("times_mean", -1), ("share_of_entropy", float("nan"))])
def test_limits_are_above_zero(form, value):
    with pytest.raises(ConfigError, match=f"max_kl.{form}.high is {value}"):
        MaxKl(**{form: {"high": value}})


def test_limits_on_kl_alone_are_no_target():
    with pytest.raises(
        ConfigError, match=r"empty apart from max_kl, but needs one of max_expert_bytes_ratio, .*: with"
    ):
        Target(max_kl=MaxKl(nats={"high": 0.5}))
    with pytest.raises(ConfigError, match=r"target is empty, but needs one of .*max_seconds_per_token: without"):
        Target()
    assert MaxKl().is_empty and Target(min_speedup=1.25).max_kl == MaxKl()
