"""Random models for parity tests, and the results of both sides as NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from puzzle_jax.config import BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.model.network import to_compute
from puzzle_jax.model.spec import Params
from tests.support import model_logits

TOLERANCE = 1e-4
"""Tolerance for float32 logits: their largest difference, relative to the largest logit."""


def random_config(seed: int, *, mixed: bool = False) -> ModelConfig:
    """A model with varied dimensions; odd seeds round YaRN's bounds."""
    rng = np.random.default_rng(seed)
    hidden, inter = map(int, rng.permutation([32, 64, 96])[:2])
    kv_heads, per_kv = map(int, rng.permutation([2, 3, 4])[:2])
    experts = int(rng.integers(7, 10))
    windows = [int(window) for window in rng.permutation([5, 6, 11, 17])]
    layers = int(rng.integers(3, 6))
    blocks = [BlockConfig(experts, None if layer % 2 else windows[0]) for layer in range(layers)]
    if mixed:
        counts = rng.integers(4, experts + 1, layers)
        choices = [windows[0], windows[1], None, windows[2], windows[0]]
        blocks = [BlockConfig(int(count), choices[layer]) for layer, count in enumerate(counts)]
    return ModelConfig(
        vocab_size=int(rng.integers(98, 120)),
        hidden_size=hidden,
        intermediate_size=inter,
        num_heads=kv_heads * per_kv,
        num_kv_heads=kv_heads,
        head_dim=int(rng.choice([10, 14, 20])),
        experts_per_token=int(rng.choice([2, 3])),
        blocks=tuple(blocks),
        rope=RopeConfig(
            theta=float(rng.uniform(5e3, 2e5)),
            factor=float(rng.choice([2.0, 8.0, 32.0])),
            beta_fast=float(rng.choice([8.0, 32.0])),
            original_context=int(rng.choice([256, 1024, 4096])),
            truncate=bool(seed % 2),
        ),
        max_position=2048,
        rms_norm_eps=float(rng.choice([1e-5, 1e-3])),
        swiglu_limit=float(rng.uniform(0.8, 2.0)),
    )


def load_reference(directory: Path, *, dtype: str = "float32", trust: bool = False) -> Any:
    """Loads the checkpoint with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=wanted, trust_remote_code=trust).eval()


def reference_logits(model: Any, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens), **inputs).logits.float().numpy()


def our_logits(directory: Path, tokens: np.ndarray, **changes: Any) -> np.ndarray:
    """Logits of the checkpoint in float32; `changes` replace fields of its configuration."""
    return logits_of(*loaded(directory, changes), tokens)


def our_greedy(directory: Path, prompt: list[int], steps: int, **changes: Any) -> list[int]:
    """Greedy continuation of `prompt` by the checkpoint; see `our_logits`."""
    return greedy_of(*loaded(directory, changes), [prompt], steps, len(prompt) + steps)[0]


def loaded(directory: Path, changes: dict[str, Any]) -> tuple[ModelConfig, Params]:
    checkpoint = load_checkpoint(directory, dtype=jnp.float32)
    return replace(checkpoint.config, **changes), to_compute(checkpoint.params, jnp.float32)


def logits_of(config: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Logits of float32 parameters."""
    return np.asarray(model_logits(params, config, jnp.asarray(tokens)))


def greedy_of(
    config: ModelConfig, params: Params, prompts: Sequence[list[int]], steps: int, seq: int
) -> list[list[int]]:
    """Greedy continuations, with a whole, uncached forward pass of [prompts, seq] tokens per token."""
    rows = np.zeros((len(prompts), seq), np.int32)  # what follows a position cannot change it
    lengths = np.array([len(prompt) for prompt in prompts])
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    every = np.arange(len(prompts))
    for step in range(steps):
        rows[every, lengths + step] = logits_of(config, params, rows)[every, lengths + step - 1].argmax(-1)
    return [row[length : length + steps].tolist() for row, length in zip(rows, lengths, strict=True)]


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest logit."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
