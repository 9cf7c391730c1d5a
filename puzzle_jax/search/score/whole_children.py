"""Compares whole children of one parent with it on traces.

For every batch the parent and all children start from the same embedded tokens, and a layer is run once for all models
that share its choice and the choices of all layers below it. So the parent is run once for all children, and the
solutions of one integer program, which differ in few layers, cost little more than one of them. Every layer runs the
same compiled code on the same input as if the child were run alone, so results are bit-identical to that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.generate.batches import MicroBatch, TokenWeights, alike
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.child import Child
from puzzle_jax.model.spec import Params
from puzzle_jax.search.score.measurements import Fill, SavedTable, Score, ScoreTable
from puzzle_jax.search.score.replace_one import (
    Alternative,
    Answers,
    ReplaceOne,
    child_choices,
    parent_choices,
)


class Measurements(NamedTuple):
    """Children on the same traces.

    Attributes:
      scores: each child's means.
      kl: KL per token of each child on every trace.
      tokens: completion tokens of every trace, by their weights.
    """

    scores: list[Score]
    kl: Float[np.ndarray, "children traces"]
    tokens: Int[np.ndarray, "traces"]


class Layers(NamedTuple):
    """A model: the choices of its layers and the configuration they run with (rotary settings may differ)."""

    choices: Sequence[Alternative]
    config: ModelConfig


@dataclass(frozen=True)
class WholeChildren:
    """A `Runner` whose alternatives are whole children, with a child's number where others have the layer."""

    run: ReplaceOne
    children: tuple[Layers, ...]

    @property
    def base(self) -> Sequence[Alternative]:
        return self.choices

    @property
    def choices(self) -> Sequence[Alternative]:
        return self.children[0].choices

    def __call__(
        self, batch: MicroBatch, wanted: Sequence[tuple[int, Alternative]], on_done: Callable[[int], None] | None
    ) -> Float[np.ndarray, "alternatives rows metrics"]:
        run, answers = self.run, Answers.of(batch)
        states = final_states(run, batch, [self.children[number] for number, _ in wanted])
        parent = next(states)[1]
        found = {}
        for place, state in states:
            found[place] = run.compared(parent, state[:, None], answers)[0]
            if on_done is not None:
                on_done(1)
        return np.stack([found[place] for place in range(len(wanted))])

    def work(self, wanted: Sequence[tuple[int, Alternative]]) -> int:
        return len(wanted)


def final_states(run: ReplaceOne, batch: MicroBatch, children: Sequence[Layers]) -> Iterator[tuple[int, Array]]:
    """Yields number and state [rows, seq, hidden] after the last layer, first of the parent (-1), then of every child.

    Only states from which some model still has to continue are kept: at most one for each layer.
    """
    models = {-1: Layers(parent_choices(run.config), run.config), **dict(enumerate(children))}
    waiting = [(0, run.embedded(batch), list(models))]
    while waiting:
        layer, state, members = waiting.pop()
        while layer < run.config.num_layers:
            members, *others = _alike(models, members, layer)
            waiting += [(layer, state, other) for other in others]
            choices, config = models[members[0]]
            state = run.layer(layer, state, choices[layer], config)
            layer += 1
        yield from ((member, state) for member in members)


def _alike(models: dict[int, Layers], members: Sequence[int], layer: int) -> list[list[int]]:
    """Groups members whose choice for this layer is the same, the first member's group first."""
    groups: dict[tuple[ModelConfig, int | None, bytes], list[int]] = {}
    for member in members:
        choice, config = models[member].choices[layer], models[member].config
        groups.setdefault((config, choice.window, choice.expert_mask.tobytes()), []).append(member)
    return list(groups.values())


def score_children(
    params: Params,
    config: ModelConfig,
    children: Sequence[Child],
    traces: Sequence[Trace],
    *,
    mesh: Mesh | None = None,
    tokens_per_batch: int = 4096,
    on_done: Callable[[int], None] | None = None,
    kept: Path | None = None,
    identity: str = "",
    weigh: TokenWeights = alike,
) -> Measurements:
    """Compares whole children, as views on the parent, with the parent.

    Args:
      on_done: called with the number of children just run on a batch.
      kept: directory of a killed run's results, which are not measured again; None keeps nothing.
      identity: everything that results depend on besides children and traces: the parent, versions.
      weigh: weights of the completion tokens.
    """
    nothing = Alternative(np.ones(config.blocks[0].num_experts, bool), config.blocks[0].window)
    table = ScoreTable.empty([(number, nothing) for number in range(len(children))], traces, weigh)
    layers = tuple(Layers(child_choices(child), child.viewed) for child in children)
    run = WholeChildren(ReplaceOne(params, config, mesh=mesh), layers)
    fill = Fill(table, run, range(len(children)), range(len(traces)), tokens_per_batch)
    about = f"{identity} {[(child.blocks, child.rope) for child in children]}"
    name = f"kl-{hashlib.sha256(table.key(about).encode()).hexdigest()[:16]}.safetensors"
    saved = SavedTable(table, None if kept is None else kept / name, about)
    fill(saved.save, on_done)
    saved.save(now=True)
    scores = [table.score(number, config.blocks[0].window) for number in range(len(children))]
    return Measurements(scores, table.values[..., 0], table.tokens)
