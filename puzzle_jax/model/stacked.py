"""Layers of equal kind, stacked and scanned, so that training programs grow with the runs of a model, not its layers.

`layer_runs` covers a list of layer kinds by repeated patterns: [a b a b a b c] is a run of period 2, repeated three
times, and a run of one layer. `stack_params` stacks the parameters of layers at equal positions of a run, and
`stacked_hidden_states` is the forward pass of `model.network` over them: one `jax.lax.scan` per run whose body is one
period. What differs between layers of a run besides their weights, experts that a view removes and choices that are
replayed, is passed as data; windows are static and belong to a position, so kinds that distinguish windows keep the
fast attention. A position whose window is `VARIABLE` takes windows as data, so that one program serves several
children.

All numerics are those of `model.network`'s blocks. Left out: caches, and windows that differ between rows; scoring and
generation need them and run one block after another (`search`, `model.cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from puzzle_jax.config import ModelConfig
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.kernels.prefix_attention import Layout
from puzzle_jax.kernels.route import route
from puzzle_jax.model.network import attention_block, embed, moe_block
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.spec import Params, is_dense

VARIABLE: Literal["variable"] = "variable"
"""In place of a layer's static window: the window comes as data."""

StaticWindow = int | Literal["variable"] | None


class LayerRun(NamedTuple):
    """Layers `start` to `start + period * repeats - 1`: a pattern of `period` layers, repeated.

    Position p of the pattern holds layers start + p, start + p + period, ...
    """

    start: int
    period: int
    repeats: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.repeats

    def layers_at(self, position: int) -> range:
        """The layers that share a position of the pattern."""
        return range(self.start + position, self.stop, self.period)


class StackedMXFP4(NamedTuple):
    """The packed experts of stacked layers: the arrays of `MXFP4`, which holds one layer's, with a leading axis.

    As a plain tuple it also takes what JAX puts in place of arrays: shardings or shapes.
    """

    codes: UInt8[Array, "repeats experts outputs half_inputs"]
    scales: UInt8[Array, "repeats experts outputs groups"]


class Hidden(NamedTuple):
    """The result of a pass over stacked layers.

    Attributes:
      x: the last layer's output, before the final norm.
      states: every layer's output, if asked for; else None.
      ids: the experts that every layer's tokens went through, best first; tokens are batch * seq.
      routed: the experts that the routers would have chosen, if others were replayed; else None.
    """

    x: Float[Array, "batch seq hidden"]
    states: Float[Array, "layers batch seq hidden"] | None
    ids: Int[Array, "layers tokens k"]
    routed: Int[Array, "layers tokens k"] | None = None


