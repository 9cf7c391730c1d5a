"""The search space: what it offers, and what it refuses."""

import json

import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.errors import ConfigError
from puzzle_jax.search.space import (
    ExpertChoice,
    Restriction,
    Space,
    candidate_counts,
    candidate_windows,
    distinct_choices,
    narrower_windows,
    restrict,
)
from tests.support import small_config

CONFIG = small_config((BlockConfig(7, 5), BlockConfig(7), BlockConfig(6)))


def choice(*kept, method="reap"):
    return ExpertChoice(len(kept), tuple(kept), method)


def small_space(**changes):
    settings = {
        "expert_choices": (
            (choice(*range(7)), choice(0, 2, 4)),
            (choice(*range(7)), choice(1, 2, 3, 4), choice(1, 2, 3, 5, method="frequency")),
            (choice(*range(6)),),
        ),
        "windows": ((5,), (None, 8, 3), (None, 3)),
    }
    return Space(CONFIG, **{**settings, **changes})


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ((16, 2), (16, 14, 12, 10, 8, 6, 4)),
        ((128, 4), (128, 112, 96, 80, 64, 48, 32)),
        ((32, 4, (1, 0.5, 0.1)), (32, 16)),  # a tenth is 3, below the 4 that a token needs
        ((128, 4, (1, 7 / 8, 3 / 4, 1 / 2), 32), (128, 96, 64)),  # 112 rounds to 128; 96 and 64 are multiples already
        ((7, 2, (1, 0.5)), (7, 4)),
    ],
)
def test_candidate_counts(arguments, counts):
    assert candidate_counts(*arguments) == counts
    divisor = arguments[3] if len(arguments) > 3 else 1
    assert all(count % divisor == 0 and count >= arguments[1] for count in counts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((16, 2, (1.5,)), "1.5, but must be above 0 and at most 1"),
        ((16, 2, (0.0,)), "0.0, but must be above 0"),
        ((16, 2, (1,), 0), "divisor is 0"),
        ((16, 2, (1,), 64), "no multiple of 64"),
    ],
)
def test_bad_counts_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        candidate_counts(*arguments)


def test_candidate_windows():
    assert candidate_windows(CONFIG, (3, 8, 3, 512, 9999)) == ((5,), (None, 8, 3), (None, 8, 3))
    with pytest.raises(ConfigError, match="a window is 0"):
        candidate_windows(CONFIG, (0,))


def test_counting_and_description():
    space = small_space()
    assert space.num_alternatives == 1 + 2 + 2 + 1
    assert space.num_architectures == 2 * (3 * 3) * 2
    assert space.expert_counts(1) == (7, 4)
    assert space.describe().splitlines() == [
        "layer 0: experts 7, 3; window 5",
        "layer 1: experts 7, 4 (2 sets); window full, 8, 3",
        "layer 2: experts 6; window full, 3",
        "6 alternatives in 3 layers, 36 architectures",
    ]


def test_json_and_back():
    space = small_space()
    assert Space.from_json(CONFIG, json.loads(json.dumps(space.to_json()))) == space


def test_equal_sets_of_different_methods_become_one():
    merged = distinct_choices([choice(1, 2), choice(0, 1, 2), choice(1, 2, method="frequency"), choice(1, 2)])
    assert merged == (choice(0, 1, 2), choice(1, 2, method="reap+frequency"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"windows": ((5,), (None,))}, "windows has 2 layers, but the parent has 3"),
        ({"windows": ((5,), (8,), (None,))}, r"layer 1 must list the parent's window \(full\) first"),
        ({"windows": ((5, 6), (None,), (None,))}, "layer 0 lists window 6, but alternatives must be narrower"),
        ({"windows": ((5, None), (None,), (None,))}, "layer 0 lists window full, but"),
        ({"windows": ((5,), (None, 3, 3), (None,))}, "layer 1 lists a window twice"),
        ({"expert_choices": ((), (choice(0, 1),), (choice(0, 1),))}, "layer 0 has no expert choice"),
        ({"expert_choices": ((choice(0),), (choice(0, 1),), (choice(0, 1),))}, "layer 0 has a choice of 1 experts"),
        ({"expert_choices": ((choice(0, 1),),) * 2 + ((choice(0, 6),),)}, "parent's are 0 to 5"),
        (
            {"expert_choices": ((choice(0, 1), choice(0, 1, method="x")),) + ((choice(0, 1),),) * 2},
            "layer 0 has two expert choices of the same kept experts",
        ),
        (
            {"expert_choices": ((choice(0, 1), choice(0, 2)),) + ((choice(0, 1),),) * 2},
            "layer 0 has two expert choices of the same name",
        ),
    ],
)
def test_bad_spaces_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        small_space(**changes)


