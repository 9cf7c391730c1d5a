"""Answers of mlx-lm in float32. Runs in an environment that has mlx-lm and imports nothing of puzzle_jax.

python run_mlx.py CHECKPOINT QUESTION.json ANSWER.npz
"""

import json
import sys
from pathlib import Path

import mlx.core as mx  # pyright: ignore[reportMissingImports]
import numpy as np
from mlx_lm.generate import generate_step  # pyright: ignore[reportMissingImports]
from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]


def main(checkpoint: str, question: str, answer: str) -> None:
    asked = json.loads(Path(question).read_text())
    model, _ = load_model(Path(checkpoint), trust_remote_code=True)
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array(asked["tokens"])))
    greedy = [
        [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=asked["steps"])]
        for prompt in asked["prompts"]
    ]
    np.savez(answer, logits=logits, greedy=greedy)


if __name__ == "__main__":
    main(*sys.argv[1:])
