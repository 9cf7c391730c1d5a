from pathlib import Path

import pytest

from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.traces import Trace
from puzzle_jax.search.deal import deal_traces
from tests.support import small_config

CONFIG = small_config()
SHARES = {"calibration": 5, "validation": 2, "heldout": 3}


def trace(prompt, completion=(3, 4)):
    return Trace("external", "low", 0, {}, tuple(prompt), tuple(completion), None, False)


def test_prompts_stay_together_and_sets_have_their_shares():
    traces = [trace((n % 97, n // 97), (answer, 5)) for n in range(600) for answer in range(2)]
    dealt = deal_traces(traces, SHARES, CONFIG, Path("t.jsonl"))
    assert sum(map(len, dealt.values())) == 1200
    prompts = {name: {t.prompt for t in of_set} for name, of_set in dealt.items()}
    assert sum(map(len, prompts.values())) == 600  # none is in two sets
    for name, share in SHARES.items():
        assert len(prompts[name]) / 600 == pytest.approx(share / 10, abs=0.06)
    other = deal_traces(traces, SHARES, CONFIG, Path("t.jsonl"), seed=1)
    assert {t.prompt for t in other["validation"]} != prompts["validation"]


@pytest.mark.parametrize(
    "bad,words",
    [
        (trace(()), "trace 1 has no prompt"),
        (trace((1,), ()), "trace 1 has no completion"),
        (trace((1, 97)), "trace 1 holds token 97, but the parent's tokens are 0 to 96"),
        (trace([1] * 5000), "trace 1 has 5002 tokens, but the parent's context is"),
    ],
)
def test_traces_of_another_model_are_refused(bad, words):
    with pytest.raises(PuzzleError, match=words):
        deal_traces([trace((1,)), bad], SHARES, CONFIG, Path("t.jsonl"))


def test_an_empty_set_is_refused():
    with pytest.raises(PuzzleError, match="holds 1 different prompts, of which none falls to"):
        deal_traces([trace((1,))], SHARES, CONFIG, Path("t.jsonl"))
