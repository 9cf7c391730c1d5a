"""Pretraining from recipe to checkpoint, at the smallest size: exact resume, exact export, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.network import to_compute
from puzzle_jax.tasks import EFFORTS, Chat
from puzzle_jax.train.__main__ import main
from puzzle_jax.train.pretrain import run as pretraining
from puzzle_jax.train.pretrain.data import Bucket
from puzzle_jax.train.pretrain.recipe import PretrainRecipe
from puzzle_jax.train.pretrain.run import pretrain, round_for_export

MODEL = ModelConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    experts_per_token=2,
    blocks=(BlockConfig(5, 16), BlockConfig(5, None)),
    rope=RopeConfig(theta=1000.0, factor=4.0, original_context=256),
    max_position=1024,
)
RECIPE = PretrainRecipe(
    seed=3,
    model=MODEL,
    tasks={"chain": 1.0, "add": 0.5},
    efforts={"low": 1.0, "high": 1.0},
    buckets=(Bucket(96, 4, 1.0), Bucket(128, 3, 1.0)),
    steps=6,
    learning_rate=3e-3,
    final_steps=3,
    warmup_steps=2,
    save_every=2,
    held_out=2,
)


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """An untrained model never stops by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puzzle_jax.train.pretrain.measure.MAX_TOKENS", dict.fromkeys(EFFORTS, 8))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run: its directory, report and losses."""
    out = tmp_path_factory.mktemp("run") / "parent"
    losses = []
    report = pretrain(RECIPE, out, on_step=lambda step, loss: losses.append(loss))
    return out, report, losses


def test_the_loss_falls_and_the_report_is_written(run):
    out, report, losses = run
    assert len(losses) == RECIPE.steps
    assert losses[-1] < losses[0] and losses[0] > 4
    written = json.loads((out / "pretraining.json").read_text())
    assert written == json.loads(json.dumps(report))
    assert written["recipe"]["steps"] == 6 and written["seed"] == 3
    assert set(written["sampled"]) == set(written["greedy"]) == set(EFFORTS)
    assert set(written["greedy"]["low"]) == {"mean", "chain", "add"}
    assert 0 < written["greedy"]["low"]["chain"]["tokens"] <= 8
    assert len(written["effective_experts"]) == 2
    assert all(1 <= count <= 5 for count in written["effective_experts"])
    assert "recall_by_distance" not in written
    assert sorted(path.name for path in out.parent.iterdir()) == ["parent"]


def test_the_checkpoint_holds_exactly_what_was_measured(run, tmp_path):
    out, *_ = run
    checkpoint = load_checkpoint(out)
    assert checkpoint.config == MODEL
    params = to_compute(checkpoint.params, jnp.float32)
    for mine, again in zip(jax.tree.leaves(params), jax.tree.leaves(round_for_export(params)), strict=True):
        np.testing.assert_array_equal(mine, again)
    chat = Chat.load(out)
    assert chat.decode(chat.prompt_tokens("mod 1+2", "low")).endswith("mod 1+2<|end|><|start|>assistant")


def test_a_run_that_died_goes_on_exactly(run, tmp_path):
    out, _, losses = run
    seen, said = [], []

    def dies(step, loss):
        seen.append(loss)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(RECIPE, tmp_path / "parent", on_step=dies)
    assert not (tmp_path / "parent").exists()
    rest = []
    pretrain(RECIPE, tmp_path / "parent", on_step=lambda step, loss: rest.append(loss), on_stage=said.append)
    assert said[0] == "going on from step 2"
    assert seen == losses[:3] and rest == losses[2:]
    assert (tmp_path / "parent" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_states_of_other_recipes_and_full_directories_are_refused(run, tmp_path):
    out, *_ = run
    with pytest.raises(PuzzleError, match=r"parent exists and is not empty"):
        pretrain(RECIPE, out)
    state = pretraining.State(0, {}, ())
    pretraining.save_state(tmp_path / "x.state", RECIPE, state)
    other = dataclasses.replace(RECIPE, seed=4)
    with pytest.raises(PuzzleError, match=r"x.state.npz holds the state of another recipe"):
        pretraining.load_state(tmp_path / "x.state", other, state)


def test_a_diverged_run_says_so(tmp_path):
    recipe = dataclasses.replace(RECIPE, learning_rate=1e30, clip_norm=1e30, buckets=(Bucket(96, 4, 1.0),))
    with pytest.raises(PuzzleError, match=r"the loss is .* at step \d; a lower learning_rate would help"):
        pretrain(recipe, tmp_path / "parent")


def test_command_line_refuses_in_one_sentence(tmp_path, capsys):
    assert main(["pretrain", "--recipe", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("puzzle train pretrain: recipe ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
