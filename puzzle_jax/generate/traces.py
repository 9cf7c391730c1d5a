"""Traces: prompts with what a model answered, the one form in which answers are kept, judged and learnt from.

A trace file is parquet or, when its path ends in .jsonl, JSON objects one per line. Both have the columns `COLUMNS`
(token ids), of which a file from elsewhere needs only prompt and completion, and may carry `log_probs`, `experts` and
`unscored`.
What a server answered can be read too, as text: rows of one of the forms

    {"messages": [..., {"role": "assistant", "content": "4", "thinking": "2 + 2"}]}
    {"prompt": "2 + 2?", "completion": "4", "reasoning": "2 + 2"}
    {"messages": [...], "choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]}

A prompt is one user message or a list of messages; the answer may be called completion or response, its analysis
thinking, reasoning_content or reasoning, and the effort effort or reasoning_effort. The last form is a request with
the response of an OpenAI-compatible server, which may also stand under "response"; every choice becomes a trace.
Left out: tool calls, streams, chosen experts of text rows.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puzzle_jax.errors import PuzzleError
from puzzle_jax.tasks import Chat, check_effort

COLUMNS = ("task", "effort", "seed", "details", "prompt", "completion", "reward", "truncated", "length")

EXTERNAL = "external"
"""Task of a trace whose row names none."""

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


@dataclass(frozen=True)
class Trace:
    """One answered question.

    Attributes:
      task, effort: what was asked and how hard the model should think.
      problem_seed: draws the problem again from its task.
      details: what makes the problem hard, as whole numbers.
      prompt, completion: token ids; the completion ends in a stop id unless it is truncated.
      reward: from 0 to 1, which is right; None when nobody judged the answer.
      truncated: whether the token limit ended the completion.
      log_probs: natural logarithm of the probability with which each completion token was drawn, or None.
      experts: ids [prompt + completion - 1 tokens, layers, experts per token] (uint8 or uint16) of the experts that
        each token but the last went through, or None. Not compared.
      unscored: why the answer could not be scored, where its reward of 0 says no more than that.
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
    def judged_reward(self) -> float:
        """The reward; raises PuzzleError when nobody judged the answer, which is not the same as a wrong one."""
        if self.reward is None:
            raise PuzzleError(f"a trace of task {self.task!r} has no reward, so that it is neither right nor wrong")
        return self.reward

    @property
    def correct(self) -> bool:
        """Whether the answer earns full reward; raises PuzzleError when nobody judged it."""
        return self.judged_reward >= 1.0


def write_traces(path: str | Path, traces: Sequence[Trace]) -> None:
    """Writes traces as one file: JSONL when its path ends in .jsonl, else parquet.

    `length` counts prompt and completion tokens; `log_probs`, `experts` and `unscored` are there when a trace has them.
    """
    if Path(path).suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(_line(trace) for trace in traces)
        return
    rows = [{**_row(trace), "details": json.dumps(dict(trace.details))} for trace in traces]
    absent = [name for name in ("log_probs", "experts", "unscored") if not any(name in row for row in rows)]
    schema = pa.schema([column for column in _SCHEMA if column.name not in absent])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def append_trace(file: TextIO, trace: Trace) -> None:
    """Writes one trace to a JSONL file, and out to the operating system, so that a killed run keeps it."""
    file.write(_line(trace))
    file.flush()


