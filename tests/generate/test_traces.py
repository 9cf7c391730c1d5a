"""Trace files: traces survive the round trip, files from elsewhere are read in every form, and bad rows are named."""

import base64
import dataclasses
import datetime
import io
import json
import math
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_jax.errors import PuzzleError, PuzzleWarning
from puzzle_jax.generate.traces import EXTERNAL, Trace, append_trace, open_to_append, read_traces, write_traces
from puzzle_jax.tasks.chat.embedded import embedded_chat
from tests.support import present
from tests.tasks.chat.qwen import HYBRID, INSTRUCT, THINKING, write_chat

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
            trace = dataclasses.replace(
                trace, log_probs=tuple((-abs(rng.normal(size=completion))).tolist()), experts=experts
            )
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
            assert theirs.experts is not None
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
    assert (right.correct, part.correct, part.known_reward) == (True, False, 0.25)
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
    """Writes rows given as bytes, as text, or as values that JSON can represent."""
    lines = [row if isinstance(row, bytes | str) else json.dumps(row) for row in rows]
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def test_tokens_from_elsewhere_need_only_prompt_and_completion(tmp_path, chat):
    expected = Trace(EXTERNAL, "medium", 0, {}, (5, 6), (7, 8), None, False)
    assert read_traces(write_lines(tmp_path / "a.jsonl", [{"prompt": [5, 6], "completion": [7, 8]}])) == [expected]
    pq.write_table(pa.table({"prompt": [[5, 6]], "completion": [[7, 8]]}), tmp_path / "a.parquet")
    assert read_traces(tmp_path / "a.parquet") == [expected]
    # With a chat format, it is known whether the completion reached its end.
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


THOUGHT = "<think>\n7+5=12\n</think>\n\n12<|im_end|>"


@pytest.mark.parametrize(
    ("template", "row", "completion"),
    [
        (HYBRID, {"completion": "12", "reasoning_content": "7+5=12"}, THOUGHT),
        (HYBRID, {"completion": "<think>\n7+5=12\n</think>\n\n12"}, THOUGHT),
        (HYBRID, {"completion": "12"}, "<think>\n\n</think>\n\n12<|im_end|>"),
        (HYBRID, {"completion": "12", "effort": "low"}, "12<|im_end|>"),
        (HYBRID, {"completion": "<think>\n\n</think>\n\n12", "effort": "low"}, "12<|im_end|>"),
        (HYBRID, {"completion": "<think>7+5", "finish_reason": "length"}, "<think>\n7+5"),
        (THINKING, {"completion": "12", "reasoning": "7+5=12"}, THOUGHT.removeprefix("<think>\n")),
        (THINKING, {"completion": "7+5=12\n</think>\n\n12"}, THOUGHT.removeprefix("<think>\n")),
        (THINKING, {"completion": "7+5", "truncated": True}, "7+5"),
        (INSTRUCT, {"completion": "12", "effort": "high"}, "12<|im_end|>"),
    ],
)
def test_text_becomes_tokens_in_chatml(tmp_path, template, row, completion):
    chat = write_chat(tmp_path, template)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Thinking within an answer's text is no control token that is written out.
        (trace,) = read_traces(write_lines(tmp_path / "a.jsonl", [{"prompt": [USER], **row}]), chat)
    assert trace.prompt == tuple(chat.prompt_tokens("7+5?", row.get("effort", "medium")))
    assert chat.decode(trace.completion) == completion
    assert trace.truncated == (not completion.endswith("<|im_end|>"))


def test_what_chatml_cannot_hold_is_named_and_what_is_no_thinking_is_text(tmp_path):
    chat = write_chat(tmp_path, HYBRID)
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}, USER]
    rows = [
        {"prompt": history, "completion": "12", "reasoning": "x"},
        {"prompt": "<think>", "completion": "<|im_end|>"},
    ]
    with pytest.warns(PuzzleWarning, match=r"line 2: a control token such as <\|im_end\|> .* \(1 of the file's 2"):
        first, second = read_traces(write_lines(tmp_path / "a.jsonl", rows), chat)
    assert first.prompt == tuple(chat.prompt_tokens(history))
    assert chat.parse(second.completion, second.prompt).final == "<|im_end|>"
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "12", "reasoning": "x", "effort": "low"}])
    with pytest.raises(PuzzleError, match=r"line 1: the answer has thinking, but the chat template .* at low effort"):
        read_traces(path, chat)


