"""Traces: prompts with a model's answers, the one form in which answers are stored, scored and trained on.

A trace file is parquet or, if its path ends in .jsonl, one JSON object per line. Both have the columns `COLUMNS`
(token ids), of which a file from elsewhere needs only prompt and completion, and may have `log_probs`, `experts` and
`unscored`.
Answers of a server can also be read as text, in rows of one of the forms

    {"messages": [..., {"role": "assistant", "content": "4", "thinking": "2 + 2"}]}
    {"prompt": "2 + 2?", "completion": "4", "reasoning": "2 + 2"}
    {"messages": [...], "choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]}

A prompt is one user message or a list of messages; the answer may be called completion or response, its analysis
thinking, reasoning_content or reasoning, and the effort effort or reasoning_effort. The last form is a request with
the response of an OpenAI-compatible server, which may also be under "response"; every choice becomes a trace. An answer
without an analysis may have its thinking within its text, as models write it (`Chat.split_text`).
Control tokens written out in texts stay text, and a `PuzzleWarning` says in how many traces they occur.
Left out: tool calls, streams, chosen experts of text rows.
"""

from __future__ import annotations

import base64
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TextIO, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puzzle_jax.errors import PuzzleError, PuzzleWarning, shown
from puzzle_jax.files import naming, parse_json
from puzzle_jax.generate.trace_files import array_bytes, jsonl_rows, parquet_rows, read_array
from puzzle_jax.tasks import Chat, check_effort

EXTERNAL = "external"
"""Task of a trace whose row names none."""

_TEXT_COLUMNS = (
    "messages", "response", "choices", "finish_reason", "thinking", "reasoning_content", "reasoning",
    "reasoning_effort",
)  # fmt: skip

LARGEST_TOKEN = 2**31 - 1
"""Largest possible token id: programs hold ids as int32."""

# For log-probabilities of probabilities that some programs round to a little more than 1.
_ROUNDING = 1e-3

_SCHEMA = pa.schema([
    ("task", pa.string()),
    ("effort", pa.string()),
    ("seed", pa.int64()),
    ("details", pa.string()),
    ("prompt", pa.list_(pa.int64())),
    ("completion", pa.list_(pa.int64())),
    ("reward", pa.float64()),
    ("truncated", pa.bool_()),
    ("length", pa.int64()),
    ("log_probs", pa.list_(pa.float64())),
    ("experts", pa.binary()),
    ("unscored", pa.string()),
])  # fmt: skip
_OPTIONAL = ("log_probs", "experts", "unscored")
COLUMNS = tuple(name for name in _SCHEMA.names if name not in _OPTIONAL)
"""Columns of every file of traces that this package writes."""


@dataclass(frozen=True)
class Trace:
    """One answered question.

    Attributes:
      task, effort, problem_seed: the question's task and effort, and the seed that reproduces it.
      details: measures of the problem's difficulty.
      prompt, completion: token ids; the completion ends in a stop id unless it is truncated.
      reward: from 0 to 1, where 1 is correct; None if the answer was never scored.
      truncated: whether the token limit ended the completion.
      log_probs: natural logarithm of the probability with which each completion token was drawn, or None.
      experts: ids [prompt + completion - 1 tokens, layers, experts per token] (uint8 or uint16) of the experts that
        each token but the last went through, or None. Not compared.
      unscored: why the answer could not be scored, in which case its reward is 0; None if it was scored.
    """

    task: str
    effort: str
    problem_seed: int
    details: Mapping[str, int]
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    reward: float | None
    truncated: bool
    log_probs: tuple[float, ...] | None = None
    experts: np.ndarray | None = field(default=None, compare=False, repr=False)
    unscored: str | None = None

    def __post_init__(self) -> None:
        if self.log_probs is not None and len(self.log_probs) != len(self.completion):
            raise PuzzleError(
                f"log_probs has {len(self.log_probs)} numbers, but the completion has {len(self.completion)} tokens"
            )
        if self.experts is None:
            return
        tokens = len(self.prompt) + len(self.completion) - 1
        if self.experts.ndim != 3 or self.experts.shape[0] != tokens:
            raise PuzzleError(f"experts has shape {self.experts.shape}, but must be [{tokens} tokens, layers, k]")
        if self.experts.dtype not in (np.uint8, np.uint16):
            raise PuzzleError(f"experts has type {self.experts.dtype}, but must have type uint8 or uint16")

    @property
    def known_reward(self) -> float:
        """The reward; raises PuzzleError for an answer that was never scored, which is not the same as a wrong one."""
        if self.reward is None:
            raise PuzzleError(f"a trace of task {self.task!r} has no reward, so that it is neither right nor wrong")
        return self.reward

    @property
    def correct(self) -> bool:
        """Returns whether the answer earns full reward; raises PuzzleError for an answer that was never scored."""
        return self.known_reward >= 1.0


