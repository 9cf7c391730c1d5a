"""Trace files: what is written comes back, files from elsewhere are read in every form, and bad rows are named."""

import base64
import dataclasses
import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.traces import EXTERNAL, Trace, append_trace, open_to_append, read_traces, write_traces
from puzzle_jax.tasks.tokenizer import embedded_chat

LENGTHS = [(10, 4), (3, 1), (90, 30), (130, 50), (7, 9)]
FORMS = ("t.parquet", "t.jsonl")


@pytest.fixture(scope="module")
def chat():
    return embedded_chat()


def made(lengths, rich=False) -> list[Trace]:
    """Traces with the given numbers of prompt and completion tokens; rich ones carry the optional arrays."""
    rng = np.random.default_rng(0)
    traces = []
    for index, (prompt, completion) in enumerate(lengths):
        trace = Trace(
            "chain",
            "high",
            index,
            {"steps": index + 1},
            tuple(rng.integers(0, 97, prompt).tolist()),
            tuple(rng.integers(0, 97, completion).tolist()),
            reward=(1.0, 0.25, None)[index % 3],
            truncated=index % 3 == 0,
        )
        if rich and index % 2 == 0:
            kind = np.uint8 if index % 4 else np.uint16
            experts = rng.integers(0, 256, (prompt + completion - 1, 3, 2)).astype(kind)
            trace = dataclasses.replace(trace, log_probs=tuple(rng.normal(size=completion).tolist()), experts=experts)
        traces.append(trace)
    return traces


@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_a_trace_file_gives_back_what_was_written(tmp_path, name, rich):
    traces = made(LENGTHS, rich)
    write_traces(tmp_path / name, traces)
    back = read_traces(tmp_path / name)
    assert back == traces
    for ours, theirs in zip(traces, back, strict=True):
        if ours.experts is None:
            assert theirs.experts is None
        else:
            assert theirs.experts.dtype == ours.experts.dtype
            np.testing.assert_array_equal(theirs.experts, ours.experts)


def test_absent_arrays_make_no_columns(tmp_path):
    write_traces(tmp_path / "t.parquet", made(LENGTHS))
    assert pq.read_schema(tmp_path / "t.parquet").names == [
        "task", "effort", "seed", "details", "prompt", "completion", "reward", "truncated", "length",
    ]  # fmt: skip
    assert pq.read_table(tmp_path / "t.parquet")["length"].to_pylist() == [sum(pair) for pair in LENGTHS]


numbers = st.floats(max_value=0.0)
tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(tuple)


@given(
    prompt=tokens,
    drawn=st.lists(st.tuples(st.integers(0, 200_000), numbers), min_size=1, max_size=5),
    reward=st.none() | st.floats(0, 1),
    details=st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",))), st.integers(-(2**40), 2**40), max_size=3
    ),
)
def test_any_trace_survives_both_forms(tmp_path_factory, prompt, drawn, reward, details):
    completion, log_probs = (tuple(column) for column in zip(*drawn, strict=True))
    trace = Trace("x", "low", 3, details, prompt, completion, reward, False, log_probs)
    for name in FORMS:
        path = tmp_path_factory.mktemp("any") / name
        write_traces(path, [trace])
        assert read_traces(path) == [trace]


def test_an_answer_that_nobody_judged_is_neither_right_nor_wrong():
    right, part, unknown = made(LENGTHS[:3])
    assert (right.correct, part.correct, part.judged_reward) == (True, False, 0.25)
    with pytest.raises(
        PuzzleError, match="a trace of task 'chain' has no reward, so that it is neither right nor wrong"
    ):
        _ = unknown.correct


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_probs": (-1.0,)}, "log_probs has 1 numbers, but the completion has 2 tokens"),
        (
            {"experts": np.zeros((3, 2, 1), np.uint8)},
            r"experts has shape \(3, 2, 1\), but must be \[4 tokens, layers, k\]",
        ),
        ({"experts": np.zeros((4, 2), np.uint8)}, r"experts has shape \(4, 2\)"),
        ({"experts": np.zeros((4, 2, 1), np.int32)}, "experts has type int32, but must have type uint8 or uint16"),
    ],
)
def test_arrays_must_fit_the_tokens(changes, message):
    with pytest.raises(PuzzleError, match=message):
        Trace("x", "low", 0, {}, (1, 2, 3), (4, 5), 1.0, False, **changes)


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_tokens_from_elsewhere_need_only_prompt_and_completion(tmp_path, chat):
    expected = Trace(EXTERNAL, "medium", 0, {}, (5, 6), (7, 8), None, False)
    assert read_traces(write_lines(tmp_path / "a.jsonl", [{"prompt": [5, 6], "completion": [7, 8]}])) == [expected]
    pq.write_table(pa.table({"prompt": [[5, 6]], "completion": [[7, 8]]}), tmp_path / "a.parquet")
    assert read_traces(tmp_path / "a.parquet") == [expected]
    # With a chat it is known whether the completion came to its end.
    stop = min(chat.stop_ids)
    path = write_lines(
        tmp_path / "b.jsonl", [{"prompt": [5], "completion": [7, 8]}, {"prompt": [5], "completion": [7, stop]}]
    )
    assert [trace.truncated for trace in read_traces(path, chat)] == [True, False]


