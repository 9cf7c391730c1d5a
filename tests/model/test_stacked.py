import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.child import with_delta
from puzzle_jax.model.network import attention_block, embed, hidden_states, moe_block
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.spec import is_spec, param_specs
from puzzle_jax.model.stacked import (
    VARIABLE,
    LayerRun,
    StackedMXFP4,
    layer_runs,
    stack_params,
    stacked_hidden_states,
    stacked_layers,
    unstack_params,
)
from tests.paths import ROOT
from tests.support import random_params, random_tokens, small_config

PUBLISHED = ROOT / "benchmarks/published/gpt-oss-puzzle-88B.json"
# A repeated pattern of two layers, which also differ in their number of experts, and a single layer.
BLOCKS = (BlockConfig(7, 5), BlockConfig(4, None), BlockConfig(7, 5), BlockConfig(4, None), BlockConfig(6, 8))
RUNS = (LayerRun(0, 2, 2), LayerRun(4, 1, 1))
BATCH, SEQ = 2, 19
# Programs that run once finish in half the time without LLVM's optimisations.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tree_allclose(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, err_msg=jax.tree_util.keystr(path), **tolerance)


@pytest.fixture(scope="module")
def model():
    config = small_config(BLOCKS)
    params = random_params(config)
    return config, params, jit(partial(stack_params, runs=RUNS))(params), random_tokens(config, BATCH, SEQ)


# Runs


@pytest.mark.parametrize(
    "kinds,expected",
    [
        ("", []),
        ("a", [(0, 1, 1)]),
        ("aaaa", [(0, 1, 4)]),
        ("abc", [(0, 3, 1)]),
        ("ababab", [(0, 2, 3)]),
        ("abababc", [(0, 2, 3), (6, 1, 1)]),
        ("ababa", [(0, 2, 2), (4, 1, 1)]),
        ("caabaabaabd", [(0, 1, 1), (1, 3, 3), (10, 1, 1)]),
        ("aaaabbbb", [(0, 1, 4), (4, 1, 4)]),
        ("abcabcabab", [(0, 3, 2), (6, 2, 2)]),
    ],
)
def test_runs_of_lists_worked_by_hand(kinds, expected):
    assert layer_runs(kinds) == tuple(LayerRun(*run) for run in expected)


def test_no_cover_traces_fewer_layers_or_takes_fewer_runs():
    """Compared with all ways to cut a list into segments, each counted with its smallest period."""
    rng = np.random.default_rng(0)
    for letters in (2, 3):
        for kinds in rng.integers(0, letters, (30, 9)).tolist():
            runs = layer_runs(kinds)
            covered = [
                kinds[run.start + position]
                for run in runs
                for _ in range(run.repeats)
                for position in range(run.period)
            ]
            assert covered == kinds
            assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
            cheapest = min(
                (sum(map(smallest_period, segments)), len(segments))
                for count in range(9)
                for cuts in itertools.combinations(range(1, 9), count)
                for segments in [[kinds[a:b] for a, b in itertools.pairwise((0, *cuts, 9))]]
            )
            assert (sum(run.period for run in runs), len(runs)) == cheapest


