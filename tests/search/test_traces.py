from pathlib import Path

import pytest

from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.traces import Trace
from puzzle_jax.search.traces import split_traces
from tests.support import small_config

CONFIG = small_config()
SHARES = {"calibration": 5, "validation": 2, "heldout": 3}


def trace(prompt, completion=(3, 4)):
    return Trace("external", "low", 0, {}, tuple(prompt), tuple(completion), None, False)


def test_prompts_stay_together_and_sets_have_their_shares():
    traces = [trace((n % 97, n // 97), (answer, 5)) for n in range(600) for answer in range(2)]
    found = split_traces(traces, SHARES, CONFIG, Path("t.jsonl"))
    assert sum(map(len, found.values())) == 1200
    prompts = {name: {t.prompt for t in of_set} for name, of_set in found.items()}
    assert sum(map(len, prompts.values())) == 600  # none is in two sets
    for name, share in SHARES.items():
        assert len(prompts[name]) == pytest.approx(597 * share / 10 + 1, abs=1)
    other = split_traces(traces, SHARES, CONFIG, Path("t.jsonl"), seed=1)
    assert {t.prompt for t in other["validation"]} != prompts["validation"]


@pytest.mark.parametrize(
    "bad,words",
    [
        (trace(()), "trace 1 has no prompt"),
        (trace((1,), ()), "trace 1 has no completion"),
        (trace((1, 97)), "trace 1 holds token 97, but the parent's tokens are 0 to 96"),
        (trace([1] * 5000), "trace 1: the prompt takes 5000 tokens and the answer up to 2, but the context"),
    ],
)
def test_traces_of_another_model_are_refused(bad, words):
    with pytest.raises(PuzzleError, match=words):
        split_traces([trace((1,)), bad], SHARES, CONFIG, Path("t.jsonl"))


def test_three_prompts_are_enough_for_three_sets_and_two_are_not():
    traces = [trace((n,)) for n in range(3)]
    assert [len(of_set) for of_set in split_traces(traces, SHARES, CONFIG, Path("t.jsonl")).values()] == [1, 1, 1]
    with pytest.raises(PuzzleError, match=r"t\.jsonl holds 2 different prompts, but a search splits .* at least 3"):
        split_traces(traces[:2], SHARES, CONFIG, Path("t.jsonl"))
