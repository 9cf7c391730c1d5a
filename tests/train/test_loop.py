"""The training loop: however a run is interrupted, it ends bit-identical to an uninterrupted one."""

import importlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from puzzle_jax import progress
from puzzle_jax.errors import CheckpointError, ConfigError, PuzzleError
from puzzle_jax.model.sharding import make_training_mesh
from puzzle_jax.runs import locked
from puzzle_jax.train.checkpoints import Checkpoints, abstract_state
from puzzle_jax.train.loop import LoopSettings, train
from puzzle_jax.train.metrics import MetricsLog
from puzzle_jax.train.prefetch import AHEAD
from tests.support import printed
from tests.train.toy_job import LOOP, Stream, initial, toy_job


def quiet():
    return Console(file=io.StringIO(), width=200)


def run(directory, job=None, settings=LOOP, console=None):
    return train(toy_job() if job is None else job, settings, directory, console or quiet())


def bits(state):
    """A state's leaves as bytes, by path."""
    state = state._replace(key=jax.random.key_data(state.key))
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree.leaves_with_path(state)}


def lines(directory):
    """metrics.jsonl without times."""
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in found]


@cache
def whole():
    """Bits and metrics of an uninterrupted run."""
    with tempfile.TemporaryDirectory() as directory:
        trained = run(Path(directory) / "run")
        return bits(trained.state), lines(Path(directory) / "run")


def steps_in(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


def test_a_run_logs_evaluates_and_keeps_checkpoints(tmp_path):
    out = tmp_path / "deep" / "run"
    console = quiet()
    trained = run(out, console=console)
    assert (trained.step, trained.resumed_from, trained.preempted) == (20, 0, False)
    logged = lines(out)
    first, *logged = logged
    assert set(first) == {"step", "evaluation/error"} and first["step"] == 0
    assert [line["step"] for line in logged] == [3, 5, 6, 9, 10, 12, 15, 18, 20]
    names = {"step", "loss", "absolute", "grad_norm", "learning_rate", "skipped"}
    assert set(logged[0]) == names and set(logged[1]) == names | {"evaluation/error"}
    assert logged[1]["evaluation/error"] < first["evaluation/error"]
    assert logged[-1] == {name: value for name, value in trained.metrics.items() if name != "seconds_per_step"}
    assert logged[-1]["loss"] < logged[0]["loss"] and logged[-1]["evaluation/error"] < logged[1]["evaluation/error"]
    assert (trained.best_step, trained.best_metric) == (20, logged[-1]["evaluation/error"])
    assert steps_in(out) == [16, 20]
    assert any((out / "tensorboard").iterdir())
    again = run(out)  # nothing is left to do
    assert bits(again.state) == bits(trained.state) and again.resumed_from == 20
    assert again.metrics == trained.metrics and lines(out) == [first, *logged]
    assert (bits(trained.state), [first, *logged]) == whole()


def test_the_best_checkpoint_stays(tmp_path):
    errors = iter([0.5, 3.0, 1.0, 2.0, float("nan")])  # the evaluation before the first step makes no checkpoint
    trained = run(tmp_path / "run", toy_job(evaluate=lambda state: {"error": next(errors)}))
    # Evaluations that are the best so far make a checkpoint, at 5 and 10; NaN is never the best.
    assert steps_in(tmp_path / "run") == [10, 16, 20]
    assert (trained.best_step, trained.best_metric) == (10, 1.0)
    assert lines(tmp_path / "run")[-1]["evaluation/error"] is None


@pytest.mark.parametrize("at", [1, 7, 16])
def test_sigterm_ends_the_step_saves_and_the_next_run_goes_on(tmp_path, at):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    console = quiet()

    def stop(number):
        if number == at:
            os.kill(os.getpid(), signal.SIGTERM)

    first = run(tmp_path / "run", toy_job(Stream(stop)), console=console)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    stopped = first.step
    assert first.preempted and max(1, at - AHEAD - 1) <= stopped <= at + 1
    assert steps_in(tmp_path / "run")[-1] == stopped
    assert f"stopped at step {stopped} of 20" in printed(console)
    second = run(tmp_path / "run", console=console)
    assert (second.resumed_from, second.preempted) == (stopped, False)
    assert f"going on from step {stopped}" in printed(console)
    assert (bits(second.state), lines(tmp_path / "run")) == whole()


def test_a_second_interrupt_ends_at_once(tmp_path):
    def stop(state):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return {"error": 1.0}

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", toy_job(evaluate=stop))
    assert (bits(run(tmp_path / "run").state), lines(tmp_path / "run")) == whole()


def test_other_threads_train_without_handlers(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path / "run", settings=replace(LOOP, steps=2))))
    thread.start()
    thread.join()
    assert found[0].step == 2 and not found[0].preempted


