"""Reinforcement learning's one-sentence refusals before weights are read; its recipes, identity and help."""

import json
import shutil
from pathlib import Path

import pytest

from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.errors import ConfigError
from puzzle_jax.runs import open_run
from puzzle_jax.settings.files import recipe_names
from puzzle_jax.settings.verbs import parse
from puzzle_jax.tasks.chat.embedded import chat_files
from puzzle_jax.train.__main__ import VERBS, main
from puzzle_jax.train.grpo.inputs import GrpoInputs
from tests.support import random_params
from tests.train.grpo.toy_grpo import BLOCKS, CONFIG, KEPT, arguments, make, refusal


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("grpo"))


def inputs(directory: Path, **changes) -> GrpoInputs:
    return GrpoInputs.open(parse(VERBS["grpo"], arguments(directory, directory / "nowhere", **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model"),
        ({"model": "nowhere"}, "nowhere is not a directory"),
        ({"recipe": "grpo-huge"}, "recipe is 'grpo-huge', but there is no such file, and the names are grpo-accuracy"),
        ({"colour": "blue"}, "colour"),
        ({"rollout__colour": "blue"}, "colour"),
        ({"train": "[norms]"}, "train has 'norms', but must be of router, experts"),
        ({"export": "worst"}, "export"),
        ({"export": "best", "loop__keep_best": 0}, "export is 'best' and loop.keep_best 0"),
        ({"seed": -1}, "seed is -1, but must be at least 0"),
        ({"seed": 2**40}, "seed is 1099511627776, but must be from 0"),
        ({"prompts__tasks": "{chess: 1}"}, "task is 'chess', but must be one of"),
        ({"prompts__tasks": "{none.jsonl: 1}"}, "none.jsonl cannot be read"),
        ({"prompts__tasks": "{chain: 0}"}, "prompts.tasks.chain is 0.0, but must be above 0"),
        ({"prompts__efforts": "{huge: 1}"}, "effort is 'huge', but must be one of low, medium, high"),
        ({"prompts__efforts": "{}"}, "prompts.efforts is empty"),
        ({"prompts__prompts": 0}, "prompts.prompts is 0, but must be at least 1"),
        ({"prompts__prompts": 2.5}, "prompts.prompts"),
        ({"prompts__min_pass_rate": 0.95}, "prompts.min_pass_rate is 0.95 and prompts.max_pass_rate 0.9"),
        ({"prompts__explore": 1.5}, "prompts.explore is 1.5, but must be from 0 to 1"),
        ({"prompts__seed": 100}, "prompts.seed is 100, but must be from 0 to 99"),
        ({"rollout__group": 1}, "rollout.group is 1, but must be at least 2"),
        ({"rollout__slots": 0}, "rollout.slots is 0, but must be at least 1"),
        ({"rollout__resample": -1}, "rollout.resample is -1, but must be at least 0"),
        ({"rollout__max_tokens": "{low: 0}"}, "rollout.max_tokens.low is 0, but must be at least 1"),
        ({"rollout__max_tokens": "{huge: 9}"}, "effort is 'huge'"),
        (
            {"rollout__max_tokens": "{high: 60}"},
            "rollout.max_tokens.high is 60, but must be below update.row_length (60)",
        ),
        ({"rollout__cache": "int4"}, "rollout.cache is 'int4', but must be one of compute, float32"),
        ({"rollout__cache": "float8_e4m3fn"}, "model carries no scales for such a cache"),
        ({"reward__time_limit": 0}, "reward.time_limit is 0.0, but must be above 0"),
        ({"reward__time_limit": ".nan"}, "reward.time_limit is nan"),
        ({"reward__workers": 0}, "reward.workers is 0, but must be at least 1"),
        ({"reward__pass_threshold": ".inf"}, "reward.pass_threshold is inf, but must be a finite number"),
        (
            {"reward__environment": "[A=1]"},
            "reward.environment has 'A=1', but must hold names of environment variables",
        ),
        ({"reward__function": "none.py:reward"}, "none.py cannot be read: No such file"),
        ({"reward__function": "reward"}, "reward is 'reward', but must be path/to/file.py:name or package.module:name"),
        ({"reward__function": "json:reward"}, "reward is 'json:reward', but json has no function reward"),
        ({"reward__function": "json:dumps"}, "dumps of json takes"),
        ({"update__rows": 0}, "update.rows is 0, but must be at least 1"),
        ({"update__row_length": 0}, "update.row_length is 0, but must be at least 1"),
        ({"update__row_length": 769}, "update.row_length is 769, but the model's context is 768"),
        ({"update__row_length": 19}, "none of 64 problems of any task and effort is short enough"),
        ({"update__updates": 0}, "update.updates is 0, but must be at least 1"),
        ({"update__updates": 5}, "update.updates is 5, but must be at most prompts.prompts (4)"),
        ({"update__vocab_chunk": 0}, "update.vocab_chunk is 0, but must be at least 1"),
        ({"loss__name": "ppo"}, "loss.name is 'ppo', but must be one of grpo, dapo"),
        ({"loss__clip_low": 0}, "loss.clip_low is 0.0, but must be above 0"),
        ({"loss__length_bonus": 1e300}, "loss.length_bonus is 1e+300, but must be at most 1e+06"),
        ({"loss__kl": ".nan"}, "loss.kl is nan, but must be a finite number of at least 0"),
        ({"loss__length_budgets": "{low: 0}"}, "loss.length_budgets.low is 0, but must be at least 1"),
        ({"optimizer__name": "magic"}, "optimizer.name is 'magic'"),
        ({"optimizer__learning_rate": ".inf"}, "optimizer.learning_rate is inf"),
        (
            {"optimizer__warmup_steps": 11, "update__updates": 2},
            "optimizer.warmup_steps is 11, but must be at most the 10 updates of the run",
        ),
        ({"loop__steps": 0}, "loop.steps is 0"),
        ({"loop__save_every": "often"}, "loop.save_every"),
        ({"monitoring__problems": 0}, "monitoring.problems is 0, but must be at least 1"),
        ({"monitoring__transcripts": -1}, "monitoring.transcripts is -1, but must be at least 0"),
        ({"monitoring__collapse": 1}, "monitoring.collapse is 1.0, but must be at least 0 and below 1"),
        ({"monitoring__collapse_steps": 0}, "monitoring.collapse_steps is 0, but must be at least 1"),
        ({"mesh__data": 0}, "mesh.data is 0, but must be at least 1"),
        ({"mesh__data": 3}, "update.rows is 2, but must be a multiple of mesh.data (3)"),
        ({"mesh__sequence": 7}, "update.row_length is 60, but must be a multiple of mesh.sequence (7)"),
        ({"mesh__model": 99}, "needs 99 devices, but 8 are present"),
        ({"mesh__processes": 2}, "mesh has 1 devices (data x sequence x model), but must have a multiple of"),
    ],
)
def test_bad_settings_are_one_sentence_before_weights_are_read(directory, tmp_path, capsys, changes, message):
    assert message in refusal(capsys, directory, tmp_path / "run", **changes)


def test_the_model_is_never_written_to(directory, capsys):
    same = directory / "parent" / ".." / "model"
    assert "which is the model itself" in refusal(capsys, directory, directory / "model")
    assert "which is the model itself" in refusal(capsys, directory, same)


def test_models_that_do_not_fit_are_refused(directory, tmp_path, capsys):
    shutil.copytree(directory / "model", tmp_path / "unrecorded")
    (tmp_path / "unrecorded" / "provenance.json").write_text('{"search": {"score": 0.25}}')
    shutil.copytree(directory / "model", tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").write_text("{{ messages }}")
    for name, message in (
        ("unrecorded", "provenance.json does not list the kept_experts of 2 layers"),
        ("mute", "never uses reasoning_effort"),
    ):
        said = refusal(capsys, directory, tmp_path / "run", model=tmp_path / name)
        assert message in said and str(tmp_path / name) in said


def test_problems_that_no_model_can_be_asked_are_refused(directory, tmp_path, capsys):
    """A split without any problem, or an evaluation with a problem longer than the context."""
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"prompt": "say 0", "answer": "7"}) + "\n")
    tasks = {"prompts__tasks": f"{{{path}: 1}}"}
    assert "split 'validation' gets none of the 1 problems of" in refusal(capsys, directory, tmp_path / "run", **tasks)
    texts = ["say 0", *(f"say {'8' * length}" for length in range(800, 812))]
    path.write_text("".join(json.dumps({"prompt": text, "answer": "7"}) + "\n" for text in texts))
    said = refusal(capsys, directory, tmp_path / "run", **tasks)
    assert f"{path}, line " in said and "tokens and the answer up to 5 at effort low" in said
    assert "but the context of the model, which is evaluated on them, is 768 tokens" in said


