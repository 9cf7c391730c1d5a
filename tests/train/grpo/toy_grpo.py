"""The smallest reinforcement learning: a model that says digits at random, and a file of prompts that want a 7.

The model is a child, so that it has a first parent. Its next token depends on its last one, up to what its random
attention and experts add: all answers reach the final channel, and most say one digit, some two or more.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import export_child, save_checkpoint
from puzzle_jax.tasks.chat.embedded import build_tokenizer, chat_files
from puzzle_jax.train import run
from puzzle_jax.train.__main__ import main
from tests.support import present, random_params
from tests.train.distill.toy_distill import BLOCKS, CONFIG, KEPT

DIGITS = "3579"
RIGHT = "7"
ROWS = 40
SETTINGS = {
    "--prompts.efforts": "{low: 1, high: 2}",
    "--prompts.prompts": 4,
    "--prompts.min_answers": 4,
    "--rollout.group": 6,
    "--rollout.max_tokens": "{low: 5, high: 9}",
    "--rollout.slots": 24,
    "--rollout.resample": 1,
    "--update.row_length": 60,
    "--update.rows": 2,
    "--update.token_chunk": 32,
    "--update.vocab_chunk": 48,
    "--remat": "false",
    "--optimizer.learning_rate": 0.006,
    "--optimizer.schedule": "constant",
    "--optimizer.eps": 1e-3,  # keeps Adam from taking full-size steps on rounding noise
    "--loop.steps": 5,
    "--loop.evaluate_every": 2,
    "--loop.save_every": 2,
    "--loop.log_every": 1,
    "--monitoring.problems": 3,
    "--monitoring.transcripts": 2,
    "--monitoring.transcript_groups": 2,
    "--seed": 8,  # with this seed, every step has answers to learn from at both efforts
}
TIMES = ("_seconds", "_per_second", "seconds_per_step")


def make(root: Path) -> Path:
    """Fills a directory with parent/, its child model/, and say.jsonl."""
    save_checkpoint(root / "parent", CONFIG, talking_params(), config_base={}, extra_files=chat_files())
    config = CONFIG.with_blocks(BLOCKS)
    record = {"parent": str(root / "parent"), "distilled": [{"steps": 23}]}
    export_child(root / "parent", root / "model", config, KEPT, provenance=record)
    write_prompts(root / "say.jsonl", RIGHT)
    return root


def write_prompts(path: Path, answer: str) -> None:
    rows = [{"prompt": f"say {number}", "answer": answer} for number in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def talking_params() -> dict:
    """Random parameters whose head favours what may follow each token of an answer; other logits are about 0."""
    tokenizer, params = build_tokenizer(), random_params(CONFIG)
    follow = {"assistant": {"<|channel|>": 10}, "<|channel|>": {"final": 10}, "final": {"<|message|>": 10}}
    follow["<|message|>"] = dict.fromkeys(DIGITS, 8)
    follow |= {digit: {"<|return|>": 9, **dict.fromkeys(DIGITS, 6)} for digit in DIGITS}
    wanted = np.zeros((len(follow), CONFIG.vocab_size))
    for row, logits in enumerate(follow.values()):
        for token, logit in logits.items():
            wanted[row, tokenizer.token_to_id(token)] = logit
    # Large compared with what layers add, so that the final state is nearly the token's embedding.
    embedding = 64 * np.asarray(params["embedding"], np.float64)
    states = embedding[[present(tokenizer.token_to_id(token)) for token in follow]]
    states = states / np.sqrt((states**2).mean(-1, keepdims=True)) * np.asarray(params["final_norm"])
    head = np.asarray(params["head"], np.float64)
    head = head + np.linalg.pinv(states) @ (wanted - states @ head)
    return {**params, "embedding": jnp.asarray(embedding, jnp.float32), "head": jnp.asarray(head, jnp.float32)}


def arguments(directory: Path, out: Path, **changes) -> list[str]:
    """Command-line arguments without the verb; `changes` are settings, with __ for dots, and None leaves one out."""
    settings = {
        "--model": directory / "model",
        "--prompts.tasks": f"{{{directory / 'say.jsonl'}: 2, chain: 1}}",
        **SETTINGS,
        "--out": out,
    }
    settings |= {f"--{name.replace('__', '.')}": value for name, value in changes.items()}
    return [str(part) for name, value in settings.items() if value is not None for part in (name, value)]


def metrics(out: Path) -> list[dict]:
    """Lines of metrics.jsonl without times, omitting the evaluation before the first step."""
    lines = [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if line["step"]]
    return [{name: value for name, value in line.items() if not name.endswith(TIMES)} for line in lines]


def stored(checkpoint: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in describe_checkpoint(checkpoint).tensors.items()}


def record(out: Path) -> dict:
    return json.loads((out / "child" / "provenance.json").read_text())


def refusal(capsys, directory: Path, out: Path, **changes) -> str:
    """Returns the sentence with which a command is refused; checks that nothing new was written to `out`."""
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_checkpoint", None)  # weights are not read
        assert main(["grpo", *arguments(directory, out, **changes)]) == 2
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("puzzle train grpo: "), said
    return said.removeprefix("puzzle train grpo: ")