def smallest_period(segment):
    size = len(segment)
    return next(p for p in range(1, size + 1) if size % p == 0 and segment == segment[:p] * (size // p))


def test_the_published_child_traces_few_layers():
    blocks = [(b["num_local_experts"], b["sliding_window"]) for b in json.loads(PUBLISHED.read_text())["block_configs"]]
    assert [tuple(run) for run in layer_runs(blocks)] == [
        (0, 3, 1), (3, 2, 2), (7, 2, 4), (15, 2, 3), (21, 1, 1), (22, 4, 2), (30, 2, 3),
    ]  # fmt: skip
    # Distilled as a view, layers have the parent's experts and differ in the parent's window and their own.
    windows = [((128, None)[layer % 2], window) for layer, (_, window) in enumerate(blocks)]
    runs = layer_runs(windows)
    assert (sum(run.period for run in runs), len(runs)) == (14, 6)


def test_layers_of_a_position():
    run = LayerRun(3, 2, 3)
    assert run.stop == 9
    assert [list(run.layers_at(position)) for position in (0, 1)] == [[3, 5, 7], [4, 6, 8]]


# Stacking


def test_unstacking_gives_back_what_was_stacked(model):
    _, params, stacked, _ = model
    assert [len(positions) for positions in stacked["runs"]] == [2, 1]
    assert stacked["runs"][0][1]["moe"]["down"].shape == (2, 4, 24, 40)
    np.testing.assert_array_equal(
        stacked["runs"][0][1]["attention"]["sinks"][1], params["layers"][3]["attention"]["sinks"]
    )
    tree_allclose(jit(partial(unstack_params, runs=RUNS))(stacked), params, rtol=0)


def test_partial_and_packed_trees_stack_too():
    def layer(index):
        packed = MXFP4(jnp.full((3, 5, 32), index, jnp.uint8), jnp.full((3, 5, 2), 100 + index, jnp.uint8))
        return {"attention": {"norm": jnp.full(4, index), "sinks": None}, "moe": {"down": packed, "norm": None}}

    params = {"embedding": None, "layers": [*map(layer, range(4)), None], "final_norm": jnp.ones(4)}
    runs = (LayerRun(0, 2, 2), LayerRun(4, 1, 1))
    stacked = stack_params(params, runs)
    first, second = stacked["runs"][0]
    assert stacked["embedding"] is None and stacked["runs"][1] == [None] and second["attention"]["sinks"] is None
    assert isinstance(first["moe"]["down"], StackedMXFP4) and second["moe"]["down"].codes.shape == (2, 3, 5, 32)
    np.testing.assert_array_equal(second["moe"]["down"].scales[:, 0, 0, 0], [101, 103])
    back = unstack_params(stacked, runs)
    assert isinstance(back["layers"][2]["moe"]["down"], MXFP4)
    for found, expected in zip(back["layers"], params["layers"], strict=True):
        tree_allclose(found, expected, rtol=0)


def test_an_empty_model_is_empty():
    assert stack_params({"layers": []}, ()) == {"runs": []}
    assert unstack_params({"runs": []}, ()) == {"layers": []}


# The forward pass


@partial(jax.jit, static_argnames=("config", "window"))  # one program for each kind of layer
def plain_layer(layer, x, positions, mask, segment_ids, replay, config, window):
    table = rope_table(config.rope, config.head_dim, positions)
    x, _ = attention_block(layer["attention"], config, x, table, window=window, segment_ids=segment_ids)
    x, aux = moe_block(layer["moe"], config, x, expert_mask=mask, replay=replay)
    return x, aux.routing.ids


def plain_states(params, config, tokens, windows, positions, masks=None, segment_ids=None, replay=None):
    """Outputs and chosen experts of every layer, computed with the blocks of `model.network` in turn."""
    x, states, chosen = embed(params, tokens), [], []
    for index, (layer, block) in enumerate(zip(params["layers"], config.blocks, strict=True)):
        mask = None if masks is None else masks[index, : block.num_experts]
        given = None if replay is None else replay[index]
        x, ids = plain_layer(layer, x, positions, mask, segment_ids, given, config=config, window=windows[index])
        states.append(x)
        chosen.append(ids)
    return jnp.stack(states), jnp.stack(chosen)


def test_masks_segments_positions_and_other_windows(model):
    """Masks leave each layer at least 3 experts; rows hold two segments, whose positions start at 0."""
    config, params, stacked, tokens = model
    kept = np.random.default_rng(3).random((5, 7)) < 0.5
    kept[:, :3] = True
    masks = jnp.asarray(kept)
    segments = jnp.tile(jnp.asarray([0] * 8 + [1] * 11), (BATCH, 1))
    positions = jnp.tile(jnp.asarray([*range(8), *range(11)]), (BATCH, 1))
    windows = [None, 3, None, 3, 4]
    run = jit(partial(stacked_hidden_states, config=config, runs=RUNS, windows=windows, keep_states=True))
    x, states, ids, _ = run(stacked, tokens=tokens, positions=positions, segment_ids=segments, expert_masks=masks)
    expected, chosen = plain_states(params, config, tokens, windows, positions, masks, segments)
    np.testing.assert_array_equal(x, states[-1])
    np.testing.assert_allclose(states, expected, atol=2e-5)
    np.testing.assert_array_equal(ids, chosen)
    for layer, block in enumerate(BLOCKS):
        assert set(np.unique(ids[layer])) <= set(np.flatnonzero(kept[layer, : block.num_experts]))


def test_windows_as_data_are_those_compiled_in(model):
    """Layers 1 and 3, which share a position of a run, get windows of their own; other layers' data are not read."""
    config, _, stacked, tokens = model
    given = jnp.asarray([[1], [3], [1], [2**30], [1]], jnp.int32)
    windows = [4, VARIABLE, 4, VARIABLE, 8]
    run = jit(partial(stacked_hidden_states, config=config, runs=RUNS, windows=windows, keep_states=True))
    found = run(stacked, tokens=tokens, given_windows=given)
    runs = tuple(LayerRun(layer, 1, 1) for layer in range(5))
    apart = stack_params(unstack_params(stacked, RUNS), runs)
    expected = jit(
        partial(stacked_hidden_states, config=config, runs=runs, windows=[4, 3, 4, None, 8], keep_states=True)
    )(apart, tokens=tokens)
    np.testing.assert_allclose(found.states, expected.states, atol=2e-5)
    np.testing.assert_array_equal(found.ids, expected.ids)


def test_layers_on_inputs_of_their_own(model):
    """Each layer reads the input that is given for it, whatever the layer before it outputs."""
    config, params, stacked, _ = model
    before = jnp.asarray(np.random.default_rng(7).standard_normal((5, BATCH, SEQ, 40)), jnp.float32)
    masks = jnp.asarray(np.arange(7) != np.arange(5)[:, None] % 4)  # each layer loses one expert
    segments = jnp.tile(jnp.asarray([0] * 8 + [1] * 11), (BATCH, 1))
    positions = jnp.tile(jnp.asarray([*range(8), *range(11)]), (BATCH, 1))
    windows = [None, 3, None, 3, 4]
    run = jit(partial(stacked_layers, config=config, runs=RUNS, windows=windows, remat=True))
    found = run(stacked, before=before, positions=positions, segment_ids=segments, expert_masks=masks)
    for index, (layer, block) in enumerate(zip(params["layers"], BLOCKS, strict=True)):
        mask = masks[index, : block.num_experts]
        expected, _ = plain_layer(
            layer, before[index], positions, mask, segments, None, config=config, window=windows[index]
        )
        np.testing.assert_allclose(found[index], expected, atol=2e-5)
    with pytest.raises(ValueError, match="before has 4 entries for 5 layers"):
        stacked_layers(stacked, config, RUNS, before[:4])


def test_states_and_gradients_of_replayed_experts(model):
    """A loss on every layer's output, with `remat` and without."""
    _, params, stacked, tokens = model
    config, runs = small_config(BLOCKS[:4]), RUNS[:1]
    params, stacked = params | {"layers": params["layers"][:4]}, stacked | {"runs": stacked["runs"][:1]}
    drawn = np.random.default_rng(4).permuted(np.tile(np.arange(4), (4, BATCH * SEQ, 1)), axis=-1)
    replay = jnp.asarray(drawn[..., :2])
    probe = jnp.asarray(np.random.default_rng(5).standard_normal((4, BATCH, SEQ, 40)), jnp.float32)

    def of_plain(params):
        windows, positions = [block.window for block in config.blocks], jnp.arange(SEQ)[None]
        states, _ = plain_states(params, config, tokens, windows, positions, replay=replay)
        return (states * probe).sum() + (states[-1] ** 2).sum(), states

    @jax.jit
    def of_routers(inputs):
        """The experts that each router would choose on its layer's input."""
        rope = rope_table(config.rope, 10, jnp.arange(SEQ)[None])
        attended = [
            attention_block(layer["attention"], config, x, rope, window=block.window)[0]
            for x, block, layer in zip(inputs, config.blocks, params["layers"], strict=True)
        ]
        return [
            moe_block(layer["moe"], config, y)[1].routing.ids
            for y, layer in zip(attended, params["layers"], strict=True)
        ]

    def of_stacked(remat, stacked):
        x, states, ids, routed = stacked_hidden_states(
            stacked, config, runs, tokens, replay=replay, remat=remat, keep_states=True
        )
        assert states is not None
        return (states * probe).sum() + (x**2).sum(), (states, ids, routed)

    (value, expected), gradient = jax.jit(jax.value_and_grad(of_plain, has_aux=True))(params)
    own = of_routers([embed(params, tokens), *expected[:-1]])
    for remat in (False, True):
        of_runs = jit(jax.value_and_grad(partial(of_stacked, remat), has_aux=True))
        (found_value, (states, ids, routed)), found = of_runs(stacked)
        np.testing.assert_allclose(found_value, value, rtol=1e-5)
        np.testing.assert_allclose(states, expected, atol=2e-5)
        np.testing.assert_array_equal(ids, replay)
        np.testing.assert_array_equal(routed, own)
        tree_allclose(unstack_params(found, runs), gradient, rtol=1e-4, atol=1e-3)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient["layers"][2])) > 10


