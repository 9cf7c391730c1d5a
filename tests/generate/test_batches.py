from dataclasses import replace

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
        rows = zip(*map(np.asarray, batch), strict=True)
        for tokens, valid, weight, length, number, of_task in rows:
            if not length:
                assert not valid.any() and not weight.any() and number == -1 and not of_task
                continue
            assert (len(answers(LENGTHS)[number].prompt), of_task) == (LENGTHS[number][0], 1.0)
            trace = next(a for a in answers(LENGTHS) if len(a.prompt) + len(a.completion) == length)
            seen.append(trace.problem_seed)
            assert tuple(tokens[valid]) == (*trace.prompt, *trace.completion)
            # The position before each completion token carries the loss of that token.
            expected = np.zeros(len(tokens))
            expected[len(trace.prompt) - 1 : length - 1] = 1 / len(trace.completion)
            np.testing.assert_allclose(weight, expected)
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_tasks_weigh_the_same_and_parts_of_a_set_have_the_shapes_of_the_whole():
    traces = [replace(t, task="add" if n == 3 else "chain") for n, t in enumerate(answers(LENGTHS))]
    batches = micro_batches(traces, tokens_per_batch=256, smallest=64)
    weights = {int(n): float(w) for b in batches for n, w in zip(b.ids, np.asarray(b.task_weight), strict=True)}
    assert weights.pop(-1, 0.0) == 0.0
    assert weights == {0: 0.625, 1: 0.625, 2: 0.625, 3: 2.5, 4: 0.625}  # each task sums to 2.5
    (short,) = micro_batches(traces[:1], tokens_per_batch=256, smallest=64, longest=180)
    assert short.tokens.shape == (4, 64)
    (long,) = micro_batches(traces[2:3], tokens_per_batch=512, smallest=256, longest=180)
    assert long.tokens.shape == (2, 192)
