"""Compares two checkpoints as functions: first their tensors, then their outputs on random tokens, layer by layer.

Models run one layer at a time, and a layer is read only when it runs, so that two models of any size take the memory
of two layers. Arithmetic is float32. Hidden states are compared after every layer, each model being fed its own, which
shows the first layer that differs and how far the difference carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.describe import Description, describe_checkpoint
from puzzle_jax.convert_hf.load import load_tensors
from puzzle_jax.convert_hf.table import checkpoint_tensors
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.network import attention_block, embed, head_logits, moe_block, to_compute
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.spec import Params

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verification:
    """Differences between two checkpoints.

    Attributes:
      config_differences: configuration fields that differ, and how.
      tensors: how many tensors have equal bytes, differ, or are in only one checkpoint (or in another form).
      different_tensors: names of the tensors that differ or are in only one checkpoint.
      layer_errors: after every layer, the largest difference of hidden states over the first model's largest value.
      logit_error: the same for the logits.
      same_tokens: share of positions at which both models have the same most likely token.
    """

    config_differences: list[str]
    tensors: dict[str, int]
    different_tensors: list[str]
    layer_errors: list[float]
    logit_error: float
    same_tokens: float

    @property
    def same_function(self) -> bool:
        """Returns whether the logits agree to within `TOLERANCE` of the largest."""
        return self.logit_error <= TOLERANCE


def verify(
    first: Path,
    second: Path,
    *,
    rows: int = 2,
    length: int = 256,
    seed: int = 0,
    on_layer: Callable[[], None] = lambda: None,
) -> Verification:
    """Compares two checkpoints on random tokens.

    Args:
      first, second: checkpoint directories.
      rows, length, seed: shape of the batch of random tokens, and the seed they are drawn from.
      on_layer: called after every layer.

    Raises `CheckpointError` for a damaged checkpoint, `PuzzleError` where vocabulary sizes or numbers of layers differ.
    """
    described = [describe_checkpoint(path) for path in (first, second)]
    a, b = (one.config for one in described)
    if (a.vocab_size, a.num_layers) != (b.vocab_size, b.num_layers):
        raise PuzzleError(
            f"{first} has {a.num_layers} layers and {a.vocab_size} tokens, {second} {b.num_layers} and {b.vocab_size}; "
            "only models that agree in both can be compared"
        )
    counts, different = _compare_tensors(*described)
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, a.vocab_size, (rows, length)), jnp.int32)
    errors: list[float] = []
    same_tokens = 0.0
    for x, y in zip(*(_hidden_states(one, tokens) for one in described), strict=True):
        errors.append(_relative(x, y))
        same_tokens = float(jnp.mean(x.argmax(-1) == y.argmax(-1)))  # of the logits, the last pair
        on_layer()
    return Verification(_config_differences(a, b), counts, different, errors[:-1], errors[-1], same_tokens)


def _hidden_states(described: Description, tokens: jax.Array) -> Iterator[jax.Array]:
    """Hidden states after every layer, then the logits."""
    config = described.config
    table = checkpoint_tensors(config, described.form)
    read = partial(load_tensors, described, dtype=jnp.float32)
    outside = [spec for spec in table if spec.layer is None]
    x = embed(read([spec for spec in outside if spec.part != "head"]), tokens)
    for index, block in enumerate(config.blocks):
        params = read([spec for spec in table if spec.layer == index])["layers"][index]
        x = _layer(params, config, block.window, x)
        yield x
    last = [spec for spec in outside if spec.part != "embedding" or config.variant.tied_head]
    yield jax.jit(head_logits, static_argnums=1)(read(last), config, x)


@partial(jax.jit, static_argnums=(1, 2))
def _layer(params: Params, config: ModelConfig, window: int | None, x: jax.Array) -> jax.Array:
    params = to_compute(params, jnp.float32)
    table = rope_table(config.rope, config.head_dim, jnp.arange(x.shape[1])[None])
    x, _ = attention_block(params["attention"], config, x, table, window=window)
    return moe_block(params["moe"], config, x)[0]


def _relative(x: jax.Array, y: jax.Array) -> float:
    if x.shape != y.shape:
        return float("inf")
    return float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(x).max(), jnp.finfo(jnp.float32).tiny))


def _config_differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    one, other = asdict(a), asdict(b)
    lines = [f"{name}: {one[name]} and {other[name]}" for name in one if name != "blocks" and one[name] != other[name]]
    for layer, (x, y) in enumerate(zip(a.blocks, b.blocks, strict=True)):
        if x != y:
            lines.append(f"layer {layer}: {x.num_experts} experts, window {x.window} and {y.num_experts}, {y.window}")
    return lines


def _compare_tensors(a: Description, b: Description) -> tuple[dict[str, int], list[str]]:
    """Counts of tensors that are equal, different or in only one checkpoint, and the names of the latter two kinds."""
    lone = sorted(set(a.tensors) ^ set(b.tensors))
    shared = sorted(set(a.tensors) & set(b.tensors))
    different = [name for name in shared if not a.tensors[name].equals(b.tensors[name])]
    equal = len(shared) - len(different)
    return {"equal": equal, "different": len(different), "in one alone": len(lone)}, [*different, *lone]


def show(found: Verification, names: tuple[str, str], console: Console) -> None:
    """Prints a verification in readable form."""
    console.print(f"tensors: {', '.join(f'{count:,} {kind}' for kind, count in found.tensors.items())}")
    for name in found.different_tensors[:10]:
        console.print(f"  {name}")
    for line in found.config_differences:
        console.print(f"  {line}")
    table = Table("after layer", "largest difference / largest value")
    for layer, error in enumerate(found.layer_errors):
        table.add_row(str(layer), f"{error:.1e}")
    table.add_section()
    table.add_row("logits", f"{found.logit_error:.1e}")
    console.print(table)
    console.print(f"the likeliest token is the same at {found.same_tokens:.1%} of positions")
    verdict = "are the same function" if found.same_function else "are not the same function"
    console.print(f"{names[0]} and {names[1]} {verdict} (logits to {TOLERANCE:g} of the largest)")
