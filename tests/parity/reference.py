"""Random models for parity tests, and the results of both sides as NumPy arrays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.config import BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.model.network import forward, to_compute

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
    checkpoint = load_checkpoint(directory, dtype=jnp.float32)
    config = replace(checkpoint.config, **changes)
    compiled = jax.jit(lambda params, tokens: forward(params, config, tokens))
    return np.asarray(compiled(to_compute(checkpoint.params, jnp.float32), jnp.asarray(tokens)))


def our_greedy(directory: Path, prompt: list[int], steps: int, **changes: Any) -> list[int]:
    """Greedy continuation of `prompt`, with a whole, uncached forward pass per token; see `our_logits`."""
    checkpoint = load_checkpoint(directory, dtype=jnp.float32)
    params = to_compute(checkpoint.params, jnp.float32)
    config = replace(checkpoint.config, **changes)
    compiled = jax.jit(lambda params, tokens: forward(params, config, tokens))
    tokens = np.zeros((1, len(prompt) + steps), np.int32)  # what follows a position cannot change it
    tokens[0, : len(prompt)] = prompt
    for position in range(len(prompt), tokens.shape[1]):
        tokens[0, position] = np.argmax(compiled(params, jnp.asarray(tokens))[0, position - 1])
    return tokens[0, len(prompt) :].tolist()


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest logit."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