BARE = {"prompt": [1], "completion": [2]}
EMPTY_ARRAY = base64.b64encode(b"no array").decode()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds list, but must hold an object"),
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
        ({**BARE, "details": {"a": "b"}}, "but must hold whole numbers of at most 64 bits by name"),
        ({**BARE, "details": "{"}, "details cannot be read as JSON"),
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
        ({"prompt": "a", "choices": []}, "choices is an empty list"),
        ({"prompt": [1, 2**31], "completion": [1]}, "prompt must be a list .* but number 2 is 2147483648"),
        ({"prompt": [1], "completion": [10**1000]}, "completion must be a list .* but number 1 is 1000"),
        ({"prompt": [1], "completion": [2.0]}, r"completion must be a list .* but number 1 is 2\.0"),
        ('{"prompt": [1], "completion": [1' + "0" * 5000 + "]}", "holds a whole number of thousands of digits"),
        ({**BARE, "seed": 2**63}, "seed is 9223372036854775808, but must be a whole number of at most 64 bits"),
        ({**BARE, "seed": 1.0}, r"seed is 1\.0, but must be a whole number"),
        ({**BARE, "details": "[" * 100_000}, "details is nested too deeply to be read as JSON"),
        ('{"prompt": [1], "completion": [1], "details": ' + "[" * 100_000 + "}", "nested too deeply"),
        ({**BARE, "details": {"a": 10**100}}, "but must hold whole numbers of at most 64 bits by name"),
        ({**BARE, "details": {"a": True}}, "but must hold whole numbers of at most 64 bits by name"),
        ({**BARE, "log_probs": [10**400]}, "log_probs must be a list of numbers.* but number 1 is 1000"),
        ({**BARE, "log_probs": [-(10**400)]}, "log_probs must be a list of numbers.* but number 1 is -1000"),
        ({**BARE, "log_probs": [math.nan]}, "log_probs must be a list of numbers.* but number 1 is nan"),
        ({**BARE, "log_probs": [math.inf]}, "log_probs must be a list of numbers.* but number 1 is inf"),
        ({**BARE, "log_probs": [0.5]}, r"so at most 0, but number 1 is 0\.5"),
        ({**BARE, "log_probs": [True]}, "log_probs must be a list of numbers.* but number 1 is True"),
        ({**BARE, "log_probs": "a"}, "log_probs must be a list of numbers.* but is 'a'"),
        ({**BARE, "reward": math.nan}, "reward is nan, but must be a number from 0 to 1"),
        ({**BARE, "reward": True}, "reward is True, but must be a number from 0 to 1"),
        ({**BARE, "reward": 10**400}, "reward is 1000"),
        ('{"prompt": "2+3", "completion": "5 \\ud83d"}', "holds half a surrogate pair"),
        (b'{"prompt": "2+3", "completion": "\xe9"}', "is not valid UTF-8"),
        ({"prompt": "a", "completion": {"choices": 3}}, "choices holds 3, but must hold objects with a message"),
        ({"prompt": [{"role": "user"}], "completion": "a"}, "message 1: content is None, but must be a text"),
        ({"messages": [{"role": 3, "content": "x" * 9999}], "response": "a"}, "message 1: role is 3"),
        ({"prompt": {"deep": [[[[[["x" * 9999]]]]]]}, "completion": "a"}, r"prompt is {'deep': .{,100}, but must be"),
    ],
)
def test_bad_rows_are_named(tmp_path, chat, row, message):
    path = write_lines(tmp_path / "a.jsonl", [BARE, row])
    with pytest.raises(PuzzleError, match=rf"a\.jsonl, line 2:? .*{message}") as caught:
        read_traces(path, chat)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


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
    with pytest.raises(PuzzleError, match="experts has type object, but must have type uint8 or uint16"):
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
    with pytest.raises(PuzzleError, match=r"t\.jsonl, line 3 cannot be read as JSON"):
        path.write_bytes(whole[:-40])
        read_traces(path)
    with open_to_append(path) as file:
        append_trace(file, traces[3])
    assert read_traces(path) == [*traces[:2], traces[3]]
    path.write_bytes(b"{\n" + whole)
    with pytest.raises(PuzzleError, match="line 1 cannot be read as JSON"):
        read_traces(path, torn_tail=True)


