"""Workloads, batches, and models taking turns; the engine is replaced where only the order of runs matters."""

import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.evaluate import throughput
from puzzle_jax.evaluate.throughput import (
    Spread,
    Workload,
    fixed_lengths,
    largest_batch,
    measure_throughput,
    own_lengths,
    timed_rounds,
)
from puzzle_jax.generate.engine import Engine, Request
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.cache_format import CacheFormat
from tests.support import random_params, small_config

CONFIG = small_config((BlockConfig(7, 5), BlockConfig(3, None)))


def test_the_batch_is_the_largest_whose_caches_fit():
    """2 x 3 x 10 values of 4 bytes per position; 5 positions in the windowed layer, 128 in the full one."""
    needed = (5 + 128) * 60 * 4
    options = {"cache": CacheFormat(), "compute": np.float32, "at_most": 9, "what": "here"}
    assert largest_batch(CONFIG, 100, cache_memory=3 * needed, **options) == 3
    assert largest_batch(CONFIG, 100, cache_memory=3 * needed - 1, **options) == 2
    assert largest_batch(CONFIG, 128, cache_memory=1000 * needed, **options) == 9
    with pytest.raises(ConfigError, match=r"here: one request of 128 tokens needs 31,920 bytes .* is 31,919"):
        largest_batch(CONFIG, 128, cache_memory=needed - 1, **options)


@pytest.mark.parametrize("context", [64, 100, 320])
def test_the_engine_stays_within_the_memory_that_its_batch_was_chosen_for(context):
    params = random_params(CONFIG, 0)
    memory = 400_000
    options = {"cache": CacheFormat(), "compute": np.float32, "at_most": 64, "what": ""}
    slots = largest_batch(CONFIG, context, cache_memory=memory, **options)
    engine = Engine(params, CONFIG, stop_ids=(), context=context, slots=slots)
    assert memory * slots / (slots + 1) < engine.cache_bytes() <= memory


def test_fixed_lengths_are_one_batch_of_equal_requests():
    work = fixed_lengths(97, slots=3, input_tokens=5, output_tokens=7)
    assert len(work.requests) == 3 and work.tokens == 21 and (work.slots, work.context) == (3, 12)
    assert {(len(r.prompt), r.max_tokens) for r in work.requests} == {(5, 7)}
    assert all(0 <= token < 97 for r in work.requests for token in r.prompt)
    assert len({r.prompt for r in work.requests}) == 3


def answer(length: int) -> Trace:
    return Trace("chain", "low", length, {}, (length,) * 3, (0,) * length, 1.0, False)


def test_own_lengths_stand_for_all_answers():
    answers = [answer(length) for length in range(1, 101)]
    work = own_lengths(answers, slots=5, count=10, context=120)
    assert sorted(r.max_tokens for r in work.requests) == [6, 16, 26, 36, 46, 56, 66, 76, 86, 96]
    assert [r.max_tokens for r in work.requests] != sorted(r.max_tokens for r in work.requests)
    assert all(r.prompt == (r.max_tokens,) * 3 for r in work.requests)
    few = own_lengths(answers[:2], slots=3, count=6, context=120)
    assert sorted(r.max_tokens for r in few.requests) == [1, 1, 1, 2, 2, 2]


def test_models_take_turns_and_the_order_moves_on(monkeypatch):
    ran = []

    def seconds(model, workload, clock):
        params, _ = model
        ran.append((params["name"], len(workload.requests)))
        return {"a": 2.0, "b": 1.0, "c": 0.5}[params["name"]]

    monkeypatch.setattr(throughput, "_seconds", seconds)
    work = Workload((Request((1,), 6), Request((1,), 2)), slots=1, context=9)
    names = ("a", "b", "c")
    seen = []
    rows = list(
        timed_rounds(
            {n: ({"name": n}, CONFIG) for n in names},
            dict.fromkeys(names, work),
            range(1, 4),
            on_run=lambda: seen.append(1),
        )
    )
    assert rows == [{"a": 4.0, "b": 8.0, "c": 16.0}] * 3
    # The first, uncounted runs are of one batch; rounds from 1 on, as in a resumed measurement, keep their order.
    assert ran[:3] == [("a", 1), ("b", 1), ("c", 1)]
    assert "".join(name for name, _ in ran[3:]) == "bcacababc"
    assert len(seen) == 12
    assert list(timed_rounds({}, {}, range(3, 3))) == []


def test_every_round_of_every_model_is_measured():
    params = random_params(CONFIG, 0)
    rounds = []
    results = measure_throughput(
        {"a": (params, CONFIG), "b": (params, CONFIG)},
        batch=3,
        input_tokens=20,
        output_tokens=6,
        rounds=2,
        on_round=lambda: rounds.append(1),
    )
    assert [r.rounds for r in results.values()] == [2, 2] and len(rounds) == 2
    assert all(0 < r.low <= r.median <= r.high for r in results.values())


def test_spreads_are_medians_and_quartiles():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 1.5, 4.5, 5)
