"""Replace-one passes: what each alternative to one layer, as a model's only change, does to the final distribution.

The measure is the KL divergence from the parent's final distribution, KL(parent || child): `divergence`
(puzzle_jax/evaluate/divergence.py) computes it per position, and `compare_states` sums it per trace.

For each micro-batch the hidden states before and inside every layer of the base model are kept. An alternative starts
from there, so only what it changes and the layers above it are run (an expert set starts after its layer's attention):
about half a whole pass on average. Alternatives are data (a mask per row), so many run in one call, and one compiled
sub-block serves all layers of equal shape and window: the number of compiled programs does not grow with depth. Only
positions before completion tokens reach the output head, and the parent's logits are computed once for all alternatives
of a call.

Memory: of the base's hidden states only every `keep_every`-th is kept; those in between are recomputed when their part
of the network is processed. The parent's final state is kept whole; logits never are.

The base is the parent, or a child to which further changes are tried. The comparison is always with the parent; for a
child, the KL is given as the difference from the child's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from puzzle_jax.config import ModelConfig, RopeConfig
from puzzle_jax.evaluate.divergence import divergence
from puzzle_jax.generate.batches import MicroBatch
from puzzle_jax.model.child import Child
from puzzle_jax.model.network import attention_block, embed, moe_block
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.sharding import on_mesh, read, spread_rows
from puzzle_jax.model.spec import Params, head_params

CONTEXTS = (64, 256, 1024, 4096, 16384)
"""Upper bounds of the context-length buckets that losses are also reported by; a last bucket holds what lies beyond."""

MOST_ANSWERS = 8192
"""The most positions whose logits exist at the same time."""

METRICS = ("kl", "agreement", "cosine", *(f"kl up to {end}" for end in CONTEXTS), f"kl beyond {CONTEXTS[-1]}")
"""Measurements of a trace, each a weighted sum over its completion; the KL also by context length."""

KL_METRICS = [index for index, name in enumerate(METRICS) if name.startswith("kl")]


class Alternative(NamedTuple):
    """A choice that replaces one layer's own: the experts that stay, and the window."""

    expert_mask: np.ndarray
    window: int | None


def parent_choices(config: ModelConfig) -> list[Alternative]:
    """Each layer's own choice in the form of an alternative."""
    return [Alternative(np.ones(block.num_experts, bool), block.window) for block in config.blocks]


def child_choices(child: Child) -> list[Alternative]:
    """A child's choices, layer by layer."""
    masks = np.asarray(child.view.expert_masks)
    return [Alternative(mask, block.window) for mask, block in zip(masks, child.blocks, strict=True)]


