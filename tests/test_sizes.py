"""Settings refuse absurd numbers in one sentence, instead of running endlessly or exhausting memory."""

from collections.abc import Mapping
from dataclasses import replace
from math import inf, nan
from typing import Any, get_args, get_origin

import pytest

from puzzle_jax.commands import mendable
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.errors import MOST_TOKENS, ConfigError, check_range
from puzzle_jax.evaluate.settings import Settings
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.settings.fields import hint_options, settings_of
from puzzle_jax.settings.verbs import Verb, parse
from puzzle_jax.train.distill.recipe import DistillRecipe
from puzzle_jax.train.grpo.recipe import GrpoRecipe

GIVEN = {
    Recipe: [
        "--scenario.name=a",
        "--scenario.input_tokens=4",
        "--scenario.output_tokens=4",
        "--target.min_speedup=1.5",
    ],
    DistillRecipe: ["--parent=a", "--child=b", "--traces=t.jsonl", "--out=o"],
    GrpoRecipe: ["--model=a", "--out=o"],
}
UNBOUNDED = "target."  # its limits may be of any size


def single(hint):
    """The type of a setting's single values, and how one is written."""
    for option in hint_options(hint):
        inner = [of for of in get_args(option) if of is not Ellipsis]
        if get_origin(option) in (tuple, list):
            yield inner[0], lambda value: (value,)
        elif get_origin(option) in (dict, Mapping):
            yield inner[1], lambda value: dict.fromkeys(("low", "medium", "high"), value)
        else:
            yield option, lambda value: value


CASES = [
    (kind, name, written(value))
    for kind in GIVEN
    for name, setting in settings_of(kind).items()
    for of, written in single(setting.hint)
    for value in (
        *([10**18, -(10**18)] if of is int and not name.startswith(UNBOUNDED) else []),
        *([nan, inf, -inf] if of is float and name != "space.fractions" else []),  # `candidate_counts` checks these
    )
]


@pytest.fixture(scope="module", params=GIVEN, ids=lambda kind: kind.__name__)
def recipe(request):
    kind = request.param
    return parse(Verb("x", "", f"{kind.__module__}:{kind.__name__}", "", (), ""), GIVEN[kind])


def test_numbers_beyond_all_use_are_refused_by_name(recipe):
    cases = [(name, value) for kind, name, value in CASES if isinstance(recipe, kind)]
    assert len(cases) > 40
    for name, value in cases:
        section, _, field = name.rpartition(".")
        owner = getattr(recipe, section) if section else recipe
        with pytest.raises(ConfigError) as error:
            replace(owner, **{field: value})
            pytest.fail(f"{name} takes {value}")
        said = str(error.value)
        assert field in said and "\n" not in said and len(said) < 300, said


@pytest.mark.parametrize("name", ["slots", "bootstrap", "max_batch", "rounds", "cache_memory"])
def test_sizes_of_an_evaluation(name, tmp_path):
    changes: dict[str, Any] = {name: 10**18}
    with pytest.raises(ConfigError, match=f"{name} is 1000000000000000000, but must be"):
        Settings({"a": tmp_path}, tmp_path, **changes)


def test_sizes_of_a_measurement_of_speed():
    with pytest.raises(ConfigError, match="1000000000000000000"):
        Scenario("chat", 10**18, 4)


def test_a_range_names_both_of_its_ends_only_where_both_help():
    check_range("x", 3, 1, 3)
    ranges = {
        3: ((0, "from 1 to 3"), (4, "from 1 to 3"), (nan, "from 1 to 3"), (inf, "from 1 to 3")),
        MOST_TOKENS: ((0, "at least 1"), (MOST_TOKENS + 1, f"from 1 to {MOST_TOKENS}")),
        inf: ((0, "at least 1"), (inf, "a finite number of at least 1")),
    }
    for most, cases in ranges.items():
        for value, rule in cases:
            with pytest.raises(ConfigError, match=f"^x is {value}, but must be {rule}$"):
                check_range("x", value, 1, most)


def test_a_size_that_memory_has_not_is_one_sentence():
    assert "memory" in (mendable(MemoryError()) or "")
