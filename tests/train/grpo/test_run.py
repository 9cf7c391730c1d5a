"""Reinforcement learning from a checkpoint to a policy: outputs, learning, and failures on the way."""

import io
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16
from rich.console import Console

from puzzle_jax.convert_hf.child_of import open_child
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.errors import PuzzleError
from puzzle_jax.report.training import SECTIONS
from puzzle_jax.settings.verbs import parse
from puzzle_jax.train.__main__ import VERBS, main
from puzzle_jax.train.checkpoints import Checkpoints, Record, ocp
from puzzle_jax.train.grpo.inputs import GrpoInputs
from puzzle_jax.train.grpo.policy_update import PolicyUpdate
from puzzle_jax.train.grpo.primary_rewards import PrimaryRewards
from puzzle_jax.train.grpo.run import Trainer, grpo
from puzzle_jax.train.grpo.transcripts import Transcript
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.run import report
from puzzle_jax.train.step import TrainState
from tests.support import present, printed
from tests.train.grpo.toy_grpo import BLOCKS, KEPT, RIGHT, arguments, make, metrics, record, stored, write_prompts
from tests.train.in_processes import in_processes
from tests.train.interrupted import stop_and_kill

GROUP, PROMPTS, STEPS = 6, 4, 5


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def finished(directory, drawn_figures) -> Path:
    out = directory / "finished"
    with drawn_figures():
        assert main(["grpo", *arguments(directory, out)]) == 0
    return out


def all_lines(out: Path) -> list[dict]:
    """The lines of steps; an evaluation precedes them."""
    first, *lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert first["step"] == 0 and all(name == "step" or name.startswith("evaluation/") for name in first)
    return lines


def shown(out: Path, step: int) -> list[Transcript]:
    lines = (out / "transcripts" / f"step-{step:06d}.jsonl").read_text().splitlines()
    return [Transcript(**json.loads(line)) for line in lines]


def last_checkpoint(out: Path) -> Record:
    identity = json.loads((out / "run.json").read_text())["identity"]
    with Checkpoints(out / "checkpoints", identity=identity) as checkpoints:
        return checkpoints.records[-1]


def frozen(names) -> list[str]:
    return [name for name in names if ".router." in name or ".experts." in name]


# What a run leaves