def test_packed_experts_by_the_default_options():
    """Trained attention comes from a tree that holds nothing else."""
    blocks = (BlockConfig(7, 5), BlockConfig(7, 5), BlockConfig(7, None))
    config = small_config(blocks, hidden_size=64, intermediate_size=32)
    runs, tokens, rng = layer_runs(blocks), random_tokens(config, BATCH, SEQ), np.random.default_rng(6)
    assert runs == (LayerRun(0, 1, 2), LayerRun(2, 1, 1))

    def packed(outputs, inputs):
        draw = partial(rng.integers, dtype=np.uint8)
        codes, scales = draw(0, 256, (7, outputs, inputs // 2)), draw(121, 125, (7, outputs, inputs // 32))
        return MXFP4(jnp.asarray(codes), jnp.asarray(scales))

    params = random_params(config)
    for layer in params["layers"]:
        layer["moe"] |= {"gate_up": packed(64, 64), "down": packed(64, 32)}
    others = random_params(config, seed=1)["layers"]
    trained = dict.fromkeys(params) | {"layers": [{"attention": other["attention"], "moe": None} for other in others]}

    @jit
    def of_stacked(params, trained):
        stacked = with_delta(stack_params(params, runs), stack_params(trained, runs))
        return stacked_hidden_states(stacked, config, runs, tokens)

    x, states, ids, _ = of_stacked(params, trained)
    expected, auxes = jit(partial(hidden_states, config=config))(with_delta(params, trained), tokens=tokens)
    assert states is None
    np.testing.assert_allclose(x, expected, atol=5e-5)
    np.testing.assert_array_equal(ids, [aux.routing.ids for aux in auxes])


# What programs contain


def gradient_of_depth(layers):
    """The gradient with `remat` of a repeated pattern of two layers, and shapes to trace it with."""
    config = small_config(tuple(BlockConfig(7, window) for _ in range(layers // 2) for window in (5, None)))
    runs = layer_runs(config.blocks)
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), param_specs(config), is_leaf=is_spec)

    def loss(stacked, tokens):
        return (stacked_hidden_states(stacked, config, runs, tokens, remat=True).x ** 2).sum()

    stacked = jax.eval_shape(partial(stack_params, runs=runs), shapes)
    return jax.grad(loss), (stacked, jax.ShapeDtypeStruct((BATCH, SEQ), jnp.int32))


def test_programs_do_not_grow_with_depth():
    def operations(layers):
        gradient, shapes = gradient_of_depth(layers)
        return jax.jit(gradient).lower(*shapes).as_text().count(" = ")

    assert operations(16) == operations(4) > 100


def test_only_the_inputs_of_layers_are_kept():
    gradient, shapes = gradient_of_depth(6)
    forward = next(eqn for eqn in jax.make_jaxpr(gradient)(*shapes).eqns if eqn.primitive.name == "scan")
    floats = [var.aval.size for var in forward.outvars if jnp.issubdtype(var.aval.dtype, jnp.floating)]
    hidden = BATCH * SEQ * 40
    assert sum(floats) == hidden + 6 * hidden  # the last output, and the input of each of 6 layers


# What is refused


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"windows": [5, None, 6, None, 8]}, "layers 0 and 2 share a position of a run, but their windows are 5 and 6"),
        ({"windows": [5, None]}, "windows has 2 entries for 5 layers"),
        ({"expert_masks": jnp.ones((4, 7), bool)}, "expert_masks has 4 entries for 5 layers"),
        ({"replay": jnp.zeros((6, 38, 2), int)}, "replay has 6 entries for 5 layers"),
        ({"windows": [5, VARIABLE, 5, VARIABLE, 8]}, "layer 1 takes its window as data, but none are given"),
        ({"given_windows": jnp.ones((4, 1), int)}, "given_windows has 4 entries for 5 layers"),
        ({"runs": RUNS[:1]}, "the runs cover 4 layers, but the model has 5"),
        ({"runs": RUNS[1:]}, r"LayerRun\(start=4, .*\) does not continue the runs before it, which cover 0 layers"),
        ({"runs": (LayerRun(0, 5, 1),)}, "stacked in 2 runs, but 1 were given"),
        (
            {"runs": (LayerRun(0, 1, 4), LayerRun(4, 1, 1))},
            r"layers 0 to 3 are a pattern of 1 layers repeated 4 times, but their parameters hold 2 layers",
        ),
    ],
)
def test_what_does_not_fit_is_refused(model, changes, message):
    config, _, stacked, tokens = model
    with pytest.raises(ValueError, match=message):
        stacked_hidden_states(stacked, config, **{"runs": RUNS, "tokens": tokens} | changes)


def test_layers_that_differ_do_not_stack(model):
    _, params, stacked, _ = model
    message = (
        r"layers 0 and 1 share a position of a run, but moe\.down is float32\[7, 24, 40\] in the one and float32\[4"
    )
    with pytest.raises(ValueError, match=message):
        stack_params(params, (LayerRun(0, 1, 5),))
    message = r"layers 0 and 1 .* but norm is missing in the one and float32\[3\] in the other"
    with pytest.raises(ValueError, match=message):
        stack_params({"layers": [{"norm": None}, {"norm": jnp.ones(3)}]}, (LayerRun(0, 1, 2),))
    with pytest.raises(ValueError, match=r"layers 0 and 1 .* norm is float32\[3\] in the one and bfloat16\[3\]"):
        stack_params({"layers": [{"norm": jnp.ones(3, dt)} for dt in ("float32", "bfloat16")]}, (LayerRun(0, 1, 2),))
    with pytest.raises(ValueError, match="stacked in 2 runs, but 1 were given"):
        unstack_params(stacked, RUNS[:1])