def layer_runs(kinds: Sequence[Hashable]) -> tuple[LayerRun, ...]:
    """The runs that cover `kinds`, one entry per layer, with the fewest traced layers (the sum of their periods), and
    among those the fewest runs.

    An exact dynamic program from the last layer to the first; among equals, earlier runs are as long as possible.
    """
    count = len(kinds)
    traced, number = [0] * (count + 1), [0] * (count + 1)  # of the best cover of the layers from `start` on
    first: list[LayerRun] = [LayerRun(count, 0, 0)] * (count + 1)  # the run that such a cover begins with
    same = [0] * (count + 1)  # per period: consecutive layers from `start` on that equal the one a period later
    for start in reversed(range(count)):
        candidates = []
        for period in range(1, count - start + 1):
            partner = start + period
            same[period] = same[period] + 1 if partner < count and kinds[start] == kinds[partner] else 0
            for repeats in range(1, same[period] // period + 2):
                stop = start + period * repeats
                candidates.append((period + traced[stop], 1 + number[stop], -stop, period, repeats))
        traced[start], number[start], _, period, repeats = min(candidates)
        first[start] = LayerRun(start, period, repeats)
    runs, start = [], 0
    while start < count:
        runs.append(first[start])
        start = runs[-1].stop
    return tuple(runs)


def stack_params(params: Params, runs: Sequence[LayerRun]) -> Params:
    """`params` with "runs" in place of "layers": per run, per position of its pattern, one layer's tree whose arrays
    have a leading axis of `repeats`.

    Packed experts stay packed, as `StackedMXFP4`, and a None in place of an array, as in trees of trained values alone,
    stays None. The arrays are new; `params` is left as it is.

    Raises ValueError where runs do not cover the layers, or layers of one position differ in arrays, shapes or dtypes.
    """
    layers = params["layers"]
    _check_cover(runs, len(layers))
    stacked = [
        [_stacked({layer: layers[layer] for layer in run.layers_at(p)}) for p in range(run.period)] for run in runs
    ]
    return {**{name: value for name, value in params.items() if name != "layers"}, "runs": stacked}


def unstack_params(stacked: Params, runs: Sequence[LayerRun]) -> Params:
    """The inverse of `stack_params`. Raises ValueError where `stacked` was stacked by other runs."""
    _check_stacked(stacked, runs)
    layers: list[Params | None] = [None] * (runs[-1].stop if runs else 0)
    for run, positions in zip(runs, stacked["runs"], strict=True):
        for position, tree in enumerate(positions):
            for repeat, layer in enumerate(run.layers_at(position)):
                layers[layer] = one_layer(_repeat(tree, repeat))
    return {**{name: value for name, value in stacked.items() if name != "runs"}, "layers": layers}


def stacked_hidden_states(
    stacked: Params,
    config: ModelConfig,
    runs: Sequence[LayerRun],
    tokens: Int[Array, "batch seq"] | None,
    *,
    before: Float[Array, "layers batch seq hidden"] | None = None,
    windows: Sequence[StaticWindow] | None = None,
    given_windows: Int[Array, "layers 1"] | None = None,
    positions: Int[Array, "#batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    layout: Layout | None = None,
    expert_masks: Bool[Array, "layers experts"] | None = None,
    replay: Int[Array, "layers tokens k"] | None = None,
    remat: bool = False,
    keep_states: bool = False,
) -> Hidden:
    """The result of `network.hidden_states`, by a scan over each run; a run that is not repeated is inlined.

    Args:
      stacked: parameters as `stack_params` gives them, with the same `runs`.
      runs: cover all layers, in order.
      tokens: token ids; not read where `before` is given.
      before: an input for every layer, in place of the previous layer's output.
      windows: per layer, in place of the configuration's; static, and equal within a position of a run.
      given_windows: per layer, the window where `windows` has `VARIABLE`; other layers' are not read.
      positions: rotary positions; counted from 0 in every row by default.
      segment_ids: positions attend within their segment only (packed sequences).
      layout: layout of rows that hold a prompt and answers to it, which all see it (`kernels.prefix_attention`).
      expert_masks: per layer, False removes an expert. Columns past a layer's own experts are not read.
      replay: per layer, experts to use in place of the router's choice.
      remat: backward passes keep only each layer's input and recompute the rest.
      keep_states: returns every layer's output too.

    Raises ValueError, naming the layers, where runs, parameters, windows, masks and replay do not fit together.
    """
    if before is not None:
        x = before[0]
    else:
        assert tokens is not None
        x = embed(stacked, tokens)
    if windows is None:
        windows = [block.window for block in config.blocks]
    _check_cover(runs, config.num_layers)
    _check_stacked(stacked, runs)
    _check_windows(runs, windows)
    if VARIABLE in windows and given_windows is None:
        raise ValueError(f"layer {list(windows).index(VARIABLE)} takes its window as data, but none are given")
    by_layer = {"before": before, "expert_masks": expert_masks, "replay": replay, "given_windows": given_windows}
    for name, data in by_layer.items():
        if data is not None and len(data) != config.num_layers:
            raise ValueError(f"{name} has {len(data)} entries for {config.num_layers} layers")
    if positions is None:
        positions = jnp.arange(x.shape[1])[None]
    table = rope_table(config.rope, config.head_dim, positions)

    def layer_at(static: StaticWindow) -> _Layer:
        def layer(
            x: Array, params: Params, mask: Array | None, chosen: Array | None, given: Array | None
        ) -> _LayerOutput:
            attention, moe = params["attention"], one_layer(params["moe"])
            x, _ = attention_block(
                attention,
                config,
                x,
                table,
                window=given if static == VARIABLE else static,
                segment_ids=segment_ids,
                layout=layout,
                positions=positions,
            )
            if mask is not None and not is_dense(moe):
                mask = mask[: moe["router_weight"].shape[-1]]
            x, aux = moe_block(moe, config, x, expert_mask=mask, replay=chosen)
            routed = None
            if chosen is not None and is_dense(moe):
                routed = aux.routing.ids
            elif chosen is not None:
                logits = aux.router_logits.reshape(-1, aux.router_logits.shape[-1])
                routed = route(logits, chosen.shape[-1], mask=None if mask is None else mask[None]).ids
            return _LayerOutput(x, aux.routing.ids, routed)

        return layer

    states, ids, routed = [], [], []
    for run, layers in zip(runs, stacked["runs"], strict=True):
        pattern = [layer_at(windows[run.start + position]) for position in range(run.period)]
        if remat:
            pattern = [jax.checkpoint(layer) for layer in pattern]
        with jax.named_scope(f"layers_{run.start}_to_{run.stop - 1}"):
            data = _RunData(layers, *(_of_run(each, run) for each in (expert_masks, replay, before, given_windows)))
            found = _walk(run, pattern, x, data, keep_states)
        x = found.x
        states.append(found.states)
        ids.append(found.ids)
        routed.append(found.routed)
    return Hidden(
        x,
        jnp.concatenate(states) if keep_states else None,
        jnp.concatenate(ids),
        None if replay is None else jnp.concatenate(routed),
    )


def stacked_layers(
    stacked: Params,
    config: ModelConfig,
    runs: Sequence[LayerRun],
    before: Float[Array, "layers batch seq hidden"],
    **options: object,
) -> Float[Array, "layers batch seq hidden"]:
    """Every layer's output for an input of its own, as blockwise training needs it; options as above."""
    found = stacked_hidden_states(stacked, config, runs, None, before=before, keep_states=True, **options)  # pyright: ignore[reportArgumentType]
    assert found.states is not None
    return found.states


class _LayerOutput(NamedTuple):
    """A layer's output, the experts of its tokens, and its router's own choice where they were replayed."""

    x: Array
    ids: Array
    routed: Array | None


_Layer = Callable[[Array, Params, Array | None, Array | None, Array | None], _LayerOutput]


class _RunData(NamedTuple):
    """Data that layers of a run do not share; leaves are [repeats, ...], or those of one repeat within the scan."""

    layers: list[Params]  # per position
    masks: Array | None  # [repeats, period, experts]
    replay: Array | None  # [repeats, period, tokens, k]
    before: Array | None  # [repeats, period, batch, seq, hidden]; None: each layer takes the previous one's output
    windows: Array | None  # [repeats, period, 1]


def _walk(run: LayerRun, pattern: list[_Layer], x: Array, data: _RunData, keep_states: bool) -> Hidden:
    """The pass over one run: its last output, and states and experts of its layers in order."""

    def period(x: Array, data: _RunData) -> tuple[Array, tuple[Array | None, Array, Array | None]]:
        outputs = []
        for position, layer in enumerate(pattern):
            mask = None if data.masks is None else data.masks[position]
            chosen = None if data.replay is None else data.replay[position]
            given = None if data.windows is None else data.windows[position]
            x = x if data.before is None else data.before[position]
            with jax.named_scope(f"position_{position}"):
                outputs.append(layer(x, data.layers[position], mask, chosen, given))
            x = outputs[-1].x
        states, ids, routed = zip(*outputs, strict=True)
        return x, (
            jnp.stack(states) if keep_states else None,
            jnp.stack(ids),
            None if data.replay is None else jnp.stack(routed),
        )

    if run.repeats == 1:
        x, outputs = period(x, _repeat(data, 0))
    else:
        x, outputs = jax.lax.scan(period, x, data)
        outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
    states, ids, routed = outputs
    return Hidden(x, states, ids, routed)


def _of_run(data: Array | None, run: LayerRun) -> Array | None:
    """A run's part of an array over layers, [repeats, period, ...]."""
    if data is None:
        return None
    return data[run.start : run.stop].reshape(run.repeats, run.period, *data.shape[1:])


def _repeat(tree: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def one_layer(tree: PyTree) -> PyTree:
    """A layer's tree as `model.network` takes it: slices of `StackedMXFP4` become `MXFP4`."""
    return jax.tree.map(
        lambda node: MXFP4(*node) if isinstance(node, StackedMXFP4) else node,
        tree,
        is_leaf=lambda node: isinstance(node, StackedMXFP4),
    )


def _stacked(layers: dict[int, Params | None]) -> Params | None:
    """The trees of layers, by their number, as one tree of stacked arrays."""
    first, *others = layers
    expected = _arrays(layers[first])
    for other in others:
        found = _arrays(layers[other])
        for name in {**expected, **found}:
            of_first, of_other = (arrays.get(name, "missing") for arrays in (expected, found))
            if of_first != of_other:
                raise ValueError(
                    f"layers {first} and {other} share a position of a run, but {name} is {of_first} in the one "
                    f"and {of_other} in the other"
                )

    def stack(*nodes: PyTree) -> PyTree:
        if isinstance(nodes[0], MXFP4):
            return StackedMXFP4(jnp.stack([node.codes for node in nodes]), jnp.stack([node.scales for node in nodes]))
        return jnp.stack(nodes)

    return jax.tree.map(stack, *layers.values(), is_leaf=lambda node: isinstance(node, MXFP4))


def _arrays(layer: Params | None) -> dict[str, str]:
    """Dtype and shape of every array of a layer, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(layer)
    }


def _check_cover(runs: Sequence[LayerRun], layers: int) -> None:
    covered = 0
    for run in runs:
        if run.start != covered or run.period < 1 or run.repeats < 1:
            raise ValueError(f"{run} does not continue the runs before it, which cover {covered} layers")
        covered = run.stop
    if covered != layers:
        raise ValueError(f"the runs cover {covered} layers, but the model has {layers}")


def _check_stacked(stacked: Params, runs: Sequence[LayerRun]) -> None:
    if len(stacked["runs"]) != len(runs):
        raise ValueError(f"the parameters are stacked in {len(stacked['runs'])} runs, but {len(runs)} were given")
    for run, positions in zip(runs, stacked["runs"], strict=True):
        repeats = sorted({leaf.shape[0] for leaf in jax.tree.leaves(positions)})
        if len(positions) != run.period or repeats not in ([], [run.repeats]):
            raise ValueError(
                f"layers {run.start} to {run.stop - 1} are a pattern of {run.period} layers repeated {run.repeats} "
                f"times, but their parameters hold {len(positions)} layers repeated {repeats} times"
            )


def _check_windows(runs: Sequence[LayerRun], windows: Sequence[StaticWindow]) -> None:
    if len(windows) != (layers := runs[-1].stop):
        raise ValueError(f"windows has {len(windows)} entries for {layers} layers")
    for run in runs:
        for position in range(run.period):
            first, *others = run.layers_at(position)
            for other in others:
                if windows[other] != windows[first]:
                    raise ValueError(
                        f"layers {first} and {other} share a position of a run, but their windows are "
                        f"{windows[first]} and {windows[other]}"
                    )