def open_to_append(path: str | Path) -> TextIO:
    """Opens a JSONL file of traces for `append_trace`, made when it is missing.

    A last line without its new line, which a killed run leaves, is cut off first.
    """
    with open(path, "ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        os.truncate(file.fileno(), whole)
    return open(path, "a", encoding="utf-8")


def read_traces(path: str | Path, chat: Chat | None = None, *, torn_tail: bool = False) -> list[Trace]:
    """Reads a trace file, parquet or JSONL, in any of the forms above.

    Args:
      path: the file; JSONL when it ends in .jsonl.
      chat: turns text rows into tokens; not needed for rows of token ids.
      torn_tail: whether a JSONL file may be what a killed run left: a last line without its new line is ignored, and
        there may be no trace at all.

    Raises:
      PuzzleError: the file cannot be read, holds no trace, or a row is of no known form; names file, row and field.
    """
    path = Path(path)
    rows = _jsonl_rows(path, torn_tail) if path.suffix == ".jsonl" else _parquet_rows(path)
    traces = []
    for where, row in rows:
        try:
            traces += _traces(row, chat)
        except PuzzleError as error:
            raise PuzzleError(f"{where}: {error}") from None
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
        # The form of .npy files holds shape and type as well.
        buffer = io.BytesIO()
        np.save(buffer, trace.experts, allow_pickle=False)
        row["experts"] = buffer.getvalue()
    return row


def _line(trace: Trace) -> str:
    row = _row(trace)
    if "experts" in row:
        row["experts"] = base64.b64encode(row["experts"]).decode()
    return json.dumps(row) + "\n"


def _jsonl_rows(path: Path, torn_tail: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise PuzzleError(f"{path} cannot be read as a JSONL file of traces: {error}") from None
    # What follows the last new line is empty in a whole file.
    for number, line in enumerate(lines[:-1] if torn_tail else lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PuzzleError(f"{path}, line {number} is no valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise PuzzleError(f"{path}, line {number} holds a {type(row).__name__}, but must hold an object")
        yield f"{path}, line {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise PuzzleError(f"{path} cannot be read as a parquet file of traces: {error}") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}, row {number}", row


def _traces(row: dict[str, Any], chat: Chat | None) -> Iterator[Trace]:
    """The traces of one row: one, or one per choice of a response."""
    row = {name: value for name, value in row.items() if value is not None}
    effort = check_effort(_get(row, "effort" if "effort" in row else "reasoning_effort", str, "a text", "medium"))
    about = {
        "task": _get(row, "task", str, "a text", EXTERNAL),
        "effort": effort,
        "problem_seed": _get(row, "seed", int, "a whole number", 0),
        "details": _details(row),
        "reward": _reward(row),
        "unscored": _get(row, "unscored", str, "a text", "") or None,
    }
    answer = row.get("response", row.get("completion"))
    if not {"messages", "choices"} & set(row) and not isinstance(answer, str | Mapping):
        yield _token_trace(row, chat, about)
        return
    if chat is None:
        raise PuzzleError("the row is text, which needs a chat to become tokens, but none was given")
    for messages, answer, cut in _answers(row):
        yield _text_trace(chat, messages, answer, cut, about)


def _token_trace(row: dict[str, Any], chat: Chat | None, about: dict[str, Any]) -> Trace:
    prompt, completion = _tokens(row, "prompt"), _tokens(row, "completion")
    cut = chat is not None and not chat.stop_ids.intersection(completion)
    log_probs = row.get("log_probs")
    if log_probs is not None:
        if not isinstance(log_probs, list) or not all(type(p) in (int, float) for p in log_probs):
            raise PuzzleError("log_probs must be a list of numbers")
        log_probs = tuple(map(float, log_probs))
    return Trace(
        **about,
        prompt=prompt,
        completion=completion,
        truncated=_get(row, "truncated", bool, "true or false", cut),
        log_probs=log_probs,
        experts=_experts(row.get("experts")),
    )


def _text_trace(
    chat: Chat, messages: str | list[Any], answer: Mapping[str, Any], cut: bool, about: dict[str, Any]
) -> Trace:
    final = answer.get("content")
    if not isinstance(final, str) and not (final is None and cut):
        raise PuzzleError(f"the answer's content is {final!r}, but must be a text")
    names = ("thinking", "reasoning_content", "reasoning")
    thought = next((answer[name] for name in names if answer.get(name) is not None), "")
    if not isinstance(thought, str):
        raise PuzzleError(f"the answer's reasoning is {thought!r}, but must be a text")
    completion = chat.completion_tokens(thought, final or "", cut=cut)
    if not completion:
        raise PuzzleError("the answer was cut short before its first token, so that there is nothing to keep")
    return Trace(
        **about,
        prompt=tuple(chat.prompt_tokens(messages, about["effort"])),
        completion=tuple(completion),
        truncated=cut,
    )


def _answers(row: dict[str, Any]) -> Iterator[tuple[str | list[Any], Mapping[str, Any], bool]]:
    """(prompt, the assistant's message, whether it was cut short) of every answer in a text row."""
    name = "messages" if "messages" in row else "prompt"
    messages = row.get(name)
    if not (name == "prompt" and isinstance(messages, str)) and not _are_messages(messages):
        form = "a list of messages" if name == "messages" else "a text or a list of messages"
        raise PuzzleError(f"{name} is {messages!r}, but must be {form}")
    response = row.get("response", row.get("completion"))
    choices = row.get("choices", response.get("choices") if isinstance(response, Mapping) else None)
    if choices is not None:
        for choice in choices if isinstance(choices, list) else [choices]:
            if not isinstance(choice, Mapping) or not isinstance(choice.get("message"), Mapping):
                raise PuzzleError(f"choices holds {choice!r}, but must hold objects with a message")
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


def _get(row: dict[str, Any], name: str, kind: type, what: str, default: Any) -> Any:
    value = row.get(name, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise PuzzleError(f"{name} is {value!r}, but must be {what}")
    return value


def _tokens(row: dict[str, Any], name: str) -> tuple[int, ...]:
    if name not in row:
        raise PuzzleError(f"the row has no field {name}, which every trace must have")
    tokens = row[name]
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        raise PuzzleError(f"{name} must be a list of at least one token id")
    return tuple(tokens)


def _details(row: dict[str, Any]) -> dict[str, int]:
    value = row.get("details", {})
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise PuzzleError(f"details is no valid JSON: {error}") from None
    if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
        raise PuzzleError(f"details is {value!r}, but must hold whole numbers by name")
    return value


def _reward(row: dict[str, Any]) -> float | None:
    value = row.get("reward")
    if value is None:
        return None
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise PuzzleError(f"reward is {value!r}, but must be a number from 0 to 1")
    return float(value)


def _experts(value: Any) -> np.ndarray | None:
    if value is None:
        return None
    try:
        return np.load(io.BytesIO(value if isinstance(value, bytes) else base64.b64decode(value)), allow_pickle=False)
    except (ValueError, TypeError, EOFError) as error:
        raise PuzzleError(f"experts is no array in the form of .npy files: {error}") from None