def write_traces(path: str | Path, traces: Sequence[Trace]) -> None:
    """Writes traces as one file: JSONL when its path ends in .jsonl, else parquet.

    `length` counts prompt and completion tokens; `log_probs`, `experts` and `unscored` are written if a trace has them.
    """
    if Path(path).suffix == ".jsonl":
        with naming(Path(path)), open(path, "w", encoding="utf-8") as file:
            file.writelines(_line(trace) for trace in traces)
        return
    rows = [{**_row(trace), "details": json.dumps(dict(trace.details))} for trace in traces]
    absent = [name for name in _OPTIONAL if not any(name in row for row in rows)]
    schema = pa.schema([column for column in _SCHEMA if column.name not in absent])
    with naming(Path(path)):
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def append_trace(file: TextIO, trace: Trace) -> None:
    """Writes one trace to a JSONL file and flushes it to the operating system, so that a killed run keeps it."""
    file.write(_line(trace))
    file.flush()


def open_to_append(path: str | Path) -> TextIO:
    """Opens a JSONL file of traces for `append_trace`, creating it if it is missing.

    A last line without a newline, which a killed run leaves, is cut off first.
    """
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - (1 << 20))
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                end = begin + found + 1
                break
            end = begin
        os.truncate(file.fileno(), end)
    return open(path, "a", encoding="utf-8")


def read_traces(path: str | Path, chat: Chat | None = None, *, torn_tail: bool = False) -> list[Trace]:
    """Reads a trace file, parquet or JSONL, in any of the forms above.

    Args:
      path: the file; JSONL when it ends in .jsonl.
      chat: turns text rows into tokens; not needed for rows of token ids.
      torn_tail: whether a JSONL file may come from a killed run: a last line without a newline is ignored, and there
        may be no trace at all.

    Raises:
      PuzzleError: the file cannot be read, holds no trace, or has a row of unknown form; names file, row and field.
    """
    path = Path(path)
    columns = (*_SCHEMA.names, *_TEXT_COLUMNS)
    rows = jsonl_rows(path, torn_tail) if path.suffix == ".jsonl" else parquet_rows(path, columns)
    traces: list[Trace] = []
    with_tokens: list[str] = []
    for where, row in rows:
        try:
            for trace, has_tokens in _traces(row, chat):
                traces.append(trace)
                if has_tokens:
                    with_tokens.append(where)
        except PuzzleError as error:
            raise PuzzleError(f"{where}: {error}") from None
    if with_tokens and chat is not None:
        warnings.warn(
            f"{with_tokens[0]}: a control token such as {chat.format.ends[0]} is written out in a text, and stays text "
            f"({len(with_tokens)} of the file's {len(traces)} traces have some)",
            PuzzleWarning,
            stacklevel=2,
        )
    if not traces and not torn_tail:
        raise PuzzleError(f"{path} holds no trace")
    return traces


def _row(trace: Trace) -> dict[str, Any]:
    row: dict[str, Any] = {
        "task": trace.task,
        "effort": trace.effort,
        "seed": trace.problem_seed,
        "details": dict(trace.details),
        "prompt": list(trace.prompt),
        "completion": list(trace.completion),
        "reward": trace.reward,
        "truncated": trace.truncated,
        "length": len(trace.prompt) + len(trace.completion),
    }
    if trace.unscored is not None:
        row["unscored"] = trace.unscored
    if trace.log_probs is not None:
        row["log_probs"] = list(trace.log_probs)
    if trace.experts is not None:
        row["experts"] = array_bytes(trace.experts)
    return row


def _line(trace: Trace) -> str:
    row = _row(trace)
    if "experts" in row:
        row["experts"] = base64.b64encode(row["experts"]).decode()
    return json.dumps(row) + "\n"


def _traces(row: dict[str, Any], chat: Chat | None) -> Iterator[tuple[Trace, bool]]:
    """Yields the traces of a row, one or one per choice of a response, and whether each writes out a control token."""
    row = {name: value for name, value in row.items() if value is not None}
    effort = check_effort(_get(row, "effort" if "effort" in row else "reasoning_effort", str, "a text", "medium"))
    about = {
        "task": _get(row, "task", str, "a text", EXTERNAL),
        "effort": effort,
        "problem_seed": _get(row, "seed", int, "a whole number of at most 64 bits", 0, _fits),
        "details": _details(row),
        "reward": float(_get(row, "reward", int | float, "a number from 0 to 1", None, _is_share))
        if "reward" in row
        else None,
        "unscored": _get(row, "unscored", str, "a text", "") or None,
    }
    answer = row.get("response", row.get("completion"))
    if not {"messages", "choices"} & set(row) and not isinstance(answer, str | Mapping):
        yield _token_trace(row, chat, about), False
        return
    if chat is None:
        raise PuzzleError("the row is text, which needs a chat to become tokens, but none was given")
    for messages, answer, cut in _answers(row):
        yield _text_trace(chat, messages, answer, cut, about)


