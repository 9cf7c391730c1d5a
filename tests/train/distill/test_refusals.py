"""Distillation's one-sentence refusals before weights are read, its recipe, its split of the data, and help."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from puzzle_jax.errors import PuzzleWarning
from puzzle_jax.generate.traces import write_traces
from puzzle_jax.runs import open_run
from puzzle_jax.settings.verbs import parse
from puzzle_jax.train.__main__ import VERBS, main
from puzzle_jax.train.distill.inputs import DistillInputs, apart
from puzzle_jax.train.traces.examples import examples_of
from tests.support import of_type
from tests.train.distill.toy_distill import CONFIG, arguments, cut, distiller, make, random_trace, refusal, save_parent

NOTHING = {"attention": {}, "moe": {}}
ROUTER = {"layers": [NOTHING, {"attention": {}, "moe": {"router_bias": np.arange(8, dtype=np.float32)}}]}
HEAD = {"layers": [NOTHING, NOTHING], "head": np.ones((CONFIG.hidden_size, CONFIG.vocab_size), np.float32)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="module")
def origin(directory) -> DistillInputs:
    return distiller(directory).inputs


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"parent": "nowhere"}, "nowhere"),
        ({"child": "nowhere"}, "nowhere is not a directory"),
        ({"traces": "nowhere.parquet"}, "nowhere.parquet cannot be read"),
        ({"traces": "[]"}, "traces is empty"),
        ({"parent": None}, "parent"),
        ({"recipe": "distill-huge"}, "recipe is 'distill-huge', but there is no such file"),
        ({"colour": "blue"}, "colour"),
        ({"loss__colour": "blue"}, "colour"),
        ({"train": "[norms]"}, "train has 'norms', but must be of router, experts"),
        ({"top_k": 0}, "top_k is 0, but must be at least 1"),
        ({"seed": -1}, "seed is -1, but must be at least 0"),
        ({"seed": 2**40}, "seed is 1099511627776, but must be from 0"),
        ({"remat": "perhaps"}, "remat"),
        ({"data__rows": 0}, "data.rows is 0, but must be at least 1"),
        ({"data__rows": 1.5}, "data.rows"),
        ({"data__row_length": 1}, "data.row_length is 1, but must be at least 2"),
        ({"data__heldout": 0}, "data.heldout is 0, but must be at least 1"),
        ({"data__heldout": 1000}, "data.heldout is 1000, which leaves nothing to train on"),
        ({"data__seed": -3}, "data.seed is -3"),
        ({"data__over_long": "shrink"}, "data.over_long"),
        ({"data__over_long": "refuse", "data__row_length": 19}, "tokens, but row_length is 19"),
        ({"data__row_length": 9}, "row_length is 9, but the shortest example"),
        ({"data__tasks": "{poetry: 2}"}, "tasks names 'poetry', but the traces have only add, chain"),
        ({"data__tasks": "{add: -1}"}, "data.tasks.add is -1"),
        ({"data__efforts": "{low: .nan}"}, "data.efforts.low is nan"),
        ({"data__efforts": "{extreme: 1}"}, "extreme"),
        ({"loss__forward_kl": -1}, "loss.forward_kl is -1"),
        ({"loss__forward_kl": ".nan"}, "loss.forward_kl is nan"),
        ({"loss__forward_kl": 0}, "all terms of loss are 0"),
        ({"loss__temperature": 0}, "loss.temperature is 0"),
        ({"loss__vocab_chunk": 0}, "loss.vocab_chunk is 0"),
        ({"loss__top_k_kl": 1}, "loss.top_k_kl is 1.0 and teacher_cache is None, but the one needs the other"),
        ({"teacher_cache": "cache"}, "loss.top_k_kl is 0.0 and teacher_cache is cache, but the one needs the other"),
        ({"optimizer__name": "magic"}, "optimizer.name is 'magic'"),
        ({"optimizer__learning_rate": ".inf"}, "optimizer.learning_rate is inf"),
        ({"optimizer__warmup_steps": 7}, "optimizer.warmup_steps is 7, but must be at most the 6 updates of the run"),
        ({"optimizer__b2": 1}, "optimizer.b2 is 1"),
        ({"loop__steps": 0}, "loop.steps is 0"),
        ({"loop__save_every": "often"}, "loop.save_every"),
        ({"mesh__data": 0}, "mesh.data is 0"),
        ({"mesh__data": 3}, "data.rows is 2, but must be a multiple of mesh.data (3)"),
        ({"mesh__sequence": 3}, "data.row_length is 40, but must be a multiple of mesh.sequence (3)"),
        ({"mesh__model": 99}, "needs 99 devices, but 8 are present"),
        ({"mesh__processes": 2}, "mesh has 1 devices (data x sequence x model), but must have a multiple of"),
    ],
)
def test_bad_settings_are_one_sentence_before_weights_are_read(directory, tmp_path, capsys, changes, message):
    assert message in refusal(capsys, directory, tmp_path / "run", **changes)


def test_children_that_were_not_cut_from_this_parent_are_refused(directory, tmp_path, capsys):
    shutil.copytree(directory / "child", tmp_path / "unrecorded")
    (tmp_path / "unrecorded" / "provenance.json").unlink()
    shutil.copytree(directory / "child", tmp_path / "foreign")
    words = (tmp_path / "foreign" / "tokenizer.json").read_bytes()
    (tmp_path / "foreign" / "tokenizer.json").write_bytes(words + b" ")
    save_parent(tmp_path / "other", seed=1)
    cut(tmp_path / "other", tmp_path / "of-other")
    for name, message in (
        ("unrecorded", "has no provenance.json"),
        ("foreign", "tokenizer.json is not the parent's"),
        ("of-other", "differs in row"),
    ):
        said = refusal(capsys, directory, tmp_path / "run", child=tmp_path / name)
        assert message in said and str(tmp_path / name) in said


def test_values_that_freezing_would_lose_are_refused(directory, tmp_path, capsys):
    cut(directory / "parent", tmp_path / "router", dense_delta=ROUTER)
    cut(directory / "parent", tmp_path / "head", dense_delta=HEAD)
    said = refusal(capsys, directory, tmp_path / "run", child=tmp_path / "router")
    assert "values of its own for layers.1.moe.router_bias" in said and "name router in train" in said
    said = refusal(capsys, directory, tmp_path / "run", "distill-blocks", child=tmp_path / "head")
    assert "values of its own for head" in said and "train it as a whole, not its blocks" in said


def test_traces_that_nothing_can_be_learnt_from_are_refused(directory, tmp_path, capsys):
    write_traces(tmp_path / "empty.parquet", [])
    write_traces(tmp_path / "foreign.parquet", [random_trace(3), random_trace(4, vocabulary=200_000)])
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("empty.parquet", "holds no trace"),
        ("foreign.parquet", "but the model's tokens are 0 to 127"),
        ("folder", "holds no file of traces"),
    ):
        said = refusal(capsys, directory, tmp_path / "run", traces=tmp_path / name)
        assert message in said and str(tmp_path / name) in said
    twice = f"[{directory / 'traces.parquet'}, {directory / 'traces.parquet'}]"
    assert "twice, but every file must come once" in refusal(capsys, directory, tmp_path / "run", traces=twice)


def test_directories_that_hold_something_else_are_refused_and_kept(directory, origin, tmp_path, capsys):
    open_run(tmp_path / "run", origin.identity)
    cut(directory / "parent", tmp_path / "run" / "child", dense_delta=HEAD)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    cached = {"loss__top_k_kl": 1, "teacher_cache": tmp_path / "foreign"}
    for name, changes, message in (
        ("foreign", {}, "holds files that are no run's (thesis.txt)"),
        ("file", {}, "is a file, but must be a directory"),
        ("run", {"seed": 7}, "holds another run (seed 0 -> 7)"),
        ("run", {"child": tmp_path / "run" / "child"}, "holds another run (child"),
        ("new", cached, "holds files that are no teacher's cache"),
        ("new", {**cached, "teacher_cache": tmp_path / "file"}, "is a file, but must be a directory for the teacher"),
    ):
        assert message in refusal(capsys, directory, tmp_path / name, "distill", **changes)
    assert "holds another run (data" in refusal(capsys, directory, tmp_path / "run", "distill-blocks", data__seed=1)
    said = refusal(capsys, directory, tmp_path / "new", "distill-blocks", **cached)
    assert "layers that train alone read no logits" in said
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "years of work"


# Parts


def test_all_answers_to_a_prompt_are_on_one_side(origin):
    prompts = [random_trace(number, prompt=number % 7) for number in range(0, 70, 4)]
    settings = replace(origin.recipe.data, row_length=64)
    named = (("a trace", prompt) for prompt in prompts)
    examples = examples_of(named, settings, CONFIG.vocab_size, "traces").examples
    for heldout in (1, 4, 9):
        settings = replace(settings, heldout=heldout)
        training, held = apart(examples, settings)
        of_training, of_held = (
            {of_type(np.ndarray, e.tokens)[: e.prompt_length].tobytes() for e in side} for side in (training, held)
        )
        assert len(held) >= heldout and not of_training & of_held
        assert sorted(map(id, [*training, *held])) == sorted(map(id, examples))
        reordered = apart(examples[::-1], settings)[1]
        assert set(map(id, reordered)) == set(map(id, held))
    settings = replace(settings, heldout=4)
    others = apart(examples, replace(settings, seed=1))[1]
    assert set(map(id, others)) != set(map(id, apart(examples, settings)[1]))


def test_what_the_examples_cannot_teach_is_told_with_counts(directory, tmp_path):
    def told(**changes):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            DistillInputs.open(
                parse(VERBS["distill"], arguments(directory, tmp_path / "nowhere", **changes)), blocks=False
            )
        return [str(warning.message) for warning in found if warning.category is PuzzleWarning]

    sizes = [len(t.prompt) + len(t.completion) for t in map(random_trace, range(240))]
    # The child has a window of 24 on a layer where its parent has full attention.
    (of_windows,) = told()
    assert (
        max(sizes) == 23 and "windows of 24 where" in of_windows and "the longest example has 23 tokens" in of_windows
    )
    over = sum(size > 16 for size in sizes)
    of_rows, of_windows = told(data__row_length=16, loss__token_chunk=16)
    assert of_rows == (
        f"of 240 traces {over} dropped (data.over_long), since they are longer than data.row_length (16); "
        "the longest has 23 tokens"
    )
    assert "the longest example has 16 tokens" in of_windows
    cut = told(data__row_length=16, data__over_long="cut", loss__token_chunk=16)[0]
    assert cut.startswith(f"of 240 traces {over} cut, since")


def test_templates_see_the_day_on_which_the_run_was_begun(directory, origin, tmp_path):
    """Otherwise traces given as text would render differently tomorrow, and the run could not be resumed."""
    identity = {**origin.identity, "today": "2024-02-29"}
    open_run(tmp_path / "run", identity)
    again = DistillInputs.open(replace(origin.recipe, out=tmp_path / "run"), blocks=False)
    assert again.identity["today"] == "2024-02-29" and again.model.chat.today.year == 2024
    open_run(tmp_path / "run", again.identity)


def test_the_tiny_recipe_and_single_or_several_files_of_traces():
    given = ["--parent", "p", "--child", "c", "--out", "o", "--recipe", "distill-tiny"]
    recipe = parse(VERBS["distill"], [*given, "--traces", "a.parquet", "--loop.steps", "900"])
    assert recipe.trace_paths == (Path("a.parquet"),)
    assert (recipe.loop.steps, recipe.loop.save_every, recipe.optimizer.warmup_steps) == (900, 200, 30)
    assert parse(VERBS["distill"], [*given, "--traces", "[a, b.jsonl]"]).trace_paths == (Path("a"), Path("b.jsonl"))


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_says_what_there_is(capsys, arguments):
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "usage: puzzle train" in said
    for name in VERBS if len(arguments) == 1 else {"distill": ["--loop.steps"]}.get(arguments[0], []):
        assert name in said
