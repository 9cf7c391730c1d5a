import numpy as np
import pytest

from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.traces import Trace, read_traces, write_traces
from puzzle_jax.search.traces import micro_batches


def answers(lengths):
    """Answers with the given numbers of prompt and completion tokens."""
    rng = np.random.default_rng(0)
    return [
        Trace(
            "chain",
            "high",
            index,
            {"steps": index + 1},
            tuple(rng.integers(0, 97, prompt).tolist()),
            tuple(rng.integers(0, 97, completion).tolist()),
            reward=float(index % 2 == 0),
            truncated=index % 3 == 0,
        )
        for index, (prompt, completion) in enumerate(lengths)
    ]


LENGTHS = [(10, 4), (3, 1), (90, 30), (130, 50), (7, 9)]


def test_a_trace_file_gives_back_what_was_written(tmp_path):
    write_traces(tmp_path / "t.parquet", answers(LENGTHS))
    assert read_traces(tmp_path / "t.parquet") == answers(LENGTHS)


def test_batches_hold_every_trace_once_and_weigh_its_completion():
    batches = micro_batches(answers(LENGTHS), tokens_per_batch=256, smallest=64)
    assert [batch.tokens.shape for batch in batches] == [(4, 64), (2, 128), (1, 192)]
    seen = []
    for batch in batches:
        for tokens, valid, weight, length in zip(*map(np.asarray, batch), strict=True):
            if not length:
                assert not valid.any() and not weight.any()
                continue
            trace = next(a for a in answers(LENGTHS) if len(a.prompt) + len(a.completion) == length)
            seen.append(trace.problem_seed)
            assert tuple(tokens[valid]) == (*trace.prompt, *trace.completion)
            # The position before each completion token carries the loss of that token.
            expected = np.zeros(len(tokens))
            expected[len(trace.prompt) - 1 : length - 1] = 1 / len(trace.completion)
            np.testing.assert_allclose(weight, expected)
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_files_that_are_no_traces_are_refused(tmp_path):
    with pytest.raises(PuzzleError, match="cannot be read as a parquet file"):
        read_traces(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(PuzzleError, match="cannot be read as a parquet file"):
        read_traces(tmp_path / "text.parquet")
    write_traces(tmp_path / "empty.parquet", [])
    with pytest.raises(PuzzleError, match=r"has no column|holds no trace"):
        read_traces(tmp_path / "empty.parquet")