def _token_trace(row: dict[str, Any], chat: Chat | None, about: dict[str, Any]) -> Trace:
    tokens = "a list of at least one token id"
    prompt, completion = (_list(row, name, tokens, _is_token) for name in ("prompt", "completion"))
    cut = chat is not None and not chat.stop_ids.intersection(completion)
    log_probs = None
    if "log_probs" in row:
        what = "a list of numbers, logarithms of probabilities and so at most 0"
        log_probs = tuple(map(float, _list(row, "log_probs", what, _is_log_prob)))
    return Trace(
        **about,
        prompt=tuple(prompt),
        completion=tuple(completion),
        truncated=_get(row, "truncated", bool, "true or false", cut),
        log_probs=log_probs,
        experts=read_array(row["experts"], "experts") if "experts" in row else None,
    )


def _text_trace(
    chat: Chat, messages: str | list[Any], answer: Mapping[str, Any], cut: bool, about: dict[str, Any]
) -> tuple[Trace, bool]:
    final = answer.get("content")
    if not isinstance(final, str) and not (final is None and cut):
        raise PuzzleError(f"the answer's content is {shown(final)}, but must be a text")
    names = ("thinking", "reasoning_content", "reasoning")
    thought = next((answer[name] for name in names if answer.get(name) is not None), "")
    if not isinstance(thought, str):
        raise PuzzleError(f"the answer's reasoning is {shown(thought)}, but must be a text")
    prompt, final = chat.prompt_tokens(messages, about["effort"]), final or ""
    if not thought:
        thought, final = chat.split_text(final, prompt, cut=cut)
    completion = chat.completion_tokens(thought, final, prompt, cut=cut)
    if not completion:
        raise PuzzleError("the answer was cut short before its first token, so that there is nothing to keep")
    asked = [messages] if isinstance(messages, str) else []
    for message in messages if isinstance(messages, list) else []:
        content = message["content"]
        asked += chat.split_text(content) if message["role"] == "assistant" else (content,)
    trace = Trace(**about, prompt=tuple(prompt), completion=tuple(completion), truncated=cut)
    return trace, chat.has_control_tokens(*asked, thought, final)


def _answers(row: dict[str, Any]) -> Iterator[tuple[str | list[Any], Mapping[str, Any], bool]]:
    """Yields (prompt, the assistant's message, whether it was cut short) for every answer in a text row."""
    name = "messages" if "messages" in row else "prompt"
    messages = row.get(name)
    if not (name == "prompt" and isinstance(messages, str)) and not _are_messages(messages):
        form = "a list of messages" if name == "messages" else "a text or a list of messages"
        raise PuzzleError(f"{name} is {shown(messages)}, but must be {form}")
    response = row.get("response", row.get("completion"))
    choices = row.get("choices", response.get("choices") if isinstance(response, Mapping) else None)
    if choices is not None:
        if choices == []:
            raise PuzzleError("choices is an empty list, but must hold at least one answer")
        for choice in choices if isinstance(choices, list) else [choices]:
            if not isinstance(choice, Mapping) or not isinstance(choice.get("message"), Mapping):
                raise PuzzleError(f"choices holds {shown(choice)}, but must hold objects with a message")
            yield messages, choice["message"], choice.get("finish_reason") == "length"
        return
    cut = _get(row, "truncated", bool, "true or false", row.get("finish_reason") == "length")
    if isinstance(response, str):
        yield messages, {**row, "content": response}, cut
    elif isinstance(messages, list) and messages[-1].get("role") == "assistant":
        yield messages[:-1], messages[-1], cut
    else:
        raise PuzzleError("the row has no answer: no completion, response or choices, and no last assistant message")


def _are_messages(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _get(
    row: dict[str, Any],
    name: str,
    kind: type | UnionType,
    what: str,
    default: object,
    good: Callable[[Any], bool] = lambda value: True,
) -> Any:
    value = row.get(name, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not good(value):
        raise PuzzleError(f"{name} is {shown(value)}, but must be {what}")
    return value


def _list(row: dict[str, Any], name: str, what: str, good: Callable[[object], bool]) -> list[Any]:
    if name not in row:
        raise PuzzleError(f"the row has no field {name}, which every trace must have")
    values = row[name]
    if not isinstance(values, list) or not (values or name == "log_probs"):
        raise PuzzleError(f"{name} must be {what}, but is {shown(values)}")
    for place, value in enumerate(values, 1):
        if not good(value):
            raise PuzzleError(f"{name} must be {what}, but number {place} is {shown(value)}")
    return values


def _details(row: dict[str, Any]) -> dict[str, int]:
    value = row.get("details", {})
    if isinstance(value, str):
        value = parse_json(value, "details")
    if not isinstance(value, dict) or not all(type(number) is int and _fits(number) for number in value.values()):
        raise PuzzleError(f"details is {shown(value)}, but must hold whole numbers of at most 64 bits by name")
    return value


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_TOKEN


def _is_log_prob(value: object) -> bool:
    # NaN fails every comparison, and whole numbers may be larger than any float.
    return (type(value) is float or (type(value) is int and _fits(value))) and value <= _ROUNDING


def _is_share(value: int | float) -> bool:
    return 0 <= value <= 1


def _fits(number: int) -> bool:
    """Returns whether parquet's 64-bit integers can hold the number."""
    return -(2**63) <= number < 2**63