def killed_while_training(out, seed):
    """Starts the run in its own process and kills it at a random moment after its first line of metrics."""
    log, rng = out / "metrics.jsonl", random.Random(seed)
    size = log.stat().st_size if log.exists() else 0
    process = subprocess.Popen([sys.executable, "-m", "tests.train.toy_job", str(out)], stdout=subprocess.DEVNULL)
    while process.poll() is None and (not log.exists() or log.stat().st_size <= size):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.4))
    process.kill()
    process.wait()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_two_kills_at_random_moments_lose_nothing(tmp_path, seed):
    for kill in range(2):
        killed_while_training(tmp_path / "run", 2 * seed + kill)
    trained = run(tmp_path / "run")
    assert (bits(trained.state), lines(tmp_path / "run")) == whole()
    assert steps_in(tmp_path / "run") == [16, 20]


def test_damaged_and_half_written_checkpoints_are_passed_over(tmp_path):
    out, console = tmp_path / "run", quiet()
    run(out, settings=replace(LOOP, steps=14, keep_last=3))
    held = out / "checkpoints"
    assert steps_in(out) == [10, 12, 14]
    for path in (held / "14").rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            os.truncate(path, path.stat().st_size // 2)
    (held / "12" / "_CHECKPOINT_METADATA").unlink()
    (held / "13").mkdir()
    (held / "15.orbax-checkpoint-tmp").mkdir()
    (held / ".deleted-4").mkdir()
    trained = run(out, console=console)
    told = printed(console)
    assert [f"checkpoints/{step} cannot be read" in told for step in (12, 13, 14, 10, 15)] == [True] * 3 + [False] * 2
    assert "going on from step 10" in told
    assert (bits(trained.state), lines(out)) == whole()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path):
    run(tmp_path / "run", settings=replace(LOOP, steps=4, keep_last=1))
    (tmp_path / "run/checkpoints/4/_CHECKPOINT_METADATA").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read: .*checkpoints/4 cannot be read"):
        run(tmp_path / "run")


