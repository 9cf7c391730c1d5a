"""Recipes: the embedded one, and refusals."""

from pathlib import Path

import pytest
import yaml

import puzzle_jax
from puzzle_jax.errors import ConfigError
from puzzle_jax.settings.verbs import parse
from puzzle_jax.train.__main__ import VERBS

EMBEDDED = Path(puzzle_jax.__file__).parent / "recipes" / "pretrain-tiny.yaml"


def load_recipe(path):
    return parse(VERBS["pretrain"], ["--recipe", str(path), "--out", "nowhere"])


def test_embedded_recipe_describes_a_model_that_stock_runtimes_load():
    model = load_recipe(EMBEDDED).model
    assert model.num_layers >= 6
    assert [block.window for block in model.blocks] == [16, None] * (model.num_layers // 2)
    assert {block.num_experts for block in model.blocks} == {16}
    assert (model.experts_per_token, model.head_dim, model.rms_norm_eps, model.swiglu_limit) == (2, 32, 1e-5, 7.0)
    assert model.hidden_size % 32 == model.intermediate_size % 32 == model.vocab_size % 32 == 0
    assert model.hidden_size != model.intermediate_size


def changed(**changes):
    content = yaml.safe_load(EMBEDDED.read_text())
    for name, value in changes.items():
        node, *path = content, *name.split("__")
        for key in path[:-1]:
            node = node[key]
        if value is None:
            del node[path[-1]]
        else:
            node[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bucketz": 3}, "has the field bucketz, which does not exist; did you mean buckets"),
        ({"buckets": None}, "buckets must be given"),
        ({"loop__steps": 0}, "steps is 0, but must be at least 1"),
        (
            {"optimizer__warmup_steps": 10**9},
            "steps is 1000000000, but must be at most the 6000 updates of the run",
        ),
        ({"optimizer__learning_rate": "fast"}, "learning_rate is 'fast', but must be a number"),
        ({"loop__steps": 2.5}, "steps is 2.5, but must be a whole number"),
        ({"model__num_experts": None}, "model.num_experts is None, but must be a whole number"),
        ({"optimizer__learning_rate": -1.0}, "learning_rate is -1.0, but must be above 0"),
        ({"optimizer__b2": 1.5}, "b2 is 1.5, but must be at least 0 and below 1"),
        ({"tasks": {"sums": 1.0}}, "task is 'sums', but must be one of chain"),
        ({"tasks": {"chain": 0.0}}, "tasks.chain is 0.0, but must be above 0"),
        ({"efforts": {"huge": 1.0}}, "effort is 'huge', but must be one of low, medium, high"),
        ({"efforts": 3}, "efforts is 3, but must be a mapping"),
        ({"buckets": 3}, "buckets is 3, but must be a list"),
        ({"buckets": [{"length": 64, "rows": 0, "weight": 1}]}, "bucket rows is 0, but must be at least 1"),
        ({"buckets": [{"length": 2048, "rows": 1, "weight": 1}]}, "2048 tokens long, but model max_position is"),
        ({"model__windows": "all"}, "model.windows is 'all', but must list each layer's window"),
        ({"model__num_kv_heads": 3}, "num_heads is 4, but must be a multiple of num_kv_heads"),
        ({"model__variant": {"family": "x"}}, "model.variant.family is 'x', but must be one of gpt_oss, qwen3_moe"),
        ({"model__rope__factor": 0.5}, "rope factor is 0.5, but must be at least 1"),
    ],
)
def test_impossible_recipes_are_refused_in_one_sentence(tmp_path, changes, message):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(changed(**changes)))
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe is '.*none.yaml', but there is no such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"recipe .*bad.yaml cannot be read as YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match=r"recipe .*list.yaml holds \[1\], but must hold the fields of a recipe"):
        load_recipe(tmp_path / "list.yaml")
