"""Exact replace-one scores: how much each alternative, alone in its layer, moves the parent's distribution.

For each micro-batch the parent's hidden states before every layer are kept. Each alternative of a layer starts from
there, and only the layers above it are run, so a layer costs half of what a whole pass would on average. Expert
masks are data, one per row, so alternatives are batched, and one compiled block serves every layer and alternative of
a shape and window; programs do not grow with depth. The score is KL(parent || child) per completion token, the mean
over traces of each trace's mean.

Alternatives of the attention and of the experts are scored apart; the program adds their scores. A window scores
exactly zero on traces no longer than itself, so scores are reported by length of trace as well.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.evaluate.divergence import divergence
from puzzle_jax.generate.batches import MicroBatch
from puzzle_jax.model.child import Child
from puzzle_jax.model.network import attention_block, embed, moe_block
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.spec import Params

BUCKETS = (64, 256)  # tokens of a trace: up to 64, up to 256, beyond


class Alternative(NamedTuple):
    """What replaces one layer's own choice: experts that stay, or a window."""

    expert_mask: np.ndarray
    window: int | None


@dataclass
class Tally:
    """Collects per-trace values of one alternative."""

    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, values: Float[np.ndarray, "3 rows"], lengths: Int[np.ndarray, "rows"]) -> None:
        """Adds one value per trace; rows of length 0 are padding."""
        real = lengths > 0
        self.kl += values[0, real].tolist()
        self.agreement += values[1, real].tolist()
        self.cosine += values[2, real].tolist()
        self.lengths += lengths[real].tolist()

    def result(self) -> Score:
        kl = np.asarray(self.kl)
        bucket = np.searchsorted(BUCKETS, np.asarray(self.lengths))
        names = [*(f"<={limit}" for limit in BUCKETS), f">{BUCKETS[-1]}"]
        return Score(
            kl=float(kl.mean()),
            kl_se=float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else float("nan"),
            agreement=float(np.mean(self.agreement)),
            cosine=float(np.mean(self.cosine)),
            traces=len(kl),
            kl_by_length={n: float(kl[bucket == i].mean()) for i, n in enumerate(names) if np.any(bucket == i)},
        )


@dataclass(frozen=True)
class Score:
    """Means over traces of the mean over completion tokens.

    Attributes:
      kl: KL(parent || child), nats per token; `kl_se` its standard error over traces.
      agreement: share of positions whose most likely token is the parent's.
      cosine: of the final hidden states.
      kl_by_length: `kl` over traces of so many tokens.
    """

    kl: float
    kl_se: float
    agreement: float
    cosine: float
    traces: int
    kl_by_length: dict[str, float]


def replace_one_scores(
    params: Params,
    config: ModelConfig,
    alternatives: Sequence[Sequence[Alternative]],
    batches: Iterable[MicroBatch],
    *,
    per_call: int = 4,
    on_alternatives: Callable[[int], None] | None = None,
) -> list[list[Score]]:
    """Scores every alternative of every layer.

    Args:
      params: dense parameters of the parent.
      alternatives: per layer.
      batches: traces.
      per_call: alternatives that run together; each call has `per_call` times the rows of a batch.
      on_alternatives: called with the number of alternatives done for a batch, times the layers run for each.
    """
    parent = parent_choices(config)
    layers = list(enumerate(params["layers"]))
    tallies: dict[tuple[int, int], Tally] = defaultdict(Tally)
    for batch in batches:
        rows, lengths = batch.tokens.shape[0], np.asarray(batch.lengths)
        boundaries = [_embed(params, batch.tokens)]
        for index, layer in layers:
            boundaries.append(_run(layer, config, boundaries[-1], [parent[index]]))
        for index, layer in layers:
            for start in range(0, len(alternatives[index]), per_call):
                group = list(alternatives[index][start : start + per_call])
                padded = group + [group[-1]] * (per_call - len(group))
                x = _run(layer, config, jnp.tile(boundaries[index], (per_call, 1, 1)), padded)
                for above, upper in layers[index + 1 :]:
                    x = _run(upper, config, x, [parent[above]] * per_call)
                values = np.asarray(_compare(params, config, boundaries[-1], x, batch.loss_weight))
                for offset in range(len(group)):
                    tallies[index, start + offset].add(values[:, offset * rows : (offset + 1) * rows], lengths)
                if on_alternatives is not None:
                    on_alternatives(len(group) * (config.num_layers - index))
    return [
        [tallies[index, position].result() for position in range(len(of_layer))]
        for index, of_layer in enumerate(alternatives)
    ]