def test_another_recipe_and_other_directories_are_refused(tmp_path):
    out = tmp_path / "run"
    run(out, settings=replace(LOOP, steps=2))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = {"recipe": {"learning_rate": 0.07}, "data": "ab12"}
    with pytest.raises(PuzzleError, match=r"holds another run \(recipe.learning_rate 0.03 -> 0.07"):
        run(out, toy_job(identity=other))
    with pytest.raises(
        PuzzleError, match=r"checkpoints/2 is a checkpoint of another run \(recipe.learning_rate 0.03 -> 0.07"
    ):
        Checkpoints(out / "checkpoints", identity=other)
    with pytest.raises(PuzzleError, match=r"run is at step 2, but loop.steps is 1"):
        run(out, settings=replace(LOOP, steps=1))
    with locked(out), pytest.raises(PuzzleError, match="another process works in"):
        run(out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    with pytest.raises(PuzzleError, match=r"holds files that are no run's \(notes.txt\)"):
        run(tmp_path / "foreign")


def poisoned(*numbers):
    def at(number):
        if number in numbers:
            return {"x": np.full((2, 5, 7), np.nan, np.float32), "weights": np.ones((2, 5), np.float32)}

    return Stream(at)


def test_skipped_steps_are_logged_and_too_many_in_a_row_end_the_run(tmp_path):
    trained = run(tmp_path / "few", toy_job(poisoned(2, 3, 5, 7, 8)))
    assert trained.step == 20
    skipped = [(line["step"], line["loss"]) for line in lines(tmp_path / "few") if line.get("skipped")]
    assert skipped == [(step, None) for step in (2, 3, 5, 7, 8)]
    with pytest.raises(PuzzleError, match="not finite in 3 steps in a row, up to step 10"):
        run(tmp_path / "many", toy_job(poisoned(4, 5, *range(8, 20))))
    assert steps_in(tmp_path / "many") == [5, 8]
    # A resumed run counts skipped steps before the checkpoint, too: step 8 was the first.
    with pytest.raises(PuzzleError, match="not finite in 3 steps in a row, up to step 10"):
        run(tmp_path / "many", toy_job(poisoned(*range(8, 20))))


def test_data_that_ends_or_fails_ends_the_run_in_place(tmp_path):
    with pytest.raises(PuzzleError, match="the data ended after 6 of 20 steps"):
        run(tmp_path / "short", toy_job(Stream(length=6)))
    assert steps_in(tmp_path / "short") == [4, 5]

    def fail(number):
        if number == 6:
            raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        run(tmp_path / "bad", toy_job(Stream(fail)))
    assert steps_in(tmp_path / "bad") == [4, 5]
    assert [line["step"] for line in lines(tmp_path / "bad")] == [0, 3, 5]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_step_before_one_that_raises_is_logged(tmp_path):
    step, made = toy_job().step, []

    def failing(state, fixed, batch):
        if len(made) == 7:
            raise ValueError("out of memory")
        made.append(step(state, fixed, batch))
        return made[-1]

    with pytest.raises(ValueError, match="out of memory"):
        run(tmp_path / "run", toy_job(step=failing))
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [0, 3, 5, 6, 7]  # 7 would not be logged otherwise
    assert found[-1]["loss"] == float(made[-1][1]["loss"])


def test_a_run_that_begins_anew_has_one_step_0(tmp_path):
    def die(number):
        if number == 2:
            raise ValueError("killed")

    with pytest.raises(ValueError, match="killed"):
        run(tmp_path / "run", toy_job(Stream(die)))
    assert lines(tmp_path / "run")[0]["step"] == 0 and not steps_in(tmp_path / "run")
    run(tmp_path / "run")
    assert lines(tmp_path / "run") == whole()[1]


def test_batches_are_placed_in_the_thread_that_makes_them(tmp_path):
    names = set()

    def place(batch):
        names.add(threading.current_thread().name)
        return jax.device_put(batch)

    trained = run(tmp_path / "run", toy_job(place=place))
    assert names == {"batches_0"} and bits(trained.state) == whole()[0]


def test_the_metric_that_decides_must_be_there(tmp_path):
    with pytest.raises(PuzzleError, match="best is 'kl', but an evaluation gives error"):
        run(tmp_path / "run", toy_job(best="kl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "loop.steps is 0, but must be at least 1"),
        ({"save_every": 0}, "loop.save_every is 0, but must be at least 1"),
        ({"evaluate_every": -1}, "loop.evaluate_every is -1, but must be at least 0"),
        ({"max_skipped": 0}, "loop.max_skipped is 0, but must be at least 1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        LoopSettings(**changes)


def test_checkpoints_restore_on_any_mesh_and_refuse_other_arrays(tmp_path):
    wide, narrow = make_training_mesh(4, 1, 2), make_training_mesh(1, 2, 3)
    values = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)
    cut = jax.device_put(values, NamedSharding(wide, PartitionSpec(("data", "model"))))
    half = jax.device_put(values.astype(jnp.bfloat16), NamedSharding(wide, PartitionSpec("model")))
    state = {"w": [cut, None, half], "count": jnp.int32(3), "key": jax.random.key(9)}
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        assert checkpoints.restore(abstract_state(state)) is None and not checkpoints.holds_any
        checkpoints.save(7, state, data={"big": 2**127})
        assert [record.step for record in checkpoints.records] == [7]
        elsewhere = abstract_state(state)
        elsewhere["w"][0] = jax.ShapeDtypeStruct(
            (8, 12), jnp.float32, sharding=NamedSharding(narrow, PartitionSpec("sequence", "model"))
        )
        restored = checkpoints.restore(elsewhere)
        assert restored is not None and restored.record.data == {"big": 2**127} and restored.record.metric is None
        found = restored.state
        assert found["w"][0].sharding == elsewhere["w"][0].sharding and found["w"][2].sharding == half.sharding
        assert found["w"][0].addressable_shards[0].data.shape == (4, 4) and not found["count"].committed
        np.testing.assert_array_equal(found["w"][0], values)
        np.testing.assert_array_equal(np.asarray(found["w"][2]), np.asarray(half))
        assert found["w"][1] is None and int(found["count"]) == 3 and found["key"] == jax.random.key(9)
        for wrong, told in (
            (
                {**elsewhere, "count": jax.ShapeDtypeStruct((2,), jnp.int32)},
                r"count is int32\[\] there, but int32\[2\] here",
            ),
            ({**elsewhere, "extra": elsewhere["count"]}, r"extra is missing there, but int32\[\] here"),
            ({name: elsewhere[name] for name in ("w", "key")}, r"count is int32\[\] there, but missing here"),
        ):
            with pytest.raises(PuzzleError, match=told):
                checkpoints.restore(wrong)
        with pytest.raises(CheckpointError, match="holds no checkpoint of step 8"):
            checkpoints.restore(elsewhere, step=8)
        assert checkpoints.restore(elsewhere, step=7) is not None


def test_saving_reads_the_state_before_it_is_donated(tmp_path):
    step = jax.jit(lambda x: 2 * x + 1, donate_argnums=0)
    x = jnp.arange(300_000, dtype=jnp.float32)
    expected = np.array(x)
    abstract = abstract_state({"x": x})
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(1, {"x": x}, data=None)
        for _ in range(3):
            x = step(x)
        x.block_until_ready()
        restored = checkpoints.restore(abstract)
    assert restored is not None
    np.testing.assert_array_equal(restored.state["x"], expected)


WRITER = """
try:
    import torch
except ImportError:
    torch = None

class SummaryWriter:
    def __init__(self, *_, **__):
        pass
    def close(self):
        pass
"""


def test_tensorboard_does_without_torch(tmp_path, monkeypatch):
    """tensorboardX is imported without torch where both are installed and torch is not imported yet."""
    (tmp_path / "tensorboardX.py").write_text(WRITER)
    (tmp_path / "torch.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in {"tensorboardX", "torch", *sys.modules}:
        if name.partition(".")[0] in ("tensorboardX", "torch"):
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name))  # restored at the end
            monkeypatch.delitem(sys.modules, name)
    with MetricsLog(tmp_path, 0, Console(quiet=True)):
        assert sys.modules["tensorboardX"].torch is None and "torch" not in sys.modules
    assert importlib.import_module("torch").__file__ == str(tmp_path / "torch.py")


def test_metrics_drop_torn_and_later_lines(tmp_path, monkeypatch):
    with MetricsLog(tmp_path, 0, quiet()) as log:
        for step in (2, 4, 6):
            log.write(step, {"loss": step / 4, "bad": float("inf")})
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')
    assert json.loads(path.read_text().splitlines()[1]) == {"step": 4, "bad": None, "loss": 1.0}
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    console = quiet()
    with MetricsLog(tmp_path, 4, console) as log:
        assert log.last == {"step": 4, "bad": None, "loss": 1.0}
        log.write(5, {"loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 5]
    assert printed(console).count("no TensorBoard without tensorboardX") == 1
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(PuzzleError, match=r"metrics.jsonl, line 2 is no object with a step"):
        MetricsLog(tmp_path, 4, console)


def test_restored_states_train_as_fresh_ones(tmp_path):
    """Uncommitted arrays stay uncommitted: otherwise they could not be used beside others on a mesh."""
    state = initial()
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(0, state, data=None)
        restored = checkpoints.restore(abstract_state(state))
    assert restored is not None and bits(restored.state) == bits(state)
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored.state))


# Progress


@pytest.mark.parametrize("terminal", [False, True])
def test_loss_reward_kl_and_tokens_per_second_stand_beside_the_progress(tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(progress._Lines, "SECONDS", 0.0)
    job = toy_job(tokens_per_step=70)
    rewarded = replace(job, step=lambda *given: _rewarded(*job.step(*given)))
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal, _environ={})
    train(rewarded, replace(LOOP, steps=6), tmp_path / "run", console)
    said = printed(console)
    beside = r"loss \d[\d.e-]*, reward 0.25, forward_kl 0.125, 9 rollout tokens/s, [\d,]+ tokens/s"
    assert re.search(beside if terminal else rf"training: \d of 6, \d+ s left, {beside}\n", said), said
    assert "absolute" not in said


def _rewarded(state, metrics):
    more = {"reward": 0.25, "forward_kl": 0.125, "rollout_tokens_per_second": 9.0}
    return state, metrics | {name: jnp.float32(value) for name, value in more.items()}
