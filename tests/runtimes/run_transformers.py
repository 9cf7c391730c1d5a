"""Answers of transformers in float32. Runs in an environment that has torch and transformers.

python run_transformers.py CHECKPOINT QUESTION.json ANSWER.npz
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="puzzle_jax_remote_code_")

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(checkpoint: str, question: str, answer: str) -> None:
    asked = json.loads(Path(question).read_text())
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, trust_remote_code=True)
    model = cast(Any, loaded.eval())
    settings = {"max_new_tokens": asked["steps"], "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    with torch.no_grad():
        logits = model(torch.tensor(asked["tokens"])).logits.numpy()
        outputs = [model.generate(torch.tensor([prompt]), **settings)[0].tolist() for prompt in asked["prompts"]]
    greedy = [output[len(prompt) :] for output, prompt in zip(outputs, asked["prompts"], strict=True)]
    np.savez(answer, logits=logits, greedy=greedy)


if __name__ == "__main__":
    main(*sys.argv[1:])
