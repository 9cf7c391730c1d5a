"""Attention of answers that share a prompt, against each conversation by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.kernels.prefix_attention import Layout, prefix_attention
from puzzle_jax.kernels.window_attention import reference as alone
from tests.support import normal

HEADS, KV_HEADS, DIM = 6, 3, 10
LAYOUT = Layout(prefix=13, strip=9)
SEQ = 13 + 2 * 9
# Two rows: a prompt of 11 tokens with answers of 4, 5 and 8, and one of 13 with a single answer of 7.
PROMPTS, ANSWERS = (11, 13), (((13, 4), (17, 5), (22, 8)), ((13, 7),))


def laid_out() -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of the rows."""
    segments, positions = np.zeros((2, SEQ), np.int32), np.zeros((2, SEQ), np.int32)
    for row, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        segments[row, 13 - prompt : 13], positions[row, 13 - prompt : 13] = 1, np.arange(prompt)
        for number, (start, length) in enumerate(answers, 2):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = prompt + np.arange(length)
    return segments, positions


SEGMENTS, POSITIONS = laid_out()
REAL = (SEGMENTS > 0)[..., None, None]


def arrays():
    return normal(4, (2, SEQ, HEADS, DIM), *[(2, SEQ, KV_HEADS, DIM)] * 2, (HEADS,))


def run(q, k, v, sinks, *, window, implementation="strips"):
    out = prefix_attention(
        q,
        k,
        v,
        sinks,
        layout=LAYOUT,
        window=window,
        segment_ids=jnp.asarray(SEGMENTS),
        positions=jnp.asarray(POSITIONS),
        implementation=implementation,
    )
    return jnp.where(REAL, out, 0.0)


def conversations(q, k, v, sinks, *, window):
    """Runs every conversation by itself and puts its results where the row has them."""
    out = jnp.zeros_like(q)
    for row, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        for start, length in answers:
            places = np.r_[13 - prompt : 13, start : start + length]
            q_own, k_own, v_own = (x[row : row + 1, places] for x in (q, k, v))
            out = out.at[row, places].set(alone.window_attention(q_own, k_own, v_own, sinks, window=window)[0])
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 12, 200])
def test_it_is_attention_of_each_conversation_by_itself(window):
    def value_and_gradients(by):
        def loss(given):
            out = by(*given, window=window)
            return jnp.sum(out * jnp.sin(jnp.arange(out.size).reshape(out.shape))), out

        return jax.jit(jax.grad(loss, has_aux=True))

    expected = value_and_gradients(conversations)(arrays())
    for implementation in ("strips", "reference"):
        found = value_and_gradients(lambda *given, of=implementation, **o: run(*given, implementation=of, **o))(
            arrays()
        )
        # The row has a prompt's outputs once; `conversations` writes them once per answer, and the last write stays.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_layouts_that_make_no_rows_are_refused():
    def asked(layout):
        q, k, v, sinks = arrays()
        segments, positions = jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)
        prefix_attention(q, k, v, sinks, layout=layout, window=None, segment_ids=segments, positions=positions)

    with pytest.raises(ValueError, match="a prefix of 13 and strips of 8, which do not make rows of 31"):
        asked(Layout(13, 8))
    with pytest.raises(ValueError, match="a prefix of 31 and strips of 9"):
        asked(Layout(31, 9))
    with pytest.raises(ValueError, match="implementation is 'fast', but must be strips or reference"):
        run(*arrays(), window=None, implementation="fast")
