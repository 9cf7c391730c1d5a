"""The recipes of distillation that come with the package."""

from pathlib import Path

import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.settings.files import recipe_names
from puzzle_jax.settings.verbs import parse
from puzzle_jax.train.__main__ import VERBS

NAMED = ("--parent", "p", "--child", "c", "--traces", "[a.parquet, b.jsonl]", "--out", "o")


def test_every_recipe_parses():
    assert recipe_names("distill") == ["distill-gpt-oss-120b", "distill-tiny"]
    large, tiny = (parse(VERBS["distill"], ["--recipe", name, *NAMED]) for name in recipe_names("distill"))
    assert large.traces == (Path("a.parquet"), Path("b.jsonl")) and large.data.row_length == 131_072
    assert (large.mesh.devices, large.mesh.processes) == (64, 8)
    assert large.loss.shares == {"forward_kl": 1.0, "hidden_cosine": 0.1}
    assert (tiny.data.row_length, tiny.data.rows, tiny.mesh.devices, tiny.train) == (512, 4, 1, ())


def test_fields_on_the_command_line_come_before_the_file():
    recipe = parse(VERBS["distill"], ["--recipe", "distill-tiny", *NAMED, "--loop.steps", "70", "--train", "[router]"])
    assert (recipe.loop.steps, recipe.train, recipe.optimizer.warmup_steps) == (70, ("router",), 30)


def test_what_a_recipe_must_name():
    with pytest.raises(ConfigError, match="child"):
        parse(VERBS["distill"], ["--recipe", "distill-tiny", "--parent", "p", "--traces", "[a]", "--out", "o"])