def test_impossible_log_probabilities_survive(tmp_path):
    trace = Trace("x", "low", 0, {}, (1,), (2,), None, False, (-math.inf,))
    for name in FORMS:
        write_traces(tmp_path / name, [trace])
        assert read_traces(tmp_path / name) == [trace]


def npy(shape, data, descr="|u1", version=1):
    """The bytes `data` under the header of a .npy file of this shape, whether they match or not."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


def as_row(data):
    return {**BARE, "experts": base64.b64encode(data).decode()}


def zipped():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zipped(), "experts is no array in the form of .npy files"),
        (npy((1,), b"")[:-5], "experts is no array in the form of .npy files"),
        (b"\x93NUMPY\x09\x00", "experts is no array in the form of .npy files"),
        (npy("(" * 5000, b""), "experts is no array in the form of .npy files"),
        (npy("x", b""), "experts is no array in the form of .npy files"),
        (npy((10**12, 1, 1), b""), "says that it has shape (1000000000000, 1, 1), but 0 bytes of it are there"),
        (npy((10**30, 10**30, 1), b"ab"), "but 2 bytes of it are there"),
        (npy((-1, -1, 1), b"a"), "says that it has shape (-1, -1, 1), but 1 bytes of it are there"),
        (npy((1, 1, 1), b"abc"), "says that it has shape (1, 1, 1), but 3 bytes of it are there"),
        (npy((1, 1, 1), bytes(8), "<f8"), "experts has type float64, but must have type uint8 or uint16"),
        (npy((1, 1), b"a"), "experts has shape (1, 1), but must be [1 tokens, layers, k]"),
        (npy((2, 1, 1), b"ab"), "experts has shape (2, 1, 1), but must be [1 tokens, layers, k]"),
    ],
)
def test_what_an_array_says_of_itself_is_checked_before_it_is_made(tmp_path, data, message):
    row = {**as_row(data), "prompt": [1], "completion": [1]}
    with pytest.raises(PuzzleError) as caught:
        read_traces(write_lines(tmp_path / "a.jsonl", [row]))
    assert message in str(caught.value) and "a.jsonl, line 1: experts" in str(caught.value)


def test_arrays_of_any_order_and_version_are_read(tmp_path):
    array = np.arange(6, dtype=np.uint16).reshape(1, 2, 3)
    rows = [as_row(npy((1, 2, 3), array.tobytes(), "<u2", version)) for version in (1, 2)]
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(array.astype(">u2")))
    for trace in read_traces(write_lines(tmp_path / "a.jsonl", [*rows, as_row(buffer.getvalue())])):
        np.testing.assert_array_equal(trace.experts, array)
        assert present(trace.experts).dtype == np.uint16


def write_parquet(path, table, **options):
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return path


LIST = [[1]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"prompt": [1.5], "completion": LIST}, "row 1: prompt must be a list of at least one token id, but is 1.5"),
        ({"prompt": [[1.0]], "completion": LIST}, "row 1: prompt must be a list .* but number 1 is 1.0"),
        ({"prompt": [[1, None]], "completion": LIST}, "row 1: prompt must be a list .* but number 2 is None"),
        ({"prompt": [None], "completion": LIST}, "row 1: the row has no field prompt"),
        ({"prompt": LIST, "completion": [{"a": 1}]}, "row 1: prompt is .1., but must be"),
        (
            {"prompt": LIST, "completion": LIST, "details": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))},
            "row 1: details is ",
        ),
        ({"prompt": LIST, "completion": LIST, "details": ["["]}, "row 1: details cannot be read as JSON"),
        ({"prompt": LIST, "completion": LIST, "task": [b"a"]}, "row 1: task is b'a', but must be a text"),
        ({"prompt": LIST, "completion": LIST, "reward": [True]}, "row 1: reward is True"),
        ({"prompt": LIST, "completion": LIST, "experts": [b"zip"]}, "row 1: experts is no array"),
        ({"prompt": LIST, "completion": LIST, "experts": ["zip"]}, "row 1: experts is no array"),
        ({"prompt": LIST, "completion": LIST, "seed": [datetime.datetime(2026, 3, 4)]}, "row 1: seed is datetime"),
        ({"prompt": LIST, "completion": LIST, "log_probs": [[math.nan]]}, "row 1: log_probs must be"),
        ({"question": ["a"], "answer": ["b"]}, r"has the columns \['question', 'answer'\], but none of"),
        (pa.table([[1], [[1]]], names=["prompt", "prompt"]), "has two columns prompt"),
        (
            pa.table({"prompt": LIST * 2, "completion": LIST * 2, "task": pa.array([b"a", b"\xff"]).view(pa.utf8())}),
            "row 2: task cannot be read: .*utf-8",
        ),
    ],
)
def test_odd_columns_of_parquet_are_named(tmp_path, chat, table, message):
    with pytest.raises(PuzzleError, match=rf"a\.parquet,? {message}") as caught:
        read_traces(write_parquet(tmp_path / "a.parquet", table), chat)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_columns_of_no_concern_may_hold_anything(tmp_path):
    table = {"prompt": LIST, "completion": LIST, "image": [b"\xff" * 100], "when": [datetime.timedelta(days=1)]}
    (trace,) = read_traces(write_parquet(tmp_path / "a.parquet", table))
    assert (trace.prompt, trace.completion) == ((1,), (1,))


def test_no_damage_of_a_parquet_file_is_a_traceback(tmp_path):
    path = tmp_path / "a.parquet"
    write_traces(path, made(LENGTHS, rich=True))
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    damaged = [whole[: int(size)] for size in rng.integers(0, len(whole), 20)]
    for _ in range(150):
        data = bytearray(whole)
        # Half of the damage goes to the footer at the end of the file.
        first = 4 if rng.random() < 0.5 else len(whole) - 2500
        for at in rng.integers(first, len(whole), int(rng.integers(1, 4))):
            data[at] = int(rng.integers(0, 256))
        damaged.append(bytes(data))
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            read_traces(path)
        except PuzzleError as error:
            refused += 1
            assert "a.parquet" in str(error) and "\n" not in str(error)
    assert refused > 60


def test_more_values_than_a_file_can_need_are_not_unpacked(tmp_path):
    long = np.zeros(30_000_000, np.int8)
    offsets = pa.array([0, len(long)], pa.int32())
    table = pa.table({"prompt": pa.ListArray.from_arrays(offsets, pa.array(long)), "completion": LIST})
    path = write_parquet(tmp_path / "a.parquet", table)
    assert path.stat().st_size < 100_000
    with pytest.raises(PuzzleError, match=r"a\.parquet holds 3000000\d values .* which no file of traces can need"):
        read_traces(path)


def test_files_of_editors_on_windows_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": [1], "completion": [2]}\r\n' * 2 + b"\r\n")
    assert [trace.completion for trace in read_traces(path)] == [(2,), (2,)]


def test_the_end_of_a_long_torn_line_is_found(tmp_path):
    path = tmp_path / "a.jsonl"
    for torn in (0, 1, (1 << 20) - 1, 1 << 20, 3 << 20):
        path.write_bytes(b"{}\n{}\n" + b"x" * torn)
        open_to_append(path).close()
        assert path.read_bytes() == b"{}\n{}\n"
    path.write_bytes(b"x" * (2 << 20))
    open_to_append(path).close()
    assert path.read_bytes() == b""


def test_control_tokens_in_texts_stay_text_and_are_told_once(tmp_path, chat):
    speaking = {"prompt": "How does a turn end?", "completion": "With <|return|> at its end.", "reasoning": "<|end|>?"}
    rows = [{"prompt": "7+5", "completion": "12"}, speaking, {"prompt": "<|start|>", "completion": "a"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.warns(PuzzleWarning) as told:
        traces = read_traces(path, chat)
    (warning,) = told
    assert "a.jsonl, line 2: a control token" in str(warning.message)
    assert "(2 of the file's 3 traces" in str(warning.message)
    for trace, row in zip(traces, rows, strict=True):
        assert [i for i, token in enumerate(trace.completion) if token in chat.stop_ids] == [len(trace.completion) - 1]
        answer = chat.parse(trace.completion)
        assert (answer.analysis, answer.final) == (row.get("reasoning", ""), row["completion"])
        assert row["prompt"] in chat.decode(trace.prompt)
        assert trace.prompt.count(chat.tokenizer.token_to_id("<|start|>")) == 3


def test_rows_of_tokens_keep_their_control_tokens(tmp_path, chat):
    completion = chat.encode(
        "<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>"
    )
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": [5], "completion": completion}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_traces(path, chat)[0].completion == tuple(completion)
