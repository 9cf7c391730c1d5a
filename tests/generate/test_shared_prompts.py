"""Requests with equal prompts: one prefill for all of them, and the answers that each would get alone."""

import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.generate import Engine, Request, Sampling, slots
from puzzle_jax.generate import engine as host
from tests.support import random_params, small_config

STOP, SLOTS, ROWS = 3, 5, 2
CONFIG = small_config((BlockConfig(7, 5), BlockConfig(4, None)))
PARAMS = random_params(CONFIG)
RNG = np.random.default_rng(0)
ONE_CHUNK, ONE_TOO, SHORT, TWO_CHUNKS, TWO_TOO = (tuple(RNG.integers(0, 97, n).tolist()) for n in (64, 30, 1, 65, 90))


@pytest.fixture
def make(monkeypatch):
    """Makes engines with fewer rows than slots, and chunks of 64."""
    monkeypatch.setattr(host, "PREFILL_TOKENS", 64 * ROWS)

    def of(stop):
        sampling = Sampling(temperature=0.9)
        return Engine(
            PARAMS, CONFIG, stop_ids=[stop], context=128, slots=SLOTS, sampling=sampling, log_probs=True, experts=True
        )

    return of


@pytest.fixture
def engine(make):
    made = make(STOP)
    assert (made.chunk, made.rows) == (64, ROWS)
    return made


@pytest.fixture
def prefills(monkeypatch):
    """Collects the tokens of every prefilled chunk."""
    seen = []

    def counted(params, config, group, tokens, *rest):
        seen.append(np.asarray(tokens))
        return prefill(params, config, group, tokens, *rest)

    prefill = slots.prefill
    monkeypatch.setattr(slots, "prefill", counted)
    return seen


def asked(prompt, count, limit=9, seed=0):
    return [Request(prompt, limit, seed=seed + i) for i in range(count)]


def assert_same(found, expected):
    assert found == expected  # tokens and log-probabilities are bit-identical
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.experts, other.experts)


CASES = {
    "more than slots": asked(TWO_CHUNKS, 12),
    "equal and distinct": [*asked(ONE_CHUNK, 4), *asked(SHORT, 1), *asked(TWO_TOO, 3), *asked(ONE_TOO, 1)],
    "apart from each other": [r for i in range(4) for p in (SHORT, TWO_CHUNKS, ONE_TOO) for r in asked(p, 1, seed=i)],
    "of different limits": [
        Request(prompt, limit, seed=7) for prompt in (ONE_TOO, TWO_CHUNKS, SHORT) for limit in (1, 23, 2, 14)
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_each_request_alone(engine, name):
    requests = CASES[name]
    together = engine.generate(requests)
    assert_same(together, [engine.generate([request])[0] for request in requests])
    assert_same(engine.generate(requests[::-1]), together[::-1])
    assert len({answer.tokens for answer in together}) > len(requests) / 2


def test_of_one_prompt_short_answers_begin_long_ones(engine):
    """The same seed draws the same tokens, whatever the limit is and wherever the prompt was copied to."""
    answers = engine.generate([Request(TWO_TOO, limit, seed=4) for limit in (3, 11, 7, 20, 1, 5, 30)])
    longest = max((answer.tokens for answer in answers), key=len)
    assert len(longest) > 3 and all(answer.tokens == longest[: len(answer.tokens)] for answer in answers)


@pytest.mark.parametrize("count", [4, 16], ids=["fewer than slots", "more than slots"])
def test_equal_prompts_are_prefilled_once(engine, prefills, count):
    engine.generate(asked(TWO_CHUNKS, count))
    assert len(prefills) == 2  # chunks
    np.testing.assert_array_equal(np.concatenate(prefills, axis=1)[:, :65], [TWO_CHUNKS] * ROWS)


def test_prompts_are_prefilled_in_full_groups_however_many_slots_are_free(engine, prefills):
    prompts = (ONE_TOO, TWO_CHUNKS, SHORT, ONE_CHUNK, TWO_TOO)
    engine.generate([request for seed in range(6) for p in prompts for request in asked(p, 1, seed=seed)])
    groups = [(TWO_CHUNKS, TWO_TOO), (ONE_TOO, SHORT), (ONE_CHUNK, ONE_CHUNK)]  # the last prompt fills up its group
    assert len(prefills) == 2 + 1 + 1
    firsts = [prefills[0], prefills[2], prefills[3]]
    for tokens, group in zip(firsts, groups, strict=True):
        for row, prompt in zip(tokens, group, strict=True):
            length = min(64, len(prompt))
            np.testing.assert_array_equal(row[:length], prompt[:length])


def test_a_prompt_that_was_run_waits_for_one_slot_only(make):
    """Seven requests on five slots: the sixth begins as soon as the first ends, while the others go on."""
    endless = make(CONFIG.vocab_size)  # a token that never comes
    requests = [Request(SHORT, limit) for limit in (30, 30, 30, 30, 2, 2, 2)]
    ended = [event.index for event in endless.stream(requests) if event.finished]
    assert set(ended[:3]) == {4, 5, 6}
