"""Pretraining from recipe to checkpoint at the smallest size: exact resume, exact export, refusals."""

import dataclasses
import io
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from puzzle_jax.config import BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.network import to_compute
from puzzle_jax.runs import read_metrics
from puzzle_jax.tasks import EFFORTS, Chat
from puzzle_jax.tasks.chat.embedded import embedded_chat
from puzzle_jax.train.__main__ import main
from puzzle_jax.train.fake_quant import fake_quantize_experts
from puzzle_jax.train.loop import LoopSettings
from puzzle_jax.train.optimizer import OptimizerSettings
from puzzle_jax.train.pretrain import run as pretraining
from puzzle_jax.train.pretrain.data import BatchSource, Bucket
from puzzle_jax.train.pretrain.loss import pretraining_loss
from puzzle_jax.train.pretrain.recipe import PretrainRecipe
from puzzle_jax.train.pretrain.run import pretrain, pretraining_job, round_for_export
from puzzle_jax.train.rows import Packed
from tests.support import of_type, printed

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
    out=Path("nowhere"),
    optimizer=OptimizerSettings(
        learning_rate=3e-3, schedule="wsd", decay_fraction=0.5, final_fraction=0.05, warmup_steps=2, b2=0.98
    ),
    loop=LoopSettings(steps=6, save_every=2, log_every=1, max_skipped=2),
    held_out=2,
    max_tokens=dict.fromkeys(EFFORTS, 8),  # an untrained model never stops by itself
)
QUIET = Console(quiet=True)


def losses(out):
    return [line["next_token"] for line in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, drawn_figures):
    """The directory of an uninterrupted run."""
    out = tmp_path_factory.mktemp("run") / "pretrained"
    with drawn_figures():
        pretrain(dataclasses.replace(RECIPE, out=out), QUIET)
    return out


def test_the_loss_falls_and_the_report_is_written(run):
    found = losses(run)
    assert len(found) == RECIPE.loop.steps
    assert found[-1] < found[0] and found[0] > 4
    written = json.loads((run / "parent" / "pretraining.json").read_text())
    assert written["recipe"]["steps"] == 6 and written["seed"] == 3
    assert set(written["sampled"]) == set(written["greedy"]) == set(EFFORTS)
    assert set(written["greedy"]["low"]) == {"mean", "chain", "add"}
    assert 0 < written["greedy"]["low"]["chain"]["tokens"] <= 8
    assert len(written["effective_experts"]) == 2
    assert all(1 <= count <= 5 for count in written["effective_experts"])
    assert "recall_by_distance" not in written
    names = {path.name for path in run.iterdir()} - {"tensorboard"}
    assert names == {"run.json", "checkpoints", "metrics.jsonl", "report.html", "parent"}


def test_the_rate_falls_to_its_end_while_experts_are_rounded(run):
    rates = [line["learning_rate"] for line in read_metrics(run / "metrics.jsonl")]
    assert rates == pytest.approx([0.0015, 0.003, 0.003, 0.003, 0.00205, 0.0011])
    assert RECIPE.rounded_steps == 3
    job = pretraining_job(RECIPE, embedded_chat())
    assert [bool(of_type(Packed, next(job.batches)).extras["rounded"][0]) for _ in range(6)] == [False] * 3 + [True] * 3
    with pytest.raises(StopIteration):
        next(job.batches)


def test_rounding_is_what_the_loss_sees():
    """Parameters on the grid have the same loss in both phases; others do not."""
    batch = of_type(BatchSource, pretraining_job(RECIPE, embedded_chat()).batches).batch(0)
    params, key = pretraining.initial_params(RECIPE), jax.random.key(0)
    loss = jax.jit(partial(pretraining_loss, MODEL, 0.0))

    def nll(params, rounded):
        total, weight, _ = loss(params, None, batch._replace(extras={"rounded": np.asarray(rounded)}), key)
        return float(total / weight)

    grid = fake_quantize_experts(params)
    assert nll(params, True) == pytest.approx(nll(grid, False), rel=1e-6) == pytest.approx(nll(grid, True), rel=1e-6)
    assert abs(nll(params, True) - nll(params, False)) > 1e-6


def test_the_checkpoint_holds_exactly_what_was_measured(run):
    out = run / "parent"
    checkpoint = load_checkpoint(out)
    assert checkpoint.config == MODEL
    params = to_compute(checkpoint.params, jnp.float32)
    for mine, again in zip(jax.tree.leaves(params), jax.tree.leaves(round_for_export(params)), strict=True):
        np.testing.assert_array_equal(mine, again)
    chat = Chat.load(out)
    assert chat.decode(chat.prompt_tokens("mod 1+2", "low")).endswith("mod 1+2<|end|><|start|>assistant")


def test_a_run_that_died_goes_on_exactly(run, tmp_path, monkeypatch):
    recipe, batch = dataclasses.replace(RECIPE, out=tmp_path / "run"), BatchSource.batch

    def dies(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return batch(self, step)

    monkeypatch.setattr(BatchSource, "batch", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, QUIET)
    assert not (tmp_path / "run" / "parent").exists()
    monkeypatch.setattr(BatchSource, "batch", batch)
    console = Console(file=io.StringIO())
    assert pretrain(recipe, console).resumed_from == 2
    assert "going on from step 2" in printed(console)
    assert losses(tmp_path / "run") == losses(run)
    model = ("parent", "model.safetensors")
    assert tmp_path.joinpath("run", *model).read_bytes() == run.joinpath(*model).read_bytes()


def test_runs_of_other_recipes_and_full_directories_are_refused(run, tmp_path):
    with pytest.raises(PuzzleError, match=r"holds another run \(recipe\.seed 3 -> 4\)"):
        pretrain(dataclasses.replace(RECIPE, out=run, seed=4), QUIET)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(PuzzleError, match=r"holds files that are no run's \(mine.txt\)"):
        pretrain(dataclasses.replace(RECIPE, out=tmp_path), QUIET)


def test_a_diverged_run_says_so(tmp_path):
    wild = dataclasses.replace(RECIPE.optimizer, learning_rate=1e30, clip_norm=1e30)
    recipe = dataclasses.replace(RECIPE, out=tmp_path / "run", optimizer=wild, buckets=(Bucket(96, 4, 1.0),))
    with pytest.raises(PuzzleError, match=r"not finite in 2 steps in a row, up to step \d; .* a lower learning_rate"):
        pretrain(recipe, QUIET)


def test_command_line_refuses_in_one_sentence(tmp_path, capsys):
    assert main(["pretrain", "--recipe", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("puzzle train pretrain: recipe ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
