"""Rows: which tokens are learned, where positions and segments restart, extras, and how rows fill."""

import numpy as np
import pytest

from puzzle_jax.train.rows import Example, OpenRows, Packed, pack


def test_packing_is_exact():
    first, second = Example((11, 12, 13, 14), 2), Example(np.array([21, 22, 23], np.int32), 1)
    packed = pack([[first, second], [second], []], length=9, pad_id=5)
    assert isinstance(packed, Packed)
    nothing = [0] * 9
    assert packed.tokens.tolist() == [[11, 12, 13, 14, 21, 22, 23, 5, 5], [21, 22, 23] + [5] * 6, [5] * 9]
    assert packed.targets.tolist() == [[12, 13, 14, 5, 22, 23, 5, 5, 5], [22, 23] + [5] * 7, [5] * 9]
    assert packed.weights.tolist() == [[0, 1, 1, 0, 1, 1, 0, 0, 0], [1, 1] + [0] * 7, nothing]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1] + [0] * 6, nothing]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 1, 2] + [0] * 6, nothing]
    assert packed.extras == {}
    assert {array.dtype for array in packed[:2]} == {np.dtype(np.int32)} and packed.weights.dtype == np.float32


def test_exactly_the_completion_is_learned():
    """Against a walk over the tokens: a position counts if the next token is in the same example's completion."""
    rng = np.random.default_rng(0)
    rows = [
        [Example(rng.integers(1, 90, n).astype(np.int32), int(rng.integers(1, n + 1))) for n in lengths]
        for lengths in ((5, 2, 9), (16,), (1, 7, 3, 4))
    ]
    packed = pack(rows, 17, 0)
    for row, members in enumerate(rows):
        learned = [False] * 17
        at = 0
        for example in members:
            for position in range(len(example.tokens) - 1):
                if position + 1 >= example.prompt_length:
                    learned[at + position] = True
                    assert packed.targets[row, at + position] == example.tokens[position + 1]
            at += len(example.tokens)
        assert packed.weights[row].tolist() == [float(learns) for learns in learned]
    assert packed.weights.sum() == sum(len(e.tokens) - e.prompt_length for row in rows for e in row)


def test_extras_lie_beside_their_tokens():
    def example(n, start):
        ids = np.arange(start, start + 3 * n, dtype=np.uint16).reshape(n, 3)
        return Example(tuple(range(1, n + 1)), 1, {"ids": ids, "loss": np.full(n, 0.5, np.float16)})

    packed = pack([[], [example(2, 10), example(3, 50)]], 6, 0)
    assert packed.extras["ids"].shape == (2, 6, 3) and packed.extras["ids"].dtype == np.uint16
    assert packed.extras["ids"][1].tolist() == [
        [10, 11, 12],
        [13, 14, 15],
        [50, 51, 52],
        [53, 54, 55],
        [56, 57, 58],
        [0, 0, 0],
    ]
    assert packed.extras["loss"].tolist() == [[0.0] * 6, [0.5] * 5 + [0.0]] and not packed.extras["ids"][0].any()
    with pytest.raises(ValueError, match=r"an example has extras \[\], but others have \['ids', 'loss'\]"):
        pack([[example(2, 0), Example((1, 2), 1)]], 6, 0)
    narrow = Example((1, 2), 1, {"ids": np.zeros((2, 4), np.uint16), "loss": np.zeros(2, np.float16)})
    with pytest.raises(ValueError, match=r"extras 'ids' has \(4,\) per token, but others have \(3,\)"):
        pack([[example(2, 0), narrow]], 6, 0)


def test_impossible_examples_and_rows_are_refused():
    for prompt_length in (0, 4):
        with pytest.raises(ValueError, match=f"prompt_length is {prompt_length}, but must be 1 to 3"):
            Example((1, 2, 3), prompt_length)
    with pytest.raises(ValueError, match=r"extras 'top' has shape \(2, 4\), but must have 3 rows"):
        Example((1, 2, 3), 1, {"top": np.zeros((2, 4))})
    with pytest.raises(ValueError, match="row 1 holds at least 6 tokens, but has room for 5"):
        pack([[], [Example((1, 2, 3), 1), Example((1, 2, 3), 1)]], 5, 0)
    with pytest.raises(ValueError, match="an example of 6 tokens fits no row of 5"):
        OpenRows[int](5, 2, lambda size: size).place(6)


def test_rows_fill_first_fit_and_the_fullest_closes():
    opened = OpenRows[int](10, 2, lambda size: size)
    assert [opened.place(size) for size in (6, 7, 3, 3)] == [None] * 4
    assert opened.rows == [[6, 3], [7, 3]] and len(opened) == 2
    assert opened.place(4) == [7, 3] and opened.rows == [[6, 3], [4]]
    assert opened.place(1) is None and opened.rows == [[6, 3, 1], [4]]
    again = OpenRows[int](10, 2, lambda size: size, opened.rows)
    assert again.place(7) == [6, 3, 1] and again.rows == [[4], [7]]
    assert again.fullest_first() == [[7], [4]]
    assert opened.rows == [[6, 3, 1], [4]]


@pytest.mark.parametrize("spread", [0.4, 1.0])
def test_typical_lengths_fill_rows(spread):
    rng = np.random.default_rng(1)
    middle = rng.choice([200, 700, 2500], 3000)  # three efforts
    sizes = [int(size) for size in middle * np.exp(rng.normal(0, spread, 3000)) if 2 <= size <= 8192]
    opened = OpenRows[int](8192, 16, lambda size: size)
    closed = [row for row in map(opened.place, sizes) if row is not None]
    assert np.mean([sum(row) for row in closed]) / 8192 > 0.97
    assert sorted(size for row in (*closed, *opened.rows) for size in row) == sorted(sizes)