@pytest.mark.parametrize(("count", "kept"), [(3, (0, 1)), (2, (1, 0)), (2, (1, 1))])
def test_bad_expert_choices_are_refused(count, kept):
    with pytest.raises(ConfigError):
        ExpertChoice(count, kept, "reap")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a b"}, "scenario name is 'a b'"),
        ({"input_tokens": 0}, "input_tokens of scenario 'chat' is 0"),
        ({"batch": -1}, "batch of scenario 'chat' is -1"),
        ({"devices": 0}, "devices of scenario"),
        ({"kv_bytes_per_value": 3}, "kv_bytes_per_value of scenario 'chat' is 3"),
        ({"hardware": ""}, "hardware of scenario"),
    ],
)
def test_bad_scenarios_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        Scenario(**{"name": "chat", "input_tokens": 8, "output_tokens": 4, "batch": 2, **changes})


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({}, "the target is empty"),
        ({"max_expert_bytes_ratio": 0.0}, "max_expert_bytes_ratio is 0.0"),
        ({"max_expert_bytes_ratio": 1.2}, "max_expert_bytes_ratio is 1.2"),
        ({"max_kv_bytes_ratio": -1.0}, "max_kv_bytes_ratio is -1.0"),
        ({"min_speedup": 0.9}, "min_speedup is 0.9, but must be at least 1"),
        ({"min_speedup": float("nan")}, "min_speedup is nan"),
        ({"min_speedup": float("inf")}, "min_speedup is inf"),
    ],
)
def test_bad_targets_are_refused(target, words):
    with pytest.raises(ConfigError, match=words):
        Target(**target)


def test_restrictions_narrow_counts_and_windows():
    counts, windows = restrict(
        [(8, 6, 4)] * 5,
        [(None, 64, 16), (32,), (None, 64, 16), (32,), (None, 64)],
        [
            Restriction("0, 2-3", min_experts=6),
            Restriction("3", max_experts=6),
            Restriction("2", windows=("full", 16)),
            Restriction(" 4 ", min_experts=4, max_experts=4, windows=("full",)),
        ],
    )
    assert counts == ((8, 6), (8, 6, 4), (8, 6), (6,), (4,))
    assert windows == ((None, 64, 16), (32,), (None, 16), (32,), (None,))


@pytest.mark.parametrize("layers", ["5", "-1", "3-2", "", "1,,2", "a", "1-2-3", "0-99999999"])
def test_restrictions_of_no_layers_are_refused(layers):
    with pytest.raises(ConfigError, match=r"has layers .*, but must list numbers and ranges from 0 to 4"):
        Restriction(layers).numbers(5)


def test_restrictions_that_leave_nothing_are_refused():
    with pytest.raises(ConfigError, match="leaves layer 0 no expert count of 7 to 8; offered are 6, 4"):
        restrict([(6, 4)], [(None,)], [Restriction("0", min_experts=7, max_experts=8)])


def test_windows_that_cover_a_context_are_left_out_but_for_the_parents_own():
    windows = ((16, 8), (None, 40, 24, 8), (None, 24))
    assert narrower_windows(windows, 24) == (((16, 8), (None, 8), (None,)), (40, 24))
    assert narrower_windows(windows, 25) == (((16, 8), (None, 24, 8), (None, 24)), (40,))
    assert narrower_windows(windows, 5) == (((16,), (None,), (None,)), (40, 24, 8))
