"""A child of a tiny parent that differs in experts, windows and rotation, and what both compute layer by layer.

The parent's experts are values that MXFP4 can represent. The last two of its three layers are a run; `SHORT` has only
these two, for programs that take long to compile.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.config import BlockConfig, RopeConfig
from puzzle_jax.kernels.mxfp4 import MXFP4, as_dense
from puzzle_jax.model.child import Child, ChildBlock
from puzzle_jax.model.network import attention_block, embed, head_logits, moe_block
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.spec import EXPERT_MATRICES
from puzzle_jax.train.fake_quant import round_to_mxfp4
from puzzle_jax.train.rows import Example, pack
from tests.support import random_params, small_config

PARENT = small_config(
    (BlockConfig(8, 5), BlockConfig(8, None), BlockConfig(8, None)),
    vocab_size=98,
    hidden_size=32,
    intermediate_size=64,
    num_heads=12,
    num_kv_heads=6,
    head_dim=6,
)
BLOCKS = (ChildBlock((0, 2, 3, 5, 7), 5), ChildBlock((1, 2, 4, 6), 7), ChildBlock((0, 1, 3, 4, 6, 7), 7))
CHILD = Child(PARENT, BLOCKS, rope=RopeConfig(theta=10_000.0, factor=8.0, original_context=32))
SHORT = replace(CHILD, parent=replace(PARENT, blocks=PARENT.blocks[1:]), blocks=BLOCKS[1:])
ROWS, LENGTH, PAD = 4, 24, 97

# Without LLVM's optimisations, programs that run once or twice finish in half the time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def packed_params(child=CHILD):
    """Weights of the child's parent, with packed experts."""
    rng, params = np.random.default_rng(6), random_params(child.parent)

    def packed(experts, inputs, outputs):
        draw = partial(rng.integers, dtype=np.uint8)
        codes, scales = draw(0, 256, (experts, outputs, inputs // 2)), draw(123, 126, (experts, outputs, inputs // 32))
        return MXFP4(jnp.asarray(codes), jnp.asarray(scales))

    for layer in params["layers"]:
        layer["moe"] |= {name: packed(*layer["moe"][name].shape) for name in EXPERT_MATRICES}
    return params


@jit
def dense(params):
    """The same weights, all dense."""
    return jax.tree.map(lambda x: as_dense(x, jnp.float32), params, is_leaf=lambda node: isinstance(node, MXFP4))


def own_delta(params):
    """A child's own values for everything but one layer's `o_bias`, as read from its files."""
    rng = np.random.default_rng(7)
    delta = jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.standard_normal(x.shape), np.float32), params)
    for layer in delta["layers"]:
        layer["moe"] |= {name: np.asarray(round_to_mxfp4(jnp.asarray(layer["moe"][name]))) for name in EXPERT_MATRICES}
    delta["layers"][1]["attention"]["o_bias"] = None
    return delta


def replace_delta(delta):
    """The child with these values of its own."""
    return replace(CHILD, dense_delta=delta)


def examples():
    """Two that share a row, one that fills a row, one with padding after it, and one without an answer."""
    rng = np.random.default_rng(8)
    sizes = ((9, 4), (11, 3), (24, 10), (13, 12), (6, 6))
    return [Example(rng.integers(0, PAD, size).astype(np.int32), prompt) for size, prompt in sizes]


def batch(extras=None):
    """The examples in four rows, the last without an answer; weights are 1 or 1/2, and 0 for one token of an answer."""
    a, b, c, d, e = examples()
    rows = pack([[a, b], [c], [d], [e]], LENGTH, PAD)
    weights = rows.weights * np.random.default_rng(9).choice([0.5, 1.0], rows.weights.shape).astype(np.float32)
    weights[1, 12] = 0.0
    return rows._replace(weights=weights, extras=extras or {})


def states(params, config, rows, windows, kept=None):
    """The embedding and every layer's output, [layers + 1, rows, length, hidden], computed by `network`'s blocks."""
    table = rope_table(config.rope, config.head_dim, jnp.asarray(rows.positions))
    found = [embed(params, jnp.asarray(rows.tokens))]
    for index, layer in enumerate(params["layers"]):
        found.append(one_layer(layer, config, found[-1], table, rows, windows[index], kept and kept[index]))
    return jnp.stack(found)


def one_layer(layer, config, x, table, rows, window, kept):
    """Applies a layer to `x`, with only the experts `kept` if given."""
    segment_ids = jnp.asarray(rows.segment_ids)
    x, _ = attention_block(layer["attention"], config, x, table, window=window, segment_ids=segment_ids)
    mask = None if kept is None else jnp.isin(jnp.arange(8), jnp.asarray(kept))
    return moe_block(layer["moe"], config, x, expert_mask=mask)[0]


def teacher_states(params, rows, child=CHILD):
    return states(params, child.parent, rows, [block.window for block in child.parent.blocks])


TEACHER_STATES = jit(teacher_states)


def student_states(params, rows, child=CHILD):
    """States of the child as a view, from parameters in the parent's shapes."""
    return states(params, child.viewed, rows, [block.window for block in child.blocks], child.kept)


def logits(params, x):
    return head_logits(params, PARENT, x)


def random_master_weights(student, base, seed=3):
    """fp32 master weights at random offsets from where they begin."""
    rng = np.random.default_rng(seed)

    def moved(master):
        return jnp.asarray(np.asarray(master) + 0.1 * rng.standard_normal(master.shape), jnp.float32)

    return jax.tree.map(moved, student.master_weights(base))


def close(found, expected, tolerance=2e-5):
    """Compares trees leaf by leaf, relative to the largest entry of each leaf."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert one.shape == other.shape, jax.tree_util.keystr(path)
        atol = tolerance * max(np.abs(other).max(initial=0.0), 1e-3)
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