def score_children(
    params: Params,
    config: ModelConfig,
    children: Sequence[Child],
    batches: Iterable[MicroBatch],
    on_child: Callable[[], None] | None = None,
) -> list[Score]:
    """The same comparison for whole children, as views on the parent."""
    choices = [
        [Alternative(mask, block.window) for mask, block in zip(np.asarray(c.view.expert_masks), c.blocks, strict=True)]
        for c in children
    ]
    tallies = [Tally() for _ in children]
    for batch in batches:
        start = parent = _embed(params, batch.tokens)
        for layer, own in zip(params["layers"], parent_choices(config), strict=True):
            parent = _run(layer, config, parent, [own])
        for tally, of_child in zip(tallies, choices, strict=True):
            x = start
            for layer, choice in zip(params["layers"], of_child, strict=True):
                x = _run(layer, config, x, [choice])
            values = _compare(params, config, parent, x, batch.loss_weight)
            tally.add(np.asarray(values), np.asarray(batch.lengths))
            if on_child is not None:
                on_child()
    return [tally.result() for tally in tallies]


def parent_choices(config: ModelConfig) -> list[Alternative]:
    """Each layer's own choice in the form of an alternative."""
    return [Alternative(np.ones(block.num_experts, bool), block.window) for block in config.blocks]


def _run(
    layer: Params, config: ModelConfig, x: Float[Array, "all seq hidden"], choices: Sequence[Alternative]
) -> Float[Array, "all seq hidden"]:
    """One layer with a choice for each equal share of the rows: one call for each run of equal windows."""
    rows = x.shape[0] // len(choices)
    parts = []
    for window, run in itertools.groupby(enumerate(choices), key=lambda item: item[1].window):
        indices, masks = zip(*((index, choice.expert_mask) for index, choice in run), strict=True)
        part = x if len(indices) == len(choices) else x[indices[0] * rows : (indices[-1] + 1) * rows]
        parts.append(_block(layer, config, window, part, jnp.asarray(np.repeat(np.stack(masks), rows, axis=0))))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


_embed = jax.jit(embed)


@partial(jax.jit, static_argnames=("config", "window"))
def _block(
    layer: Params,
    config: ModelConfig,
    window: int | None,
    x: Float[Array, "rows seq hidden"],
    masks: Bool[Array, "rows experts"],
) -> Float[Array, "rows seq hidden"]:
    """One layer with an expert mask per row; one program for all layers of equal shape and window."""
    table = rope_table(config.rope, config.head_dim, jnp.arange(x.shape[1])[None])
    x, _ = attention_block(layer["attention"], config, x, table, window=window)
    return moe_block(layer["moe"], config, x, expert_mask=masks)[0]


@partial(jax.jit, static_argnames=("config",))
def _compare(
    params: Params,
    config: ModelConfig,
    parent: Float[Array, "rows seq hidden"],
    children: Float[Array, "all seq hidden"],
    weight: Float[Array, "rows seq"],
) -> Float[Array, "3 all"]:
    """KL, agreement and cosine of each trace, for all children of the batch one after the other."""
    copies = children.shape[0] // parent.shape[0]
    parts = divergence(params, config, jnp.tile(parent, (copies, 1, 1)), children)
    return jnp.stack([jnp.sum(part * jnp.tile(weight, (copies, 1)), axis=-1) for part in parts])
