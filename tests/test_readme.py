"""Runs README's commands for the reader's own model as they are written, on a small model in place of gpt-oss-20b.

Only sizes are reduced, by options appended to those of README.
"""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from puzzle_jax.cli import main
from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.tasks.chat.embedded import chat_files
from tests.paths import ROOT
from tests.support import chat_config, random_params

README = ROOT / "README.md"
PARENT = "path/to/gpt-oss-20b"

LIMITS = "{low: 5, medium: 6, high: 7}"
TRACES = (
    *("--traces.tasks", "[chain]", "--traces.calibration", "3", "--traces.validation", "2"),
    *("--traces.confirmation", "2", "--traces.heldout", "2", "--traces.max_tokens", LIMITS, "--traces.batch_size", "9"),
)
SEARCH = (
    "--space.fractions",
    "[1, 0.75, 0.5]",
    "--solve.solutions",
    "3",
    "--evaluate.problems",
    "2",
    "--refine.swaps",
    "0",
)
TARGET = ("--target.min_speedup", "1.0")
DISTILL = ("--loop.steps", "2", "--data.row_length", "128", "--data.heldout", "2", "--loss.token_chunk", "64")
GRPO = (
    *("--prompts.prompts", "2", "--rollout.group", "2", "--rollout.max_tokens", LIMITS, "--update.row_length", "512"),
    *(
        "--loop.steps",
        "1",
        "--optimizer.warmup_steps",
        "0",
        "--monitoring.problems",
        "1",
        "--monitoring.transcripts",
        "0",
    ),
)
ROAD = {
    "max_tokens": "low=5,medium=6,high=7",
    "mesh.model": 1,
    "search.scenario.tensor_parallel": 1,
    "search.traces": "calibration=3,validation=2,confirmation=2,heldout=2,batch_size=9",
    "search.space.fractions": "1,0.75,0.5",
    "search.score.method": "exact",
    "search.solve.solutions": 2,
    "search.refine": "rounds=0,swaps=0",
    "search.evaluate": "{baselines: [], problems: 2, rounds: 0}",
    "search.target.max_expert_bytes_ratio": 0.8,
    "traces.batch_size": 9,
    "distill.data": "row_length=128,heldout=2",
    "distill.loop": "steps=2",
    "distill.optimizer.warmup_steps": 0,
    "average": "{weights: [0, 1], problems: 1, batch_size: 9}",
    "control": "false",
    "evaluate": "{slots: 9, bootstrap: 20, rounds: 1, scenarios: {short: [9, 5]}}",
}
POLICY = {
    "prompts.prompts": 2,
    "rollout": "group=2,slots=9",
    "update.row_length": 128,
    "loop": "steps=1",
    "optimizer.warmup_steps": 0,
    "monitoring": "problems=1,transcripts=0",
}
ROAD |= {f"{policy}.{name}": value for policy in ("accuracy", "length") for name, value in POLICY.items()}
SMALLER = {
    "search --recipe": (
        *TRACES,
        *SEARCH,
        *TARGET,
        "--target.max_expert_bytes_ratio",
        "0.8",
        "--mesh.model",
        "1",
        "--score.tokens_per_batch",
        "1024",
    ),
    "search --parent": (
        *SEARCH,
        *TARGET,
        "--costs",
        "roofline",
        "--scenario.hardware",
        "h100",
        "--evaluate.rounds",
        "0",
    ),
    "plan search": ("--traces.max_tokens", LIMITS, "--prompt-tokens", "26", "--traces.batch_size", "4"),
    "train traces": ("--problems", "3", "--max-tokens", "7", "--batch-size", "9"),
    "train distill": DISTILL,
    "evaluate --models": (
        "--problems",
        "2",
        "--max-tokens",
        "low=5,medium=6,high=7",
        "--no-throughput",
        "--slots",
        "9",
    ),
    "generate --model": ("--max-tokens", "5"),
    "evaluate caches": ("--problems", "2", "--tasks", "chain"),
    "train grpo": GRPO,
    "run --parent": tuple(f"--{name}={value}" for name, value in ROAD.items()),
    "train average": ("--problems", "1", "--max-tokens", "7", "--weights", "0,1"),
}
SLOW = ("train grpo", "train average", "evaluate caches", "run --parent", "status runs/road")


def commands() -> list[list[str]]:
    """Words of every command in README's blocks that is about the reader's own model, in order."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [
        shlex.split(line, comments=True) for line in lines if line.startswith(("puzzle ", "python -m puzzle_jax."))
    ]
    own = re.compile(rf"{PARENT}|runs/(mine|road|distilled|accuracy|length)")
    return [command for command in words if any(own.search(word) for word in command)]


def test_readme_has_the_commands_that_are_run_here():
    found = {what for what in SMALLER if any(what in " ".join(command) for command in commands())}
    assert found == set(SMALLER)
    assert sum(PARENT in " ".join(command) for command in commands()) >= 6


@pytest.mark.once
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_commands_run(tmp_path, monkeypatch, capsys, slow):
    monkeypatch.chdir(tmp_path)
    # The recipe's scenario has contexts of 128K tokens.
    config = replace(chat_config(), max_position=1 << 18)
    save_checkpoint(tmp_path / PARENT, config, random_params(config, 0), config_base={}, extra_files=chat_files())
    rows = [{"prompt": f"{n}+{n + 3}=", "reasoning": f"{n},{n + 3}", "completion": f"{2 * n + 3}"} for n in range(9)]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"prompt": row["prompt"], "answer": row["completion"]} for row in rows * 5]
    problems = [{**row, "prompt": f"{n}: {row['prompt']}"} for n, row in enumerate(problems)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    for words in commands():
        given = words[1:] if words[0] == "puzzle" else [words[2].removeprefix("puzzle_jax."), *words[3:]]
        text = " ".join(given)
        if not slow and any(what in text for what in SLOW):
            continue
        if "search --parent" in text:  # the second of two searches; the commands after it go on from the first
            given = [word.replace("runs/mine", "runs/mine-too") for word in given]
        more = next((options for what, options in SMALLER.items() if what in text), ())
        assert main([*given, *more]) == 0, (text, capsys.readouterr().err)
    assert Path("runs/mine/report/report.md").is_file() and Path("runs/mine-too/report/report.md").is_file()
    assert Path("runs/distilled/child/config.json").is_file()