def test_directories_that_hold_something_else_are_refused_and_kept(directory, tmp_path, capsys):
    reward = tmp_path / "reward.py"
    reward.write_text("def paid(answer, score):\n    return score()\n")
    function = {"reward__function": f"{reward}:paid"}
    open_run(tmp_path / "run", inputs(directory, **function).identity)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    save_checkpoint(tmp_path / "other", CONFIG, random_params(CONFIG, 1), config_base={}, extra_files=chat_files())
    for name, changes, message in (
        ("foreign", {}, "holds files that are no run's (thesis.txt)"),
        ("file", {}, "is a file, but must be a directory"),
        ("run", {"reward__function": None}, "holds another run (reward.file"),
        ("run", {"seed": 7}, "holds another run (seed 8 -> 7)"),
        ("run", {"loop__steps": 9}, "holds another run (steps 5 -> 9)"),
        ("run", {"rollout__group": 7}, "holds another run (rollout.group 6 -> 7)"),
        ("run", {"loss__kl": 0.25}, "holds another run (loss.kl 0.0 -> 0.25)"),
        ("run", {"update__updates": 2}, "holds another run (update.updates 1 -> 2)"),
        ("run", {"reward__pass_threshold": 0.5}, "holds another run (reward.pass_threshold null -> 0.5)"),
        ("run", {"monitoring__collapse_steps": 3}, "holds another run (collapse "),
        ("run", {"train": "[router]"}, "holds another run (train "),
        ("run", {"model": tmp_path / "other"}, "holds another run (model "),
    ):
        assert message in refusal(capsys, directory, tmp_path / name, **{**function, **changes})
    reward.write_text("def paid(answer, score):\n    return 2 * score()\n")
    assert "holds another run (reward.file" in refusal(capsys, directory, tmp_path / "run", **function)
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "years of work"


