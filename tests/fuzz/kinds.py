"""Kinds of damaged input: each makes one in a directory, and returns the command that takes it.

Commands refuse their input, or are done, before any heavy work. Everything that a command may write is in its
directory, under a name of `OUTPUTS`.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from puzzle_jax.costs.assumptions import DEFAULT as ASSUMPTIONS
from puzzle_jax.search.recipe import EMBEDDED_PARENT
from tests.fuzz.mutations import TEXTS, VALUES, damage_file, damaged_bytes, dumped, mutated, places

OUTPUTS = {"run", "other", "out", "o", "a.csv"}
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
DISTILL = {
    "train": ["router"],
    "teacher_cache": None,
    "top_k": 8,
    "data": {"row_length": 64, "rows": 2, "tasks": {"add": 2.0}, "over_long": "drop", "heldout": 2, "seed": 1},
    "loss": {"forward_kl": 1.0, "hidden_mse": 0.5, "temperature": 1.0, "token_chunk": 64},
    "optimizer": {"name": "adamw", "learning_rate": 0.001, "warmup_steps": 1, "schedule": "wsd", "clip_norm": 1.0},
    "loop": {"steps": 2, "evaluate_every": 1, "save_every": 1, "keep_best": 1},
    "mesh": {"data": 1, "sequence": 1, "model": 1, "processes": 1},
    "seed": 3,
}
GRPO = {
    **{name: DISTILL[name] for name in ("train", "optimizer", "loop", "mesh", "seed")},
    "export": "best",
    "prompts": {"tasks": {"chain": 2}, "efforts": {"low": 1.0}, "prompts": 2, "min_pass_rate": 0.1, "explore": 0.1},
    "rollout": {"group": 2, "max_tokens": {"low": 8}, "slots": 4, "cache": "compute", "resample": 1},
    "reward": {"function": None, "time_limit": 5.0, "workers": 1, "pass_threshold": 1.0},
    "update": {"row_length": 128, "rows": 2, "updates": 1, "reference": True},
    "loss": {"name": "dapo", "length_budgets": {"low": 6}, "kl": 0.1, "overlong_cache": 2},
    "watch": {"problems": 2, "transcripts": 0, "collapse": 0.2},
}


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
        # The run's directory stays inside the case's.
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
    stage = rng.choice(("cost", "trace", "refine_costs", "solve"))
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
    # If the chat can be read, a request beyond the context ends before weights are read.
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


def estimates(rng: random.Random, work: Path, originals: Path) -> list[str]:
    """Configurations, assumptions and expert loads of an estimate."""
    shutil.copy(EMBEDDED_PARENT / "config.json", work / "config.json")
    (work / "loads.json").write_text(json.dumps([3, 2, 2, 1, 0.5]))
    (work / "assumptions.yaml").write_text(ASSUMPTIONS.read_text())
    name = rng.choice(("config.json", "loads.json", "assumptions.yaml", "assumptions.yaml"))
    if name == "assumptions.yaml" and rng.random() < 0.7:
        value = mutated(yaml.safe_load(ASSUMPTIONS.read_text()), rng, rng.choice((1, 2)))
        (work / name).write_text(yaml.safe_dump(_plain(value), allow_unicode=True))
    else:
        damage_file(work / name, rng, originals / "recipe.yaml")
    return [
        *("search", "estimate", "--model", str(work / "config.json"), "--baseline", str(EMBEDDED_PARENT)),
        *("--scenario", "h100x1-4k", "--assumptions", str(work / "assumptions.yaml")),
        *("--routing", str(work / "loads.json")),
    ]


def training_recipes(rng: random.Random, work: Path, originals: Path) -> list[str]:
    """Recipes of distillation and reinforcement learning, for models that do not exist."""
    verb, recipe = rng.choice([("distill", DISTILL), ("distill-blocks", DISTILL), ("grpo", GRPO)])
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(_plain(mutated(recipe, rng, rng.choice((1, 1, 2)))), allow_unicode=True))
    if rng.random() < 0.2:
        path.write_bytes(damaged_bytes(yaml.safe_dump(recipe).encode(), rng))
    return [*_training(verb, work), "--recipe", str(path)]


def training_command_lines(rng: random.Random, work: Path, originals: Path) -> list[str]:
    verb, recipe = rng.choice([("distill", DISTILL), ("grpo", GRPO)])
    found = _training(verb, work)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([place for place in places(recipe) if place])
        name = "--" + ".".join(key for key in path if isinstance(key, str))
        value = rng.choice(VALUES)
        text = value if isinstance(value, str) else json.dumps(value)
        name = rng.choice((name, name, name, name[:-1], name.replace(".", "")))
        found += [f"{name}={text}"] if rng.random() < 0.5 else [name, text]
    return found


def run_places(rng: random.Random, work: Path, originals: Path) -> list[str]:
    """Runs in which a directory or its record was replaced by something else."""
    run = work / "run"
    shutil.copytree(originals / "run", run)
    place = run / rng.choice(("cost", "traces", "run.json", "cost/stage.json", ".cost.partial-1", ".traces.replaced-1"))
    if place.is_dir():
        place.rename(work / "moved")
    else:
        place.unlink(missing_ok=True)
    action = rng.choice(("link", "link", "dangling", "loop", "file", "directory", "copy"))
    if action in ("link", "dangling", "loop"):
        place.symlink_to({"link": originals / "run", "dangling": work / "nowhere", "loop": place}[action])
    elif action == "file":
        place.write_text(rng.choice(("", "{}", "[", "null", dumped(mutated({"identity": {"kind": 1}}, rng)))))
    elif action == "directory":
        place.mkdir()
        (place / "mine.txt").write_text("of the user")
    else:
        shutil.copytree(originals / "run/traces", place)
    changed = ["--scenario.batch", "4"] if rng.random() < 0.5 else []
    file = ["--traces.file", str(originals / "traces.jsonl")]
    stage = rng.choice(("cost", "trace"))
    return ["search", stage, "--recipe", str(originals / "recipe.yaml"), "--run", str(run), *file, *changed]


KINDS: dict[str, Case] = {
    kind.__name__: kind
    for kind in (
        command_lines, other_command_lines, recipes, problems, traces, costs, libraries, scenarios, run_directories,
        chats, checkpoints, estimates, training_recipes, training_command_lines, run_places,
    )
}  # fmt: skip


def _model(work: Path) -> Path:
    model = work / "model"
    model.mkdir()
    for path in EMBEDDED_PARENT.iterdir():
        if path.is_file():
            shutil.copy(path, model / path.name)
    return model


def _lines(path: Path, rows: list[dict], rng: random.Random) -> None:
    """Writes rows as JSON lines, one of which is damaged."""
    number = rng.randrange(len(rows))
    lines = [dumped(mutated(row, rng) if n == number else row).encode() for n, row in enumerate(rows)]
    if rng.random() < 0.3:
        lines[number] = damaged_bytes(lines[number], rng)
    path.write_bytes(b"\n".join(lines))


def _plain(value):
    """The value as YAML can write it; YAML cannot read whole numbers of thousands of digits."""
    return json.loads(json.dumps(value, default=str))


def _training(verb: str, work: Path) -> list[str]:
    """A command that ends, at the latest, when it looks for its models."""
    nowhere = str(work / "nowhere")
    models = ["--model", nowhere] if verb == "grpo" else ["--parent", nowhere, "--child", nowhere, "--traces", nowhere]
    return ["train", verb, *models, "--out", str(work / "out")]