class Answers(NamedTuple):
    """Positions of a batch that carry loss, padded with weight 0.

    Attributes:
      index: indices into the flattened [rows * seq] positions.
      row: the row of each position.
      weight: 1 / completion tokens of the trace; 0 for padding.
      context: bucket (see CONTEXTS) of the number of tokens that the position sees.
    """

    index: Int[Array, "answers"]
    row: Int[Array, "answers"]
    weight: Float[Array, "answers"]
    context: Int[Array, "answers"]

    @staticmethod
    def of(batch: MicroBatch) -> Answers:
        """The batch's answer positions, padded to half or all of its positions, so that there are few shapes."""
        weight = np.asarray(batch.loss_weight)
        rows, seq = weight.shape
        (index,) = np.nonzero(weight.reshape(-1))
        half = -(-rows * seq // 2)
        size = half if len(index) <= half else rows * seq
        index = np.pad(index, (0, size - len(index)), constant_values=0)
        kept = weight.reshape(-1)[index] * (np.arange(size) < np.count_nonzero(weight))
        context = np.searchsorted(CONTEXTS, index % seq + 1)
        return Answers(*(jnp.asarray(x) for x in (index, index // seq, kept.astype(np.float32), context)))


class States(NamedTuple):
    """Hidden states of one layer of the base: before it, and after its attention."""

    before: Float[Array, "rows seq hidden"]
    middle: Float[Array, "rows seq hidden"]


@dataclass(frozen=True)
class ReplaceOne:
    """Runs alternatives to one base model. On a mesh over several processes, all of them make the same calls.

    Attributes:
      params: parameters of the parent, with dense or packed experts.
      config: configuration of the parent.
      base: a choice per layer; None stands for the parent's own.
      rope: rotary settings of the base; None stands for the parent's own.
      per_call: number of alternatives that run together.
      keep_every: number of layers from one kept hidden state to the next.
      mesh: mesh that holds the parameters; a batch's rows are sharded over its data axis if it divides them.
    """

    params: Params
    config: ModelConfig
    base: Sequence[Alternative] | None = None
    rope: RopeConfig | None = None
    per_call: int = 8
    keep_every: int = 8
    mesh: Mesh | None = None

    @property
    def choices(self) -> list[Alternative]:
        return parent_choices(self.config) if self.base is None else list(self.base)

    @property
    def own(self) -> ModelConfig:
        """The configuration that the base's layers run with."""
        return self.config if self.rope is None else replace(self.config, rope=self.rope)

    def __call__(
        self,
        batch: MicroBatch,
        wanted: Sequence[tuple[int, Alternative]],
        on_done: Callable[[int], None] | None = None,
    ) -> Float[np.ndarray, "alternatives rows metrics"]:
        """METRICS of every trace of a batch under each alternative (layer, choice).

        Args:
          on_done: called with the alternatives times layers just run, which add up to `work`.
        """
        answers = Answers.of(batch)
        parent, own, kept = self._final_states(batch)
        values = np.zeros((len(wanted), batch.tokens.shape[0], len(METRICS)))
        for group, x in self._suffixes(kept, wanted):
            values[group] = self.compared(parent, x, answers)[: len(group)]
            del x  # its memory is for the next group
            if on_done is not None:
                on_done(self.work([wanted[number] for number in group]))
        if self.base is not None or self.rope is not None:
            of_base = self.compared(parent, own[:, None], answers)
            values[..., KL_METRICS] -= of_base[..., KL_METRICS]
        return values

    def work(self, wanted: Sequence[tuple[int, Alternative]]) -> int:
        """Alternatives times the layers each runs, which `on_done` counts up to."""
        return sum(self.config.num_layers - layer for layer, _ in wanted)

    def compared(
        self, parent: Float[Array, "rows seq hidden"], children: Float[Array, "rows slots seq hidden"], answers: Answers
    ) -> Float[np.ndarray, "slots rows metrics"]:
        """METRICS of each child and trace, from final hidden states."""
        head = head_params(self.params)
        return read(compare_states(head, self.config, parent, children, answers), self.mesh)

    # The base ------------------------------------------------------------------------------------------------------

    def embedded(self, batch: MicroBatch) -> Float[Array, "rows seq hidden"]:
        """The input of the first layer."""
        outside = {name: self.params[name] for name in ("embedding", "final_norm")}
        return _embed(outside, spread_rows(batch.tokens, self.mesh))

    def layer(self, index: int, x: Array, choice: Alternative, config: ModelConfig | None = None) -> Array:
        """Runs one layer with a given choice, on states [rows, seq, hidden] or [rows, slots, seq, hidden]."""
        layer = self.params["layers"][index]
        x = run_attention(layer["attention"], config or self.own, choice.window, x)
        return self._mixture(layer["moe"], x, choice.expert_mask)

    def _mixture(self, moe: Params, x: Array, mask: np.ndarray | Array) -> Array:
        with on_mesh(self.mesh):
            return run_mixture(moe, self.config, x, jnp.asarray(mask))

    def _final_states(self, batch: MicroBatch) -> tuple[Array, Array, dict[int, Array]]:
        """The parent's and the base's final states, and the base's states before every `keep_every`-th layer."""
        x = start = self.embedded(batch)
        kept = {}
        for index, choice in enumerate(self.choices):
            if index % self.keep_every == 0:
                kept[index] = x
            x = self.layer(index, x, choice)
        if self.base is None and self.rope is None:
            return x, x, kept
        parent = start
        for index, choice in enumerate(parent_choices(self.config)):
            parent = self.layer(index, parent, choice, self.config)
        return parent, x, kept

    def _states(self, first: int, x: Array) -> dict[int, States]:
        """States of the layers from one kept state, `x` before layer `first`, to the next."""
        states = {}
        for index in range(first, min(first + self.keep_every, self.config.num_layers)):
            layer, choice = self.params["layers"][index], self.choices[index]
            middle = run_attention(layer["attention"], self.own, choice.window, x)
            states[index] = States(x, middle)
            x = self._mixture(layer["moe"], middle, choice.expert_mask)
        return states

    # Alternatives --------------------------------------------------------------------------------------------------

    def layers(self, batch: MicroBatch) -> Iterator[tuple[int, States, Array, Array]]:
        """From the top down: layer, its states in the base, the base's state after it, the parent's final state."""
        parent, after, kept = self._final_states(batch)
        for first in sorted(kept, reverse=True):
            states = self._states(first, kept.pop(first))
            for layer in sorted(states, reverse=True):
                yield layer, states[layer], after, parent
                after = states.pop(layer).before

    def _suffixes(
        self, kept: dict[int, Array], wanted: Sequence[tuple[int, Alternative]]
    ) -> Iterator[tuple[list[int], Array]]:
        """Yields, group by group, the alternatives' numbers and final states [rows, per_call, seq, hidden]."""
        order = sorted(range(len(wanted)), key=lambda number: wanted[number][0])
        for first in sorted(kept, reverse=True):
            here = [n for n in order if first <= wanted[n][0] < first + self.keep_every]
            if not here:
                continue
            states = self._states(first, kept.pop(first))
            for start in range(0, len(here), self.per_call):
                group = here[start : start + self.per_call]
                yield group, self._suffix_batch([wanted[n] for n in group], states)
            del states  # before those of the part below are computed

    def _suffix_batch(self, group: Sequence[tuple[int, Alternative]], states: dict[int, States]) -> Array:
        """Final states of alternatives that are sorted by layer: each joins the others at its own layer."""
        x = jnp.repeat(states[group[0][0]].before[:, None], self.per_call, axis=1)
        for index in range(group[0][0], self.config.num_layers):
            if index > group[0][0]:
                x = self.layer(index, x, self.choices[index])
            own = {slot: choice for slot, (layer, choice) in enumerate(group) if layer == index}
            x = self.entered(index, states[index], own, x) if own else x
        return x

    def entered(self, index: int, states: States, own: dict[int, Alternative], x: Array) -> Array:
        """`x` with the states after layer `index` of the alternatives that replace it set in their slots."""
        layer, base = self.params["layers"][index], self.choices[index]
        masks = np.repeat(base.expert_mask[None], self.per_call, axis=0)
        narrowed = {slot: choice for slot, choice in own.items() if choice.window != base.window}
        for slot, choice in own.items():
            masks[slot] = choice.expert_mask
        if len(narrowed) < len(own):
            entry = np.isin(np.arange(self.per_call), list(own))
            with on_mesh(self.mesh):
                x = enter_mixture(layer["moe"], self.config, states.middle, jnp.asarray(masks), jnp.asarray(entry), x)
        for slot, choice in narrowed.items():
            middle = run_attention(layer["attention"], self.own, choice.window, states.before)
            x = x.at[:, slot].set(self._mixture(layer["moe"], middle, masks[slot]))
        return x


_embed = jax.jit(embed)


@partial(jax.jit, static_argnames=("config", "window"))
def run_attention(
    attention: Params, config: ModelConfig, window: int | None, x: Float[Array, "*rows seq hidden"]
) -> Float[Array, "*rows seq hidden"]:
    table = rope_table(config.rope, config.head_dim, jnp.arange(x.shape[-2])[None])
    return attention_block(attention, config, _flat(x), table, window=window)[0].reshape(x.shape)


@partial(jax.jit, static_argnames=("config",))
def run_mixture(
    moe: Params, config: ModelConfig, x: Float[Array, "*rows seq hidden"], mask: Bool[Array, "*masks experts"]
) -> Float[Array, "*rows seq hidden"]:
    """Runs the mixture with one mask for all rows, or one per row of the flattened [*rows]."""
    return moe_block(moe, config, _flat(x), expert_mask=mask)[0].reshape(x.shape)


def _flat(x: Float[Array, "*rows seq hidden"]) -> Float[Array, "all_rows seq hidden"]:
    return x.reshape(-1, *x.shape[-2:])


@partial(jax.jit, static_argnames=("config",))
def enter_mixture(
    moe: Params,
    config: ModelConfig,
    middle: Float[Array, "rows seq hidden"],
    masks: Bool[Array, "slots experts"],
    entry: Bool[Array, "slots"],
    x: Float[Array, "rows slots seq hidden"],
) -> Float[Array, "rows slots seq hidden"]:
    """Runs one layer's mixture from the same states with a mask per slot; slots without `entry` keep their states."""
    rows, slots = x.shape[:2]
    new = run_mixture(moe, config, jnp.repeat(middle[:, None], slots, axis=1), jnp.tile(masks, (rows, 1)))
    return jnp.where(entry[:, None, None], new, x)


@partial(jax.jit, static_argnames=("config",))
def compare_states(
    head: Params,
    config: ModelConfig,
    parent: Float[Array, "rows seq hidden"],
    children: Float[Array, "rows slots seq hidden"],
    answers: Answers,
) -> Float[Array, "slots rows metrics"]:
    """METRICS of each child and trace: its `divergence` from the parent, summed by weight over the answer positions."""
    rows, slots, seq, hidden = children.shape
    parent = parent.reshape(-1, hidden)

    def add(part: Answers, out: Array) -> Array:
        own = parent[part.index]
        others = jnp.moveaxis(children[part.row, :, part.index % seq], 1, 0)
        found = divergence(head, config, own, others)
        for metric, values in enumerate(found):
            out = out.at[:, part.row, metric].add(values * part.weight)
        return out.at[:, part.row, len(found) + part.context].add(found.kl * part.weight)

    out = jnp.zeros((slots, rows, len(METRICS)))
    count = -(-answers.index.size // MOST_ANSWERS)
    if count == 1:
        return add(answers, out)
    # Logits of at most MOST_ANSWERS positions at a time; those that pad the last part have weight 0.
    fill = -answers.index.size % count
    parts = jax.tree.map(lambda x: jnp.pad(x, (0, fill)).reshape(count, -1), answers)
    return jax.lax.fori_loop(0, count, lambda part, out: add(jax.tree.map(lambda x: x[part], parts), out), out)