def test_every_step_tells_what_the_report_shows(finished):
    lines = all_lines(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    known = {name for panels in SECTIONS.values() for panel in panels for name in panel.names}
    known -= {"evaluation/kl", "evaluation/next_token"}  # distillation only
    for line in lines:
        for name in known:
            if name.startswith("evaluation/"):
                continue
            assert name in line or (name.endswith("/") and any(one.startswith(name) for one in line)), name
    evaluated = {name for name in known if name.startswith("evaluation/") and not name.endswith("/")}
    assert [evaluated <= set(line) for line in lines] == [False, True, False, True, True]
    assert (finished / "report.html").stat().st_size > 10_000


def test_the_policy_that_learns_is_the_one_that_drew(finished):
    """Bit-identical when compared with itself; up to rounding when compared with the sampler's other programs."""
    for line in all_lines(finished):
        assert (line["ratio_max"], line["ratio_abs_log"], line["clipped"]) == (1.0, 0.0, 0.0)
        assert line["ratio_mean"] == pytest.approx(1.0, rel=1e-5)
        assert line["sampler_gap"] <= line["sampler_gap_max"] < 1e-4
        assert line["experts_differ"] == 0.0
        assert (line["masked_out"], line["importance"]) == (0.0, pytest.approx(1.0, rel=1e-5))


def test_steps_tell_sane_values(finished):
    lines = all_lines(finished)
    for line in lines:
        assert (line["updates"], line["skipped"], line["lost"]) == (1.0, 0.0, 0.0)
        assert min(line[f"{part}_seconds"] for part in ("rollout", "reward", "score", "update")) > 0
        assert line["pass_rate"] == line["reward"] == pytest.approx(line["shaped_reward"])  # rewards are 1 or 0
        assert 4 < line["tokens/low"] <= 5 and 4 < line["tokens/high"] <= 9
        assert 0 < line["entropy"] < np.log(128) and line["grad_norm"] > 0
        assert line["learning_rate"] == pytest.approx(0.006)
    # The first policy is its own reference; later ones have moved away from it.
    kl = [line["kl"] for line in lines]
    assert kl[0] < 1e-9 and min(kl[1:]) > 1e-3


def test_other_prompts_are_asked_in_place_of_those_without_signal(finished):
    lines = all_lines(finished)
    asked = [line["groups_kept"] + line["groups_no_signal"] for line in lines]
    assert all(PROMPTS <= count <= 2 * PROMPTS for count in asked) and max(asked) > PROMPTS
    for line, count in zip(lines, asked, strict=True):
        assert line["groups_kept"] <= PROMPTS and (line["groups_no_signal"] or count == PROMPTS)


def test_transcripts_show_what_rewards_were_given_for(finished):
    names = {path.name for path in (finished / "transcripts").iterdir()}
    assert names == {f"step-00000{step}.{kind}" for step in (1, 2, 4) for kind in ("jsonl", "html")}
    for step in (1, 2, 4):
        answers = shown(finished, step)
        assert [one.group for one in answers] == [0] * GROUP + [1] * GROUP
        for one in answers:
            assert one.reward == float(one.final == one.answer and not one.truncated)
            assert 1 <= one.tokens <= {"low": 5, "high": 9}[one.effort] and one.reason is None
        for group in (answers[:GROUP], answers[GROUP:]):
            rewards = np.array([one.reward for one in group])
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            np.testing.assert_allclose([one.advantage for one in group], expected, atol=1e-5)


def test_the_child_keeps_the_model_s_routers_and_experts(directory, finished):
    model, child = stored(directory / "model"), stored(finished / "child")
    assert len(frozen(child)) == 16
    for name in frozen(child):
        assert child[name].tobytes() == model[name].tobytes(), name
    assert all(child[name].tobytes() != model[name].tobytes() for name in model if name not in frozen(model))
    assert load_checkpoint(finished / "child").config.blocks == BLOCKS


def test_the_child_is_its_first_parent_s(directory, finished):
    found, (run,) = record(finished), record(finished)["grpo"]
    assert found["kept_experts"] == [list(kept) for kept in KEPT] and found["windows"] == [16, 24]
    assert found["parent"] == str(directory / "parent") and found["distilled"] == [{"steps": 23}]
    assert "layers.1.attention.sinks" in found["trained"] and not any("router" in name for name in found["trained"])
    opened = open_child(directory / "parent", finished / "child", every_expert=True)
    assert opened.child.kept == KEPT and set(opened.differing) == set(found["trained"])
    assert (run["step"], run["answers_per_step"], run["reward"]) == (STEPS, [PROMPTS, GROUP], None)
    assert run["tasks"] == {str(directory / "say.jsonl"): 2, "chain": 1} and run["efforts"] == {"low": 1, "high": 2}
    assert (run["loss"]["name"], run["loss"]["clip_high"], run["optimizer"]["eps"]) == ("dapo", 0.28, 1e-3)
    last = metrics(finished)[-1]
    evaluated = {name.removeprefix("evaluation/"): last[name] for name in last if name.startswith("evaluation/")}
    assert run["evaluation"] == evaluated and {"accuracy/low", "accuracy/high", "tokens", "error"} < set(evaluated)
    scales = present(load_checkpoint(finished / "child").kv_scales)
    np.testing.assert_array_equal(scales.k, np.float32(found["kv_scales"]["k"]))


def test_models_without_a_record_or_a_parent_in_it(directory, tmp_path, monkeypatch):
    """A model without a record is its own first parent; where the record names no parent, none is made up."""
    shutil.copytree(directory / "model", tmp_path / "orphan")
    path = tmp_path / "orphan" / "provenance.json"
    path.write_text(json.dumps({"kept_experts": KEPT, "windows": [16, 24], "trained": ["head"]}))
    monkeypatch.setattr(Trainer, "_greedy", lambda self, trained: [])
    monkeypatch.setattr(Trainer, "_measured", lambda self, answers: {"accuracy": 0.25})
    monkeypatch.setattr(Trainer, "_cache_scales", lambda self, trained, answers: None)
    found = []
    with PrimaryRewards() as rewards:
        for name, model in (("parent", directory / "parent"), ("orphan", tmp_path / "orphan")):
            recipe = parse(VERBS["grpo"], arguments(directory, tmp_path / f"of-{name}", model=model))
            trainer = Trainer(GrpoInputs.open(recipe), Placement(), Console(quiet=True), rewards)
            values = jax.jit(trainer.student.master_weights)(trainer.base)
            trainer.export_state(TrainState(jnp.int32(3), values, (), jax.random.key(0), jnp.int32(0)))
            found.append(record(tmp_path / f"of-{name}"))
    of_parent, of_orphan = found
    assert of_parent["parent"] == str(directory / "parent") and of_parent["kept_experts"] == [list(range(8))] * 2
    assert "parent" not in of_orphan and of_orphan["kept_experts"] == [list(kept) for kept in KEPT]
    assert of_orphan["trained"] == of_parent["trained"]
    assert [run["evaluation"] for run in (of_parent["grpo"][0], of_orphan["grpo"][0])] == [{"accuracy": 0.25}] * 2


def test_a_finished_run_writes_its_child_again_and_nothing_else(directory, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "child")
    console = Console(file=io.StringIO(), width=400)
    trained = grpo(parse(VERBS["grpo"], arguments(directory, out)), console)
    same(out, finished)
    assert trained.resumed_from == STEPS and f"policy of step {STEPS}: " in printed(console)
    head = np.asarray(trained.state.params["head"].T.astype(jnp.bfloat16))
    assert stored(out / "child")["lm_head.weight"].tobytes() == head.tobytes()


def same(out: Path, other: Path) -> None:
    for name in ("child/model.safetensors", "child/provenance.json", "child/config.json"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert metrics(out) == metrics(other)
    assert last_checkpoint(out) == last_checkpoint(other)
    mine, others = ({path.name: path.read_bytes() for path in (run / "transcripts").iterdir()} for run in (out, other))
    assert mine == others


# Interruption


def test_the_state_of_the_data_is_what_steps_have_told(finished):
    found = last_checkpoint(finished)
    assert found.step == STEPS
    assert isinstance(found.data, dict)
    assert found.data["rewards"]["last"] == [line["reward"] for line in metrics(finished)]
    rates = found.data["prompts"]["rates"]
    assert rates and all(0 <= passed <= answers for answers, passed in rates.values())
    assert {key.partition(" ")[0] for key in rates} == {"low", "high"}


@pytest.mark.once
@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_and_killed_ends_with_the_same_bits(directory, finished, tmp_path, kills):
    out = tmp_path / "run"
    stop_and_kill(["grpo", *arguments(directory, out)], out, 5, kills)
    # As if a process had written transcripts of steps that it did not live to save.
    (out / "transcripts" / "step-000005.html").write_text("of another process")
    (out / "transcripts" / "notes.txt").write_text("mine")
    assert main(["grpo", *arguments(directory, out)]) == 0
    (out / "transcripts" / "notes.txt").unlink()
    same(out, finished)


def test_a_signal_before_the_first_line_of_metrics_is_no_error(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    report(tmp_path, Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# Rewards of the user's own


SEVENS = """
import time
from pathlib import Path

def paid(answer, score):
    if answer.final == "3":
        raise ValueError("no threes")
    if answer.final == "5":
        return float("nan")
    hung = Path(__file__).with_name("hung")
    if answer.final == "9" and not hung.exists():
        hung.touch()
        time.sleep(3600)
    return 2.0 * (answer.final == "7")
"""


@pytest.fixture(scope="module")
def misjudged(directory):
    """A run with two updates per step and a reward function that fails at times; and the metrics of every update."""
    out, told = directory / "misjudged", []
    (directory / "sevens.py").write_text(SEVENS)
    options = {
        "prompts__tasks": f"{{{directory / 'say.jsonl'}: 1}}",
        "reward__function": f"{directory / 'sevens.py'}:paid",
        "reward__time_limit": 1.0,
        "reward__pass_threshold": 1.5,
        "rollout__resample": 0,
        "update__updates": 2,
        "update__reference": "false",
        "loop__evaluate_every": 1,
        "monitoring__transcripts": 1,
        "monitoring__transcript_groups": PROMPTS,
        "export": "best",
    }

    def spied(self, *given):
        state, found = update(self, *given)
        told.append({name: float(value) for name, value in found.items()})
        return state, found

    update = PolicyUpdate.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyUpdate, "__call__", spied)
        grpo(parse(VERBS["grpo"], arguments(directory, out, **options)), Console(quiet=True))
    return out, told


def test_a_reward_function_that_goes_wrong_costs_its_own_answers(misjudged):
    out, _ = misjudged
    reasons = {"3": "raised ValueError: no threes", "5": "returned nan"}
    late = 0
    for line in metrics(out):
        answers = shown(out, line["step"])
        assert len(answers) == PROMPTS * GROUP
        lost = [one for one in answers if one.reward is None]
        assert line["lost"] == len(lost)
        for one in answers:
            if one.reason is not None and one.reason.startswith("took longer than 1 s"):
                late += 1
            elif one.final in reasons:
                assert (one.reward, one.reason) == (None, reasons[one.final])
            else:
                assert (one.reward, one.reason) == (2.0 * (one.final == RIGHT), None)
        assert all(one.advantage == 0 for one in lost)
        rewards = [one.reward for one in answers if one.reward is not None]
        assert line["reward"] == pytest.approx(np.mean(rewards))
        assert line["pass_rate"] == pytest.approx(np.mean([reward > 0 for reward in rewards]))
    assert late >= 1 and metrics(out)[0]["lost"] > 1


def test_what_is_paid_for_is_learnt(misjudged, finished, directory):
    rewards = [line["reward"] for line in metrics(misjudged[0])]
    assert rewards[0] < 1.0 and rewards[-1] > rewards[0] + 0.8
    say = [line[f"reward/{directory / 'say.jsonl'}"] for line in metrics(finished)]
    assert say[0] < 0.4 and say[-1] > say[0] + 0.4


def test_a_second_update_is_compared_with_the_policy_before_the_first(misjudged):
    out, told = misjudged[0], list(misjudged[1])
    lines = metrics(out)
    # Steps with fewer groups to learn from have fewer updates.
    assert sum(line["updates"] for line in lines) == len(told)
    assert [line["updates"] for line in lines].count(2.0) >= 2
    for line in lines:
        assert "kl" not in line
        if not line["updates"]:
            continue
        first, *more = (told.pop(0) for _ in range(int(line["updates"])))
        # With several updates, the old log-probabilities come from another program; with one, the ratio is exactly 1.
        assert first["ratio_max"] == pytest.approx(1.0, abs=1e-4 if more else 0) and first["ratio_abs_log"] < 1e-5
        for second in more:
            assert abs(second["ratio_max"] - 1.0) > 1e-3 and second["ratio_abs_log"] > 1e-3
            assert line["ratio_max"] == max(first["ratio_max"], second["ratio_max"])
            assert line["ratio_mean"] == pytest.approx((first["ratio_mean"] + second["ratio_mean"]) / 2)


def test_the_best_policy_is_exported(misjudged):
    out, _ = misjudged
    is_best(out)
    assert record(out)["grpo"][0]["reward"].endswith("sevens.py:paid")


def is_best(out: Path) -> int:
    """Checks that the child is the policy with the lowest error, and returns its step."""
    errors = {line["step"]: line["evaluation/error"] for line in metrics(out)}
    best = min(errors, key=lambda step: (errors[step], step))
    (run,) = record(out)["grpo"]
    assert (run["step"], run["evaluation"]["error"]) == (best, errors[best])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided")
        head = ocp.load(str(out / "checkpoints" / str(best)))["params.head"]
    assert stored(out / "child")["lm_head.weight"].tobytes() == np.asarray(head).T.astype(bfloat16).tobytes()
    return best


# Nothing to learn, and collapse


def test_a_task_without_signal_is_told_once_and_not_trained_on(directory, tmp_path):
    """No answer to the file's nine rows for training is ever correct; by the third step all have been asked."""
    write_prompts(tmp_path / "never.jsonl", "none")
    options = {
        "prompts__tasks": f"{{{tmp_path / 'never.jsonl'}: 1}}",
        "prompts__efforts": "{high: 1}",
        "prompts__prompts": 3,
        "prompts__explore": 0,
        "rollout__resample": 0,
        "loop__evaluate_every": 0,
        "loop__save_every": 3,
    }
    out, console = tmp_path / "run", Console(file=io.StringIO(), width=400)
    with pytest.raises(
        PuzzleError, match=r"from 0\.1 to 0\.9: there is nothing to learn from .*never\.jsonl; name other"
    ):
        grpo(parse(VERBS["grpo"], arguments(directory, out, **options)), console)
    task = f"task {tmp_path / 'never.jsonl'} at effort high"
    said = f"{task} gives no signal: at no difficulty do 10% to 90% of the answers pass (0.0% in the mean)"
    assert printed(console).count(said) == 1
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]
    for line in metrics(out):
        assert (line["groups_kept"], line["groups_no_signal"], line["updates"], line["reward"]) == (0, 3, 0, 0)
        assert "loss" not in line and line["skipped"] == 0
    assert not (out / "child").exists()


FADING = """
judged = 0

def paid(answer, score):
    global judged
    judged += 1
    return 1.0 + (answer.final == "7") if judged <= 48 else 0.0
"""


def test_a_reward_that_collapses_ends_the_run_with_the_best_policy_before(directory, tmp_path, capsys):
    (tmp_path / "fading.py").write_text(FADING)
    options = {
        "prompts__tasks": f"{{{directory / 'say.jsonl'}: 1}}",
        "reward__function": f"{tmp_path / 'fading.py'}:paid",
        "rollout__resample": 0,
        "loop__evaluate_every": 1,
        "monitoring__collapse_steps": 1,
        "monitoring__collapse": 0.25,
    }
    out = tmp_path / "run"
    assert main(["grpo", *arguments(directory, out, **options)]) == 2
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2]
    best = max(line["reward"] for line in lines)
    assert 1 < best < 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "puzzle train grpo: step 3: the reward has collapsed: its mean over 1 steps is 0.000, below 0.25 "
        f"of the best, {best:.3f}; {out / 'child'} is the best policy before"
    )
    is_best(out)
    assert (out / "report.html").exists()


