"""Weights of the tokens with which thinking ends, and scores in which tokens count differently."""

from dataclasses import replace

import numpy as np
import pytest

from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.generate.batches import alike
from puzzle_jax.generate.traces import Trace
from puzzle_jax.search.recipe import ScoreSettings
from puzzle_jax.search.score.ending import ending_weights
from puzzle_jax.search.score.measurements import Fill, ScoreTable
from puzzle_jax.search.score.replace_one import Alternative, ReplaceOne
from puzzle_jax.search.traces import ended
from puzzle_jax.tasks.chat.embedded import embedded_chat
from tests.support import present
from tests.tasks.chat.qwen import THINKING, write_chat

CHAT = embedded_chat()


def trace(completion, truncated=False):
    return Trace("t", "low", 0, {}, (3, 4), tuple(completion), 1.0, truncated)


def test_the_last_tokens_of_the_analysis_the_turn_and_the_stop_token_count_more():
    completion = CHAT.completion_tokens("12+34=46", "46")
    texts = [CHAT.decode([token]) for token in completion]
    end, opened = texts.index("<|end|>"), len(texts) - 1 - texts[::-1].index("<|message|>")
    assert CHAT.turn_to_final(completion) == (end, opened) and "".join(texts[opened + 1 :]) == "46<|return|>"
    weights = ending_weights(CHAT, 5, 3)(trace(completion))
    expected = np.ones(len(completion), int)
    expected[end - 3 : opened + 1] = 5
    expected[-1] = 5
    assert "".join(texts[end - 3 : end]) == "=46"
    np.testing.assert_array_equal(weights, expected)


@pytest.mark.parametrize("analysis,cut", [("", False), ("12+34=4", True)])
def test_without_a_turn_only_a_stop_token_counts_more(analysis, cut):
    completion = CHAT.completion_tokens(analysis, "" if cut else "46", cut=cut)
    assert CHAT.turn_to_final(completion) is None
    expected = np.ones(len(completion), int)
    if not cut:
        expected[-1] = 7
    np.testing.assert_array_equal(ending_weights(CHAT, 7, 2)(trace(completion, cut)), expected)


def test_in_chatml_the_turn_is_the_end_of_the_thinking(tmp_path):
    chat = write_chat(tmp_path, THINKING)
    prompt = chat.prompt_tokens("12+34?", "high")
    completion = chat.completion_tokens("12+34=46", "46", prompt)
    answered = replace(trace(completion), prompt=tuple(prompt))
    texts = [chat.decode([token]) for token in completion]
    expected = np.ones(len(completion), int)
    expected[len(texts) - 5 - 3 : len(texts) - 3] = 5
    expected[-1] = 5
    assert "".join(texts[-8:-3]) == "46\n</think>\n\n"
    np.testing.assert_array_equal(ending_weights(chat, 5, 3)(answered), expected)
    cut = replace(answered, completion=tuple(chat.encode("12+34")), truncated=True)
    np.testing.assert_array_equal(ending_weights(chat, 5, 3)(cut), np.ones(5, int))


def test_a_short_analysis_ends_with_all_of_its_tokens():
    completion = CHAT.completion_tokens("1", "2")
    weights = ending_weights(CHAT, 3, 50)(trace(completion))
    after = present(CHAT.turn_to_final(completion))[1]
    assert weights.tolist() == [3] * (after + 1) + [1] * (len(completion) - after - 2) + [3]


def test_a_weight_of_one_is_no_weight_at_all():
    assert ending_weights(CHAT, 1, 8) is alike
    for settings in ({"ending_weight": 0}, {"ending_weight": 1001}, {"ending_tokens": -1}):
        with pytest.raises(ConfigError, match=r"score\.ending_"):
            ScoreSettings(**settings)  # pyright: ignore[reportArgumentType]


def test_scores_are_linear_in_the_weights(small_parent):
    """Sums over tokens with weights a and b add up to those with weights a + b; means are over the weights."""
    config, params, traces = small_parent

    def late(trace):
        return np.where(np.arange(len(trace.completion)) >= len(trace.completion) - 2, 4, 1)

    alternatives = [(0, Alternative(np.arange(7) < 5, config.blocks[0].window))]
    tables = {}
    for name, weigh in (("alike", alike), ("late", late), ("both", lambda trace: alike(trace) + late(trace))):
        tables[name] = ScoreTable.empty(alternatives, traces, weigh)
        Fill(tables[name], ReplaceOne(params, config, per_call=2), [0], range(4), tokens_per_batch=128)()
    sums = {name: table.values[0, :, 0] * table.tokens for name, table in tables.items()}
    np.testing.assert_allclose(sums["both"], sums["alike"] + sums["late"], rtol=1e-4)
    assert np.abs(sums["late"] / tables["late"].tokens - sums["alike"] / tables["alike"].tokens).max() > 1e-3
    assert tables["late"].tokens.tolist() == [7 + 6, 3 + 6, 12 + 6, 30 + 6]
    assert tables["late"].means()[0] == pytest.approx(sums["late"].sum() / (52 + 24))
    score = tables["late"].score(0)
    assert score.kl_by_context["up to 64"] == pytest.approx(score.kl, rel=1e-5)
    assert tables["late"].key("parent") != tables["alike"].key("parent")


def test_only_answers_that_ended_decide():
    one, other = trace((5, 6)), trace((7, 8), truncated=True)
    assert ended([one, other, replace(one, problem_seed=3)], "calibration") == [one, replace(one, problem_seed=3)]
    with pytest.raises(PuzzleError, match="none of the 1 validation traces ended by itself; allow longer answers"):
        ended([other], "validation")