def test_what_judges_makes_another_run(directory, tmp_path, monkeypatch):
    rows, package = tmp_path / "rows.jsonl", tmp_path / "paying"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    def identity(match="exact", pay="1.0"):
        row = {"prompt": "say 7", "answer": "7", "match": match}
        rows.write_text("".join(json.dumps({**row, "prompt": f"say {n}"}) + "\n" for n in range(40)))
        (package / "own.py").write_text(f"def pay(answer, score):\n    return {pay}\n")
        changes = {"prompts__tasks": f"{{{rows}: 1}}", "reward__function": "paying.own:pay"}
        return json.dumps(inputs(directory, **changes).identity)

    assert identity() == identity()
    assert len({identity(), identity(match="contains"), identity(pay="2.0")}) == 3


def test_questions_longer_than_the_context_are_passed_over(directory, tmp_path):
    texts = [f"say {number}" + " 8" * (400 if number % 9 == 0 else 0) for number in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": text, "answer": "7"}) + "\n" for text in texts))
    tasks = {"prompts__tasks": f"{{{tmp_path / 'rows.jsonl'}: 1}}", "monitoring__problems": 100}
    found = inputs(directory, **tasks)
    asked = found.questions.questions()
    long = {index for index, (problem, _) in enumerate(asked) if problem.seed % 9 == 0}
    assert 0 < len(long) < len(asked) and found.too_long == long


def test_what_changes_no_bit_changes_no_run(directory):
    often = {
        "loop__save_every": 1,
        "loop__log_every": 3,
        "monitoring__transcripts": 0,
        "reward__workers": 2,
        "mesh__data": 2,
    }
    assert inputs(directory, **often).identity == inputs(directory).identity
    # Writing out what a name stands for changes nothing.
    named = inputs(directory, loss__name="dapo", rollout__max_tokens="{low: 5, medium: 70, high: 9}")
    assert named.identity == inputs(directory).identity


def test_a_record_tells_where_a_model_comes_from(directory, tmp_path):
    kept = [list(ids) for ids in KEPT]
    assert inputs(directory).origin == (CONFIG, kept, [])
    assert inputs(directory, model=directory / "parent").origin is None
    shutil.copytree(directory / "model", tmp_path / "model")
    path = tmp_path / "model" / "provenance.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "parent": "gone", "trained": ["head"]}))
    assert inputs(directory, model=tmp_path / "model").origin == (CONFIG.with_blocks(BLOCKS), kept, ["head"])


def test_the_recipes_parse():
    assert {"grpo-accuracy", "grpo-length"} <= set(recipe_names("grpo"))
    given = ["--model", "m", "--out", "o"]
    accuracy, length = (parse(VERBS["grpo"], ["--recipe", name, *given]) for name in ("grpo-accuracy", "grpo-length"))
    assert accuracy.model == Path("m") and accuracy.out == Path("o")
    for recipe in (accuracy, length):
        assert recipe.loss.resolved.baseline == "leave_one_out" and recipe.loss.resolved.overlong_filter
        assert (recipe.mesh.devices, recipe.reward.function, recipe.export) == (1, None, "last")
    assert accuracy.prompts.efforts["low"] < accuracy.prompts.efforts["high"] and not accuracy.loss.length_budgets
    assert len(set(length.prompts.efforts.values())) == 1 and length.prompts.max_pass_rate == 1
    assert dict(length.loss.length_budgets) == {"low": 6, "medium": 20, "high": 32}
    changed = parse(
        VERBS["grpo"], ["--recipe", "grpo-length", *given, "--loop.steps", "7", "--optimizer.warmup_steps", "3"]
    )
    assert (changed.loop.steps, changed.optimizer.warmup_steps, changed.rollout.slots) == (7, 3, 128)
    with pytest.raises(ConfigError, match="model"):
        parse(VERBS["grpo"], ["--recipe", "grpo-length", "--out", "o"])


def test_help_says_what_there_is(capsys):
    assert main(["grpo", "--help-all"]) == 0
    said = capsys.readouterr().out
    assert "usage: puzzle train grpo" in said
    for name in ("--rollout.group", "--reward.function", "--monitoring.collapse", "grpo-accuracy"):
        assert name in said
