"""The smallest distillation: a random parent, a child of it, and traces of random tokens in one directory."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from puzzle_jax.config import BlockConfig
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import export_child, save_checkpoint
from puzzle_jax.generate.traces import Trace, write_traces
from puzzle_jax.settings.verbs import parse
from puzzle_jax.tasks.chat.embedded import chat_files
from puzzle_jax.train import run
from puzzle_jax.train.__main__ import VERBS, main
from puzzle_jax.train.distill.inputs import DistillInputs
from puzzle_jax.train.distill.run import Distiller
from puzzle_jax.train.placement import Placement
from tests.support import chat_config, random_params

CONFIG = chat_config()
BLOCKS = (BlockConfig(5, 16), BlockConfig(4, 24))
KEPT = ((0, 2, 3, 5, 7), (1, 2, 4, 6))
LENGTH = 40
SETTINGS = {
    "--data.row_length": LENGTH,
    "--data.rows": 2,
    "--data.heldout": 5,
    "--loss.token_chunk": 32,
    "--loss.vocab_chunk": 48,
    "--optimizer.learning_rate": 0.003,
    "--optimizer.eps": 1e-3,  # keeps Adam from taking full-size steps on rounding noise
    "--loop.steps": 6,
    "--loop.evaluate_every": 2,
    "--loop.save_every": 2,
    "--loop.log_every": 1,
}


def random_trace(number: int, vocabulary: int = CONFIG.vocab_size, prompt: int | None = None) -> Trace:
    rng = np.random.default_rng(number if prompt is None else prompt)
    words = tuple(rng.integers(0, vocabulary, 5 + number % 4).tolist())
    answer = tuple(np.random.default_rng([number]).integers(0, vocabulary, 9 + number % 7).tolist())
    return Trace(("add", "chain")[number % 2], "low", number, {}, words, answer, reward=None, truncated=False)


def make(root: Path) -> Path:
    """Fills a directory with parent/, child/ and traces.parquet."""
    save_parent(root / "parent")
    cut(root / "parent", root / "child")
    # Many, since grain takes milliseconds to shuffle only a few.
    write_traces(root / "traces.parquet", [random_trace(number) for number in range(240)])
    return root


def save_parent(out: Path, seed: int = 0) -> None:
    save_checkpoint(out, CONFIG, random_params(CONFIG, seed), config_base={}, extra_files=chat_files())


def cut(parent: Path, out: Path, **options) -> None:
    config = CONFIG.with_blocks(BLOCKS)
    export_child(parent, out, config, KEPT, provenance={"search": {"score": 0.25}}, **options)


def arguments(directory: Path, out: Path, **changes) -> list[str]:
    """Command-line arguments without the verb; `changes` are settings, with __ for dots, and None leaves one out."""
    settings = {
        "--parent": directory / "parent",
        "--child": directory / "child",
        "--traces": directory / "traces.parquet",
        **SETTINGS,
        "--out": out,
    }
    settings |= {f"--{name.replace('__', '.')}": value for name, value in changes.items()}
    return [str(part) for name, value in settings.items() if value is not None for part in (name, value)]


def distiller(directory: Path, run: str = "nowhere", **changes) -> Distiller:
    recipe = parse(VERBS["distill"], arguments(directory, directory / run, **changes))
    return Distiller(DistillInputs.open(recipe, blocks=False), Placement(), Console(quiet=True))


def metrics(out: Path) -> list[dict]:
    """Lines of metrics.jsonl without times, omitting the evaluation before the first step."""
    lines = [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if line["step"]]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


def stored(checkpoint: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in describe_checkpoint(checkpoint).tensors.items()}


def record(out: Path) -> dict:
    return json.loads((out / "child" / "provenance.json").read_text())


def refusal(capsys, directory: Path, out: Path, verb: str = "distill", **changes) -> str:
    """Returns the sentence with which a command is refused; checks that nothing new was written to `out`."""
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_checkpoint", None)  # weights are not read
        assert main([verb, *arguments(directory, out, **changes)]) == 2
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"puzzle train {verb}: "), said
    return said.removeprefix(f"puzzle train {verb}: ")