def text(chat, trace) -> tuple[str, str]:
    return chat.decode(trace.prompt), chat.decode(trace.completion)


START_HIGH = "<|start|>system<|message|>Reasoning: high<|end|>"
PROMPT = START_HIGH + "<|start|>user<|message|>7+5?<|end|><|start|>assistant"
ANSWER = "<|channel|>analysis<|message|>7+5=12<|end|><|start|>assistant<|channel|>final<|message|>12<|return|>"
CUT = "<|channel|>analysis<|message|>7+5"
USER = {"role": "user", "content": "7+5?"}


@pytest.mark.parametrize(
    ("row", "completion"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "12", "thinking": "7+5=12"}], "effort": "high"}, ANSWER),
        (
            {
                "messages": [USER, {"role": "assistant", "content": "12", "reasoning_content": "7+5=12"}],
                "reasoning_effort": "high",
            },
            ANSWER,
        ),
        ({"prompt": "7+5?", "completion": "12", "reasoning": "7+5=12", "effort": "high"}, ANSWER),
        ({"prompt": [USER], "response": "12", "thinking": "7+5=12", "effort": "high"}, ANSWER),
        ({"prompt": "7+5?", "response": "12", "effort": "high"}, "<|channel|>final<|message|>12<|return|>"),
        (
            {
                "messages": [USER],
                "choices": [{"message": {"content": "12", "reasoning": "7+5=12"}, "finish_reason": "stop"}],
                "reasoning_effort": "high",
            },
            ANSWER,
        ),
        (
            {
                "prompt": "7+5?",
                "response": {
                    "choices": [{"message": {"content": None, "reasoning": "7+5"}, "finish_reason": "length"}]
                },
                "effort": "high",
            },
            CUT,
        ),
        ({"prompt": "7+5?", "completion": "", "thinking": "7+5", "truncated": True, "effort": "high"}, CUT),
    ],
)
def test_text_of_any_server_becomes_tokens(tmp_path, chat, row, completion):
    (trace,) = read_traces(write_lines(tmp_path / "a.jsonl", [row]), chat)
    assert text(chat, trace) == (PROMPT, completion)
    assert (trace.task, trace.effort, trace.problem_seed, trace.details, trace.reward) == (
        EXTERNAL,
        "high",
        0,
        {},
        None,
    )
    assert trace.truncated == (completion == CUT) == chat.parse(trace.completion).truncated
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert read_traces(tmp_path / "a.parquet", chat) == [trace]


def test_every_choice_of_a_response_is_a_trace(tmp_path, chat):
    choices = [{"message": {"content": answer}} for answer in ("12", "11")]
    row = {"messages": [USER], "choices": choices, "task": "mine", "seed": 4, "details": {"digits": 1}, "reward": 0.5}
    first, second = read_traces(write_lines(tmp_path / "a.jsonl", [row]), chat)
    assert text(chat, first)[1] == "<|channel|>final<|message|>12<|return|>"
    assert text(chat, second)[1] == "<|channel|>final<|message|>11<|return|>"
    assert (second.task, second.problem_seed, second.details, second.reward) == ("mine", 4, {"digits": 1}, 0.5)


def test_earlier_answers_stay_in_the_prompt_without_their_thinking(tmp_path, chat):
    earlier = [USER, {"role": "assistant", "content": "12", "thinking": "long"}, {"role": "user", "content": "sure?"}]
    row = {"messages": [*earlier, {"role": "assistant", "content": "yes"}]}
    (trace,) = read_traces(write_lines(tmp_path / "a.jsonl", [row]), chat)
    assert trace.prompt == tuple(chat.prompt_tokens(earlier))
    assert "long" not in chat.decode(trace.prompt) and "final<|message|>12<|end|>" in chat.decode(trace.prompt)


