"""Packing of examples into rows, and batches as a function of seed and step."""

import jax
import numpy as np
import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.tasks import TASKS, is_held_out
from puzzle_jax.tasks.arithmetic import Chain
from puzzle_jax.tasks.chat.embedded import EMBEDDED, embedded_chat
from puzzle_jax.train.pretrain import data
from puzzle_jax.train.pretrain.data import BatchSource, Bucket, make_example
from puzzle_jax.train.pretrain.habits import Habits, written
from puzzle_jax.train.rows import Example, pack
from tests.support import present


@pytest.fixture(scope="module", params=EMBEDDED)
def chat(request):
    return embedded_chat(request.param)


def source(chat, buckets, seed=3, tasks=None, steps=10):
    tasks = tasks or tuple((task, 1.0) for task in TASKS.values())
    return BatchSource(chat, tasks, (("low", 1.0), ("high", 2.0)), buckets, seed, steps)


def test_packing_is_exact():
    first, second = Example((11, 12, 13, 14), prompt_length=2), Example((21, 22, 23), prompt_length=1)
    batch = pack([[first, second], [second]], length=9, pad_id=0)
    assert batch.tokens.tolist() == [[11, 12, 13, 14, 21, 22, 23, 0, 0], [21, 22, 23] + [0] * 6]
    assert batch.targets.tolist() == [[12, 13, 14, 0, 22, 23, 0, 0, 0], [22, 23] + [0] * 7]
    assert batch.weights.tolist() == [[0, 1, 1, 0, 1, 1, 0, 0, 0], [1, 1] + [0] * 7]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1] + [0] * 6]
    with pytest.raises(ValueError, match="row 0 holds at least 7 tokens, but has room for 6"):
        pack([[first, second]], length=6, pad_id=0)


def test_example_learns_exactly_the_completion(chat):
    task = TASKS["add"]
    seed = next(seed for seed in range(100) if not is_held_out(task.sample(seed)))
    problem = task.sample(seed)
    example = present(make_example(chat, task, seed, "high", Habits(), 80))
    assert list(example.tokens[: example.prompt_length]) == chat.prompt_tokens(problem.prompt, "high")
    completion = chat.parse(example.tokens[example.prompt_length :])
    assert (completion.analysis, completion.final) == written(task, problem, "high", Habits(), 80)
    held_out = next(seed for seed in range(100) if is_held_out(task.sample(seed)))
    assert make_example(chat, task, held_out, "high", Habits(), 80) is None


def test_an_example_without_an_end_fills_a_row(chat):
    task = TASKS["recall"]
    seed = next(seed for seed in range(100) if not is_held_out(task.sample(seed)))
    example = present(make_example(chat, task, seed, "high", Habits(endless=1.0), 700))
    assert len(example.tokens) == 700
    completion = chat.parse(example.tokens[example.prompt_length :])
    assert completion.truncated and completion.final == ""
    # It fills rows of other lengths, too; a row shorter than the prompt leaves the example to longer rows.
    assert len(present(make_example(chat, task, seed, "high", Habits(endless=1.0), 600)).tokens) == 600
    assert len(present(make_example(chat, task, seed, "high", Habits(endless=1.0), 16)).tokens) > 16


def test_batches_depend_on_seed_and_step_alone(chat):
    buckets = (Bucket(96, 3, 1.0), Bucket(160, 2, 1.0))
    one, other = source(chat, buckets), source(chat, buckets)
    for step in (7, 0, 7):
        jax.tree.map(np.testing.assert_array_equal, one.batch(step), other.batch(step))
    assert not np.array_equal(source(chat, buckets[:1], 4).batch(0).tokens, source(chat, buckets[:1]).batch(0).tokens)


def test_rows_are_well_filled_with_whole_examples(chat):
    batch = source(chat, (Bucket(128, 24, 1.0),)).batch(0)
    assert batch.tokens.shape == (24, 128)
    assert np.mean(batch.segment_ids > 0) > 0.85
    start = chat.prompt_tokens("?")[0]
    for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):
            text = tokens[segments == segment]
            assert text[0] == start and text[-1] in chat.stop_ids - {chat.pad_id}


def test_buckets_join_late_and_take_their_lengths(chat):
    long = Bucket(592, 1, 5.0, shortest=300, start=20)
    batches = source(chat, (Bucket(64, 2, 1.0), long), steps=40)
    lengths = [batches.bucket(step).length for step in range(40)]
    assert set(lengths[:20]) == {64}
    assert lengths[20:].count(592) > 10
    segments = batches.batch(lengths.index(592)).segment_ids[0]
    assert segments.max() == 1 and (segments == 1).sum() >= 300


def test_impossible_buckets_are_refused(chat, monkeypatch):
    monkeypatch.setattr(data, "_MOST_REFUSALS", 50)
    with pytest.raises(ConfigError, match=r"bucket of length 64: weight is 0\.0, but must be above 0"):
        Bucket(64, 2, 0.0)
    with pytest.raises(ConfigError, match="shortest is 65, but must be from 1 to 64"):
        Bucket(64, 2, 1.0, shortest=65)
    with pytest.raises(ConfigError, match="start is -1, but must be at least 0"):
        Bucket(64, 2, 1.0, start=-1)
    with pytest.raises(ConfigError, match="none has start 0"):
        source(chat, (Bucket(64, 2, 1.0, start=5),))
    only_short = source(chat, (Bucket(400, 1, 1.0, shortest=300),), tasks=((Chain(max_steps=2), 1.0),))
    with pytest.raises(ConfigError, match="no task gives examples of 300 to 400 tokens"):
        only_short.batch(0)