# Several devices


@pytest.mark.slow
def test_a_mesh_of_eight_devices_trains_what_one_does(directory, finished, tmp_path):
    options = {"mesh__data": 2, "mesh__sequence": 2, "mesh__model": 2}
    assert main(["grpo", *arguments(directory, tmp_path / "run", **options)]) == 0
    trained_alike(tmp_path / "run", finished)


@pytest.mark.once
def test_two_processes_train_what_one_does(directory, finished, tmp_path):
    """Only the first process computes rewards."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import os, pathlib\n"
        "def judge(answer, score):\n"
        f"    pathlib.Path({str(tmp_path)!r}, f'judged-for-{{os.getppid()}}').touch()\n"
        "    return score()\n"
    )
    out = tmp_path / "run"
    command = arguments(directory, out, mesh__data=2, reward__function=f"{reward}:judge")
    ended = in_processes(2, "grpo", *command)
    assert [process.returncode for process in ended] == [0, 0], [process.stderr for process in ended]
    assert ["policy of step" in process.stderr for process in ended] == [True, False]  # one reports for both
    assert len(list(tmp_path.glob("judged-for-*"))) == 1
    trained_alike(out, finished)
    for mine, others in zip(shown(out, 4), shown(finished, 4), strict=True):
        assert (mine.prompt, mine.final, mine.reward) == (others.prompt, others.final, others.reward)


@pytest.mark.slow
def test_a_bad_reward_function_is_refused_in_all_processes(directory, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("raise OSError('no such judge')")
    command = arguments(directory, tmp_path / "run", mesh__data=2, reward__function=f"{reward}:judge")
    ended = in_processes(2, "grpo", *command)
    assert [process.returncode for process in ended] == [2, 2], [process.stderr for process in ended]
    assert all("no such judge" in process.stderr for process in ended)
    assert not (tmp_path / "run").exists()


def trained_alike(out: Path, finished: Path) -> None:
    """Checks that a run agrees with `finished` up to the rounding that other shapes cause."""
    for line, of_one in zip(metrics(out), metrics(finished), strict=True):
        assert line == pytest.approx(of_one, rel=2e-3, abs=1e-5)
    child, of_one = stored(out / "child"), stored(finished / "child")
    for name in of_one:
        if name in frozen(of_one):
            assert child[name].tobytes() == of_one[name].tobytes(), name
        else:
            np.testing.assert_allclose(child[name].astype(np.float32), of_one[name].astype(np.float32), atol=0.01)
