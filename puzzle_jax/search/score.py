"""Exact replace-one scores: how much each alternative, alone in its layer, moves the parent's distribution.

For each micro-batch the parent's hidden states before every layer are kept. Each alternative of a layer starts from
there, and only the layers above it are run, so a layer costs half of what a whole pass would on average. Masks and
windows are data, one per row, so alternatives are batched and one compiled block serves every layer and alternative
of a shape. The score is KL(parent || child) per completion token, the mean over traces of each trace's mean.

Alternatives of the attention and of the experts are scored apart; the program adds their scores. A window scores
exactly zero on traces no longer than itself, so scores are reported by length of trace as well.
"""

from __future__ import annotations

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
from puzzle_jax.model.child import NO_WINDOW, View
from puzzle_jax.model.network import attention_block, embed, moe_block
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.spec import Params
from puzzle_jax.search.divergence import divergence
from puzzle_jax.search.traces import MicroBatch

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
      on_alternatives: called with the number of alternatives done for a batch, weighted by the layers run.
    """
    parent = parent_rows(config)
    tallies: dict[tuple[int, int], Tally] = defaultdict(Tally)
    for batch in batches:
        rows = batch.tokens.shape[0]
        boundaries = [_embed(params, batch.tokens)]
        for index, layer in enumerate(params["layers"]):
            boundaries.append(run_block(layer, config, boundaries[-1], *_repeat(parent[index : index + 1], rows)))
        for index in range(config.num_layers):
            for start in range(0, len(alternatives[index]), per_call):
                group = list(alternatives[index][start : start + per_call])
                padded = group + [group[-1]] * (per_call - len(group))
                x = jnp.tile(boundaries[index], (per_call, 1, 1))
                x = run_block(params["layers"][index], config, x, *_repeat(padded, rows))
                for above in range(index + 1, config.num_layers):
                    own = _repeat([parent[above]] * per_call, rows)
                    x = run_block(params["layers"][above], config, x, *own)
                values = _compare(params, config, boundaries[-1], x, batch.loss_weight)
                values, lengths = np.asarray(values), np.asarray(batch.lengths)
                for offset in range(len(group)):
                    tallies[index, start + offset].add(values[:, offset], lengths)
                if on_alternatives is not None:
                    on_alternatives(len(group) * (config.num_layers - index))
    return [
        [tallies[index, position].result() for position in range(len(of_layer))]
        for index, of_layer in enumerate(alternatives)
    ]


def score_children(
    params: Params,
    config: ModelConfig,
    views: Sequence[View],
    batches: Iterable[MicroBatch],
    on_view: Callable[[], None] | None = None,
) -> list[Score]:
    """The same comparison for whole children, as views on the parent."""
    parent = parent_rows(config)
    tallies = [Tally() for _ in views]
    for batch in batches:
        rows = batch.tokens.shape[0]
        start = x = _embed(params, batch.tokens)
        for index, layer in enumerate(params["layers"]):
            x = run_block(layer, config, x, *_repeat(parent[index : index + 1], rows))
        for tally, view in zip(tallies, views, strict=True):
            y = start
            for index, layer in enumerate(params["layers"]):
                windows = jnp.broadcast_to(view.windows[index], (rows,))
                masks = jnp.broadcast_to(view.expert_masks[index], (rows, view.expert_masks.shape[1]))
                y = run_block(layer, config, y, windows, masks)
            values = _compare(params, config, x, y, batch.loss_weight)
            tally.add(np.asarray(values)[:, 0], np.asarray(batch.lengths))
            if on_view is not None:
                on_view()
    return [tally.result() for tally in tallies]


def paired_difference(a: Tally, b: Tally) -> tuple[float, float]:
    """Mean of a's KL minus b's over the same traces, and its standard error."""
    gap = np.asarray(a.kl) - np.asarray(b.kl)
    return float(gap.mean()), float(gap.std(ddof=1) / np.sqrt(len(gap)))


def parent_rows(config: ModelConfig) -> list[Alternative]:
    """Each layer's own choice in the form of an alternative."""
    return [Alternative(np.ones(block.num_experts, bool), block.window) for block in config.blocks]


def _repeat(choices: Sequence[Alternative], rows: int) -> tuple[Int[Array, "all"], Bool[Array, "all experts"]]:
    """Windows and masks for `rows` rows of each choice."""
    windows = [NO_WINDOW if choice.window is None else choice.window for choice in choices]
    masks = np.stack([choice.expert_mask for choice in choices])
    return jnp.asarray(np.repeat(windows, rows), jnp.int32), jnp.asarray(np.repeat(masks, rows, axis=0))


_embed = jax.jit(embed)


@partial(jax.jit, static_argnames=("config",))
def run_block(
    layer: Params,
    config: ModelConfig,
    x: Float[Array, "rows seq hidden"],
    windows: Int[Array, "rows"],
    masks: Bool[Array, "rows experts"],
) -> Float[Array, "rows seq hidden"]:
    """One layer with a window and an expert mask per row; one program for all layers of a shape."""
    table = rope_table(config.rope, config.head_dim, jnp.arange(x.shape[1])[None])
    x, _ = attention_block(layer["attention"], config, x, table, window=windows)
    return moe_block(layer["moe"], config, x, expert_mask=masks)[0]


@partial(jax.jit, static_argnames=("config",))
def _compare(
    params: Params,
    config: ModelConfig,
    parent: Float[Array, "rows seq hidden"],
    children: Float[Array, "all seq hidden"],
    weight: Float[Array, "rows seq"],
) -> Float[Array, "3 children rows"]:
    """KL, agreement and cosine of each trace, for every child of the batch."""
    children = children.reshape(-1, *parent.shape)
    parents = jnp.broadcast_to(parent[None], children.shape)
    return jnp.stack([jnp.sum(part * weight, axis=-1) for part in divergence(params, config, parents, children)])
