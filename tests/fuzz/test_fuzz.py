"""Damaged input of every kind, by seed: no traceback, no long run, no harm to what was there.

A case calls a verb in a process that serves all of them, so that it costs milliseconds, on input that is refused or
taken before heavy work. Each is one seed of one kind, and can be run again by its name.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from puzzle_jax.cli import main
from puzzle_jax.generate.traces import Trace, write_traces
from puzzle_jax.search.recipe import EMBEDDED_PARENT
from tests.fuzz.mutations import TEXTS, VALUES, damage_file, damaged_bytes, dumped, mutated

ROOT = Path(__file__).parents[2]
SECONDS, MEMORY_BYTES, LONGEST_MESSAGE = 60, 4 << 30, 6000
DEFAULT, ALL = 100, 2000
COST = ["search", "cost", "--costs", "roofline", "--scenario.hardware", "h100"]
RECIPE = {
    "traces": {"tasks": ["chain"], "calibration": 3, "max_tokens": {"low": 5, "medium": 6, "high": 7}},
    "space": {"fractions": [1, 0.75, 0.5], "windows": [24], "restrict": [{"layers": "0-3", "min_experts": 8}]},
    "scenario": {"name": "chat", "input_tokens": 40, "output_tokens": 8, "batch": 3, "hardware": "h100"},
    "target": {"max_expert_bytes_ratio": 0.8, "min_speedup": 1.0},
    "score": {"method": "exact", "first": 3},
    "solve": {"solutions": 3, "time_limit": 5.0},
    "costs": "roofline",
}
LIBRARY = {
    f"layer {n}": {f"{c}": {"kl": 9.0 - c, "bytes": c, "ms": {"chat": 0.5 * c}} for c in (2, 4, 8)} for n in range(3)
}
SCENARIO = {
    "name": "mine",
    "input_tokens": 64,
    "output_tokens": 32,
    "hardware": "h100",
    "devices": 2,
    "tensor_parallel": 1,
}
PROBLEMS = [{"prompt": f"{n}+3=", "answer": f"{n + 3}", "match": "exact"} for n in range(4)]
TEXT_TRACES = [
    {"prompt": "2+2=", "completion": "4", "reasoning": "2,2", "effort": "high", "task": "add", "seed": 3},
    {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2", "thinking": "1"}]},
    {
        "messages": [{"role": "user", "content": "1"}],
        "choices": [{"message": {"content": "4"}, "finish_reason": "stop"}],
    },
    {"prompt": [5, 6, 7], "completion": [8, 1], "reward": 1.0, "details": {"steps": 3}, "log_probs": [-0.5, -0.25]},
]
CHAT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "config.json")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """What cases damage copies of: a run with costs and traces, a file of traces, costs from elsewhere."""
    root = tmp_path_factory.mktemp("originals")
    recipe = root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    traces = [Trace("add", "low", n, {"steps": n}, (5, 6, n % 90), (8, 9, 1), 1.0, False) for n in range(8)]
    write_traces(root / "traces.parquet", traces)
    write_traces(root / "traces.jsonl", traces)
    arguments = ["--recipe", str(recipe), "--run", str(root / "run"), "--traces.file", str(root / "traces.jsonl")]
    with contextlib.redirect_stdout(io.StringIO()):
        assert [main(["search", stage, *arguments]) for stage in ("cost", "trace")] == [0, 0]
    return root


# Kinds: each makes damaged input in a directory, and returns the command to give it to -------------------------------

Case = Callable[[random.Random, Path, Path], list[str]]


def command_lines(rng: random.Random, work: Path, originals: Path) -> list[str]:
    options = [
        "--target.min_speedup", "--traces.calibration", "--traces.tasks", "--space.windows", "--space.fractions",
        "--scenario.batch", "--scenario.input_tokens", "--scenario.name", "--score.method", "--solve.gap", "--run",
        "--traces.file", "--traces.max_tokens", "--mesh.data", "--recipe", "--costs", "--parent", "--space.restrict",
        "--more_scenarios", "--evaluate.baselines", "--traces.temperature", "--child.yarn_factor", "--solve.time_limit",
    ]  # fmt: skip
    found = ["search", "cost", "--costs", "roofline", "--run", str(work / "run"), "--scenario.hardware", "h100"]
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(options)
        name = rng.choice((name, name, name, name[:-1], name + "s", name.replace(".", "")))
        value = rng.choice(VALUES)
        text = value if isinstance(value, str) else json.dumps(value)
        # The run's own directory stays inside the case's.
        text = str(work / "other") if name == "--run" else text
        found += [f"{name}={text}"] if rng.random() < 0.5 else [name, text]
    return found


def other_command_lines(rng: random.Random, work: Path, originals: Path) -> list[str]:
    """Verbs with options of their own, refused for what is wrong with them."""
    bad = rng.choice([text for text in TEXTS if text not in ("--help", "-")])
    model = str(EMBEDDED_PARENT)
    return rng.choice(
        [
            ["generate", "--model", bad, "hi"],
            ["generate", "--model", model, "--max-tokens", bad, "hi"],
            ["generate", "--model", model, "--effort", bad, "hi"],
            ["generate", "--model", model, "--temperature", rng.choice(["-1", "nan", "inf", bad]), "hi"],
            ["evaluate", "--models", bad, "--out", str(work / "out")],
            ["evaluate", "--models", f"a={model}", "--tasks", bad, "--out", str(work / "out")],
            ["evaluate", "--models", f"a={model}", "--max-tokens", bad or "low=x", "--out", str(work / "out")],
            [
                "evaluate",
                "--models",
                f"a={model}",
                "--problems",
                rng.choice(["-3", "0", "x"]),
                "--out",
                str(work / "o"),
            ],
            ["convert_hf", "inspect", bad],
            ["convert_hf", "export", "--checkpoint", bad, "--out", str(work / "out")],
            ["convert_hf", "verify", bad, model],
            ["train", "distill", "--parent", bad, "--child", model, "--traces", "x.jsonl", "--out", str(work / "out")],
            ["train", "grpo", "--model", bad, "--out", str(work / "out")],
            ["train", "average", bad, model, "--out", str(work / "out")],
            [
                "train",
                "traces",
                "--parent",
                model,
                "--problems",
                rng.choice(["-1", "0", bad]),
                "--out",
                str(work / "a.csv"),
            ],
            ["search", "estimate", "--model", model, "--baseline", bad, "--scenario", "h100x1-4k"],
            ["search", "estimate", "--model", model, "--baseline", model, "--scenario", bad or "x"],
            [bad],
            ["train", bad],
            ["search", bad],
        ]
    )


def recipes(rng: random.Random, work: Path, originals: Path) -> list[str]:
    path = work / "recipe.yaml"
    if rng.random() < 0.6:
        path.write_text(yaml.safe_dump(_plain(mutated(RECIPE, rng, rng.choice((1, 1, 2)))), allow_unicode=True))
    else:
        bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        )
        text = rng.choice(
            [damaged_bytes(yaml.safe_dump(RECIPE).encode(), rng), bomb.encode(), b"a: &a [*a]", b"x: 1\nx: 2"]
        )
        path.write_bytes(text)
    return [*COST[:2], "--recipe", str(path), "--run", str(work / "run")]


def problems(rng: random.Random, work: Path, originals: Path) -> list[str]:
    _lines(work / "rows.jsonl", PROBLEMS, rng)
    more = ["--problems", "99", "--efforts", "low", "--max-tokens", "low=2000", "--no-throughput"]  # beyond the context
    return [
        "evaluate",
        "--models",
        f"a={EMBEDDED_PARENT}",
        "--tasks",
        str(work / "rows.jsonl"),
        "--out",
        str(work / "o"),
        *more,
    ]


def traces(rng: random.Random, work: Path, originals: Path) -> list[str]:
    path = work / rng.choice(("traces.jsonl", "traces.jsonl", "traces.parquet"))
    if path.suffix == ".parquet":
        path.write_bytes(damaged_bytes((originals / "traces.parquet").read_bytes(), rng))
    else:
        _lines(path, TEXT_TRACES, rng)
    return [
        "search",
        "trace",
        "--recipe",
        str(originals / "recipe.yaml"),
        "--traces.file",
        str(path),
        "--run",
        str(work / "run"),
    ]


def costs(rng: random.Random, work: Path, originals: Path) -> list[str]:
    shutil.copy(originals / "run/cost/costs.json", work / "costs.json")
    damage_file(work / "costs.json", rng, originals / "recipe.yaml")
    return [
        "search",
        "cost",
        "--recipe",
        str(originals / "recipe.yaml"),
        "--costs",
        str(work / "costs.json"),
        "--run",
        str(work / "run"),
    ]


def libraries(rng: random.Random, work: Path, originals: Path) -> list[str]:
    (work / "library.json").write_text(dumped(LIBRARY))
    damage_file(work / "library.json", rng, originals / "recipe.yaml")
    return [
        "search",
        "solve",
        "--library",
        str(work / "library.json"),
        "--minimize",
        "kl",
        "--at-most",
        "bytes=12",
        "--time-limit",
        "5",
    ]


def scenarios(rng: random.Random, work: Path, originals: Path) -> list[str]:
    path = work / "scenario.yaml"
    path.write_text(yaml.safe_dump(_plain(mutated(SCENARIO, rng)), allow_unicode=True))
    if rng.random() < 0.3:
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
    config = str(EMBEDDED_PARENT / "config.json")
    return ["search", "estimate", "--model", config, "--baseline", config, "--scenario", str(path)]


def run_directories(rng: random.Random, work: Path, originals: Path) -> list[str]:
    run = work / "run"
    shutil.copytree(originals / "run", run)
    files = sorted(path for path in run.rglob("*") if path.is_file())
    damage_file(rng.choice(files), rng, originals / "recipe.yaml")
    stage = rng.choice(("cost", "trace", "recost", "solve"))
    changed = ["--scenario.batch", "4"] if rng.random() < 0.3 else []
    file = ["--traces.file", str(originals / "traces.jsonl")]
    return ["search", stage, "--recipe", str(originals / "recipe.yaml"), "--run", str(run), *file, *changed]


def chats(rng: random.Random, work: Path, originals: Path) -> list[str]:
    model = _model(work)
    name = rng.choice(CHAT_FILES)
    if name == "chat_template.jinja" and rng.random() < 0.7:
        ends = [
            "{{ 1/0 }}",
            "{% for i in range(10**9) %}{% endfor %}",
            "{{ x.y.z }}",
            "{% break %}",
            "{{ [1]|sum('a') }}",
            "{%",
        ]
        (model / name).write_text("{{ reasoning_effort }}" + rng.choice(ends))
    else:
        damage_file(model / name, rng, originals / "recipe.yaml")
    # A request beyond the context ends before weights are read, where the chat could be.
    return ["generate", "--model", str(model), "--max-tokens", "5000", "hi"]


def checkpoints(rng: random.Random, work: Path, originals: Path) -> list[str]:
    model = _model(work)
    if rng.random() < 0.5:
        damage_file(model / "config.json", rng, originals / "recipe.yaml")
    else:
        file = model / "model.safetensors"
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = damaged_bytes(raw[8 : 8 + size], rng)
        if rng.random() < 0.6:
            header = dumped(mutated(json.loads(raw[8 : 8 + size]), rng)).encode()
        length = rng.choice((len(header), len(header), 2**62, 0))
        file.write_bytes(length.to_bytes(8, "little") + header + raw[8 + size :][:1000])
    return rng.choice(
        [
            ["convert_hf", "inspect", str(model)],
            ["convert_hf", "export", "--checkpoint", str(model), "--out", str(work / "out")],
        ]
    )


KINDS: dict[str, Case] = {
    kind.__name__: kind
    for kind in (
        command_lines, other_command_lines, recipes, problems, traces, costs, libraries, scenarios, run_directories,
        chats, checkpoints,
    )
}  # fmt: skip
CASES = [(name, seed) for seed in range(-(-ALL // len(KINDS))) for name in KINDS][:ALL]


@pytest.mark.parametrize(
    ("kind", "seed"),
    [case if index < DEFAULT else pytest.param(*case, marks=pytest.mark.slow) for index, case in enumerate(CASES)],
)
def test_damaged_input(kind, seed, originals, worker, tmp_path):
    command = KINDS[kind](random.Random(f"{kind} {seed}"), tmp_path, originals)
    before = _content(originals)
    found = worker.ask(tmp_path, command)
    assert not found["bug"], (command, found["bug"])
    lines = [line for line in found["err"].splitlines() if ": warning: " not in line and not line.startswith("  ")]
    assert found["code"] in (0, 2), (command, found)
    assert "Traceback" not in found["err"] + found["out"]
    if found["code"] == 2:
        assert len(lines) == 1 and len(lines[0]) < LONGEST_MESSAGE, (command, lines)
    assert _content(originals) == before
    assert found["memory"] < MEMORY_BYTES


class Worker:
    """A process that runs commands, made anew when it had to be ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, directory: Path, command: list[str]) -> dict[str, Any]:
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen([sys.executable, "-m", "tests.fuzz.worker"], cwd=ROOT, **pipes)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"directory": str(directory), "command": command}).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], SECONDS)[0]:
            self.end()
            raise AssertionError(f"{command} took longer than {SECONDS} s")
        line = self.process.stdout.readline()
        if not line:
            self.end()
            raise AssertionError(f"{command} ended its process")
        return json.loads(line)

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def worker():
    found = Worker()
    yield found
    found.end()


def _content(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _model(work: Path) -> Path:
    model = work / "model"
    model.mkdir()
    for path in EMBEDDED_PARENT.iterdir():
        if path.is_file():
            shutil.copy(path, model / path.name)
    return model


def _lines(path: Path, rows: list[dict], rng: random.Random) -> None:
    """Rows of which one is damaged, as JSON lines."""
    number = rng.randrange(len(rows))
    lines = [dumped(mutated(row, rng) if n == number else row).encode() for n, row in enumerate(rows)]
    if rng.random() < 0.3:
        lines[number] = damaged_bytes(lines[number], rng)
    path.write_bytes(b"\n".join(lines))


def _plain(value):
    """What YAML can write; whole numbers of thousands of digits it cannot read."""
    return json.loads(json.dumps(value, default=str))