BARE = {"prompt": [1], "completion": [2]}
EMPTY_ARRAY = base64.b64encode(b"no array").decode()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "is no valid JSON"),
        ("[]", "holds a list, but must hold an object"),
        ({"completion": [1]}, "the row has no field prompt, which every trace must have"),
        ({"prompt": [1]}, "the row has no field completion"),
        ({"prompt": [], "completion": [1]}, "prompt must be a list of at least one token id"),
        ({"prompt": [1], "completion": [-1]}, "completion must be a list of at least one token id"),
        ({"prompt": [True], "completion": [1]}, "prompt must be a list"),
        ({**BARE, "effort": "max"}, "effort is 'max', but must be one of low, medium, high"),
        ({**BARE, "effort": 1}, "effort is 1, but must be a text"),
        ({**BARE, "seed": True}, "seed is True, but must be a whole number"),
        ({**BARE, "truncated": 1}, "truncated is 1, but must be true or false"),
        ({**BARE, "reward": 2}, "reward is 2, but must be a number from 0 to 1"),
        ({**BARE, "reward": "1"}, "reward is '1', but must be a number"),
        ({**BARE, "details": {"a": "b"}}, "but must hold whole numbers by name"),
        ({**BARE, "details": "{"}, "details is no valid JSON"),
        ({**BARE, "log_probs": ["a"]}, "log_probs must be a list of numbers"),
        ({**BARE, "log_probs": [-1, -2]}, "log_probs has 2 numbers, but the completion has 1 tokens"),
        ({**BARE, "experts": EMPTY_ARRAY}, r"experts is no array in the form of \.npy files"),
        ({**BARE, "experts": 3}, r"experts is no array in the form of \.npy files"),
        ({"messages": "hi", "completion": "a"}, "messages is 'hi', but must be a list of messages"),
        ({"prompt": 3, "completion": "a"}, "prompt is 3, but must be a text or a list of messages"),
        ({"messages": [USER]}, "the row has no answer"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the conversation has no message"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "the answer's content is 3, but must be a text"),
        ({"prompt": "a", "completion": "b", "thinking": 3}, "the answer's reasoning is 3, but must be a text"),
        ({"prompt": "a", "completion": "", "truncated": True}, "cut short before its first token"),
        ({"prompt": "a", "choices": [{}]}, "choices holds {}, but must hold objects with a message"),
    ],
)
def test_bad_rows_are_named(tmp_path, chat, row, message):
    path = write_lines(tmp_path / "a.jsonl", [BARE, row])
    with pytest.raises(PuzzleError, match=rf"a\.jsonl, line 2:? .*{message}"):
        read_traces(path, chat)


def test_bad_rows_of_parquet_are_named(tmp_path):
    pq.write_table(
        pa.table({"prompt": [[5], [6]], "completion": [[7], [8]], "reward": [1.0, -1.0]}), tmp_path / "a.parquet"
    )
    with pytest.raises(PuzzleError, match=r"a\.parquet, row 2: reward is -1\.0"):
        read_traces(tmp_path / "a.parquet")


def test_text_needs_a_chat(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "7+5?", "completion": "12"}])
    with pytest.raises(PuzzleError, match=r"a\.jsonl, line 1: the row is text, which needs a chat to become tokens"):
        read_traces(path)


def test_files_that_are_no_traces_are_refused(tmp_path):
    for name, form in (("none.parquet", "parquet"), ("none.jsonl", "JSONL")):
        with pytest.raises(PuzzleError, match=f"{name} cannot be read as a {form} file of traces"):
            read_traces(tmp_path / name)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(PuzzleError, match="cannot be read as a parquet file of traces"):
        read_traces(tmp_path / "text.parquet")
    for name in FORMS:
        write_traces(tmp_path / name, [])
        with pytest.raises(PuzzleError, match=f"{name} holds no trace"):
            read_traces(tmp_path / name)


def test_no_array_may_hold_objects(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object))
    path = write_lines(tmp_path / "a.jsonl", [{**BARE, "experts": base64.b64encode(buffer.getvalue()).decode()}])
    with pytest.raises(PuzzleError, match="experts is no array"):
        read_traces(path)


def test_a_killed_run_goes_on_after_its_last_whole_line(tmp_path):
    traces, path = made(LENGTHS, rich=True), tmp_path / "t.jsonl"
    with open_to_append(path) as file:
        assert read_traces(path, torn_tail=True) == []
        for trace in traces[:3]:
            append_trace(file, trace)
            assert path.read_bytes().endswith(b"\n") and read_traces(path)[-1] == trace
    whole = path.read_bytes()
    for torn in range(len(whole) - 40, len(whole)):
        path.write_bytes(whole[:torn])
        assert read_traces(path, torn_tail=True) == traces[:2]
    with pytest.raises(PuzzleError, match=r"t\.jsonl, line 3 is no valid JSON"):
        path.write_bytes(whole[:-40])
        read_traces(path)
    with open_to_append(path) as file:
        append_trace(file, traces[3])
    assert read_traces(path) == [*traces[:2], traces[3]]
    path.write_bytes(b"{\n" + whole)
    with pytest.raises(PuzzleError, match="line 1 is no valid JSON"):
        read_traces(path, torn_tail=True)


def test_impossible_log_probabilities_survive(tmp_path):
    trace = Trace("x", "low", 0, {}, (1,), (2,), None, False, (-math.inf,))
    for name in FORMS:
        write_traces(tmp_path / name, [trace])
        assert read_traces(tmp_path / name) == [trace]
