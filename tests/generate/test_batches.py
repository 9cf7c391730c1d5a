import numpy as np

from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.traces import Trace


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
