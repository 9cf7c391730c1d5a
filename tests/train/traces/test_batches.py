"""Traces as batches: what is kept and refused, exact resume, mixture, epochs, evaluation, and the `traces` verb."""

import dataclasses
import io
import json
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.evaluate.accuracy import SPLITS, QuestionSet
from puzzle_jax.generate.traces import Trace, read_traces, write_traces
from puzzle_jax.settings.verbs import parse
from puzzle_jax.tasks import Chat
from puzzle_jax.tasks.chat.embedded import chat_files, embedded_chat
from puzzle_jax.train.__main__ import VERBS
from puzzle_jax.train.rows import Packed, packed
from puzzle_jax.train.traces import command as traces_command
from puzzle_jax.train.traces import examples
from puzzle_jax.train.traces.batches import TraceBatches
from puzzle_jax.train.traces.examples import Counts, TraceExample, read_examples
from puzzle_jax.train.traces.settings import DataSettings
from tests.support import chat_config, of_type, printed, random_params

VOCAB = 97


def trace(prompt, completion, task="add", effort="low", truncated=False):
    return Trace(task, effort, 0, {}, tuple(prompt), tuple(completion), None, truncated)


def settings(**changes):
    return DataSettings(**{"row_length": 64, "rows": 3, **changes})


def examples_of(traces, settings, vocab_size):
    """Like the module's function, for traces without a file."""
    named = ((f"trace {number}", trace) for number, trace in enumerate(traces, 1))
    return examples.examples_of(named, settings, vocab_size, f"a list of {len(traces)} traces")


def made_up(seed=0):
    """Examples of two tasks at two efforts; the first token is the example's number."""
    rng = np.random.default_rng(seed)
    counts = {("add", "low"): 40, ("add", "high"): 20, ("chain", "low"): 30, ("chain", "high"): 10}
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    examples = []
    for index, (task, effort) in enumerate(kinds):
        tokens = rng.integers(0, VOCAB, rng.integers(3, 30)).astype(np.int32)
        tokens[0] = index
        examples.append(TraceExample(tokens, int(rng.integers(1, len(tokens))), task=task, effort=effort))
    return examples


EXAMPLES = made_up()


def drawn(batches: list[Packed]) -> list[int]:
    """Numbers of the examples in batches."""
    starts = [(batch.segment_ids > 0) & (batch.positions == 0) for batch in batches]
    return [int(i) for batch, start in zip(batches, starts, strict=True) for i in batch.tokens[start]]


def take(batches: TraceBatches, count: int) -> list[Packed]:
    return [next(batches) for _ in range(count)]


def assert_equal(mine: list[Packed], theirs: list[Packed]) -> None:
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


# Examples -----------------------------------------------------------------------------------------------------------


def test_examples_come_from_files_and_directories_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    write_traces(tmp_path / "b" / "2.jsonl", [trace([7], [8, 9], "chain", "high")])
    write_traces(tmp_path / "b" / "1.parquet", [trace([1, 2], [3]), trace([4], [5, 6], truncated=True)])
    write_traces(tmp_path / "b" / ".half.parquet", [trace([1], [1])])
    (tmp_path / "b" / "notes.txt").write_text("no traces")
    write_traces(tmp_path / "a.jsonl", [trace([10, 11, 12], [13])])
    examples, counts = read_examples((tmp_path / "b", tmp_path / "a.jsonl"), settings(), VOCAB)
    tokens = [of_type(np.ndarray, example.tokens).tolist() for example in examples]
    assert tokens == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12, 13]]
    assert [example.prompt_length for example in examples] == [2, 1, 1, 3]
    assert [(example.task, example.effort) for example in examples][1:3] == [("add", "low"), ("chain", "high")]
    assert counts == Counts(traces=4, kept=4, longest=4) and str(counts) == "4 of 4 traces kept"
    with pytest.raises(PuzzleError, match=r"traces names .*a\.jsonl twice"):
        read_examples((tmp_path / "a.jsonl", tmp_path / "b" / ".." / "a.jsonl"), settings(), VOCAB)


def test_text_is_rendered_by_the_chat(tmp_path):
    chat = embedded_chat()
    row = {"prompt": "2 + 2?", "completion": "4", "reasoning": "2 + 2", "effort": "high"}
    (tmp_path / "text.jsonl").write_text(json.dumps(row) + "\n")
    (example,), _ = read_examples((tmp_path / "text.jsonl",), settings(row_length=600), 128, chat)
    prompt, completion = chat.prompt_tokens("2 + 2?", "high"), chat.completion_tokens("2 + 2", "4")
    assert list(example.tokens) == prompt + completion and example.prompt_length == len(prompt)
    with pytest.raises(PuzzleError, match=r"text\.jsonl, line 1: the row is text, which needs a chat"):
        read_examples((tmp_path / "text.jsonl",), settings(), 128)


def test_what_does_not_fit_is_dropped_cut_or_refused_and_counted():
    traces = [
        trace([1, 2], [3, 4, 5]),
        trace([1, 2], range(10, 20)),
        trace(range(8), [9, 9]),
        trace([1], [2, 2, 2, 2], truncated=True),
        trace([1], [2]),
    ]
    kept, counts = examples_of(traces, settings(row_length=8), VOCAB)
    assert [len(example.tokens) for example in kept] == [5, 5, 2]
    assert counts == Counts(traces=5, kept=3, over_long=2, longest=12)
    kept, counts = examples_of(traces, settings(row_length=8, over_long="cut"), VOCAB)
    assert [of_type(np.ndarray, example.tokens).tolist() for example in kept][1] == [1, 2, 10, 11, 12, 13, 14, 15]
    assert counts == Counts(traces=5, kept=4, cut=1, over_long=1, longest=12)
    assert str(counts) == "4 of 5 traces kept (1 of them cut), 1 dropped that are longer than a row"
    strict = settings(row_length=12, keep_truncated=False, min_completion=3)
    kept, counts = examples_of(traces, strict, VOCAB)
    assert [len(example.tokens) for example in kept] == [5, 12]
    assert counts == Counts(traces=5, kept=2, truncated=1, short=2, longest=12)
    with pytest.raises(PuzzleError, match=r"^trace 2 has 12 tokens, but row_length is 8$"):
        examples_of(traces, settings(row_length=8, over_long="refuse"), VOCAB)


def test_useless_traces_are_refused(tmp_path):
    path = tmp_path / "t.parquet"
    write_traces(path, [trace([1], [2]), trace([1], [96, 97])])
    with pytest.raises(PuzzleError, match=r"t\.parquet, trace 2 holds token 97, but the model's tokens are 0 to 96$"):
        read_examples((path,), settings(), VOCAB)
    assert len(read_examples((path,), settings(), VOCAB + 1).examples) == 2
    with pytest.raises(PuzzleError, match="trace 1 has no completion"):
        examples_of([trace([1], [])], settings(), VOCAB)
    with pytest.raises(PuzzleError, match="trace 2 has no prompt"):
        examples_of([trace([1], [2]), trace([], [2])], settings(), VOCAB)
    with pytest.raises(PuzzleError, match="row_length is 4, but the shortest example of a list of 2 traces needs 5"):
        examples_of([trace([1, 2], [3, 4, 5]), trace([1] * 4, [3] * 3)], settings(row_length=4), VOCAB)
    with pytest.raises(PuzzleError, match="a list of 0 traces leaves nothing to train on: 0 of 0"):
        examples_of([], settings(), VOCAB)
    with pytest.raises(PuzzleError, match="leaves nothing to train on: 0 of 1 traces kept, 1 dropped that are ended"):
        examples_of([trace([1], [2], truncated=True)], settings(keep_truncated=False), VOCAB)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PuzzleError, match=r"empty holds no file of traces, \.parquet or \.jsonl"):
        read_examples((tmp_path / "empty",), settings(), VOCAB)
    with pytest.raises(PuzzleError, match=r"none\.parquet cannot be read"):
        read_examples((tmp_path / "none.parquet",), settings(), VOCAB)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_length": 1}, "row_length is 1, but must be at least 2"),
        ({"rows": 0}, "rows is 0, but must be at least 1"),
        ({"micro_batches": 0}, "micro_batches is 0"),
        ({"min_completion": 0}, "min_completion is 0"),
        ({"seed": -1}, "seed is -1, but must be at least 0"),
        ({"efforts": {"none": 1.0}}, "effort is 'none'"),
        ({"tasks": {"add": -1.0}}, "data.tasks.add is -1.0"),
        ({"efforts": {"low": float("nan")}}, "data.efforts.low is nan"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        DataSettings(**{"row_length": 64, **changes})


# Batches ------------------------------------------------------------------------------------------------------------


def test_rows_hold_whole_examples_as_they_are():
    batches = take(TraceBatches(EXAMPLES, settings(micro_batches=2), 95), 6)
    for batch in batches:
        assert {array.shape for array in batch[:5]} == {(2, 3, 64)}
        for tokens, segments, weights in zip(
            *(a.reshape(6, 64) for a in (batch.tokens, batch[3], batch[2])), strict=True
        ):
            assert (tokens[segments == 0] == 95).all()
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                example = EXAMPLES[tokens[here][0]]
                np.testing.assert_array_equal(tokens[here], example.tokens)
                assert weights[here].sum() == len(example.tokens) - example.prompt_length
    assert np.mean([batch.segment_ids > 0 for batch in batches]) > 0.95


def test_a_run_goes_on_with_the_same_bits_after_any_step():
    shape = settings(micro_batches=2, seed=5, tasks={"add": 1.0, "chain": 2.5})
    whole = TraceBatches(EXAMPLES, shape, 0)
    states, batches = [], []
    for _ in range(8):
        states.append(json.dumps(whole.get_state()))
        batches.append(next(whole))
    for step in (0, 1, 5, 7):
        resumed = TraceBatches(EXAMPLES, shape, 0)
        next(resumed)
        resumed.set_state(json.loads(states[step]))
        assert json.dumps(resumed.get_state()) == states[step]
        assert_equal(take(resumed, 8 - step), batches[step:])
    whole.set_state(json.loads(states[3]))
    assert_equal(take(whole, 5), batches[3:])
    assert max(map(len, states)) < 1000


def test_state_of_other_data_or_damaged_is_refused():
    batches = TraceBatches(EXAMPLES, settings(), 0)
    next(batches)
    state = batches.get_state()
    others = {
        "seed": (EXAMPLES, settings(seed=1), 0),
        "rows": (EXAMPLES, settings(rows=4), 0),
        "weights": (EXAMPLES, settings(tasks={"add": 2.0, "chain": 1.0}), 0),
        "padding": (EXAMPLES, settings(), 1),
        "fewer": (EXAMPLES[:-1], settings(), 0),
        "prompt": ([*EXAMPLES[:-1], dataclasses.replace(EXAMPLES[-1], prompt_length=1)], settings(), 0),
    }
    prints = {name: TraceBatches(*other).fingerprint for name, other in others.items()}
    assert len({*prints.values(), batches.fingerprint}) == len(others) + 1
    assert TraceBatches(made_up(), settings(), 0).fingerprint == batches.fingerprint
    with pytest.raises(PuzzleError, match="the state of the data belongs to other traces or settings"):
        TraceBatches(*others["seed"]).set_state(state)
    for damage in ({"position": -1}, {"position": "1"}, {"open": [[100]]}, {"open": [[3] * 40]}, {"open": None}):
        with pytest.raises(PuzzleError, match="the state of the data is damaged"):
            batches.set_state({**state, **damage})
    with pytest.raises(PuzzleError, match="belongs to other traces"):
        batches.set_state({})
    assert batches.get_state() == state


def test_every_example_comes_once_in_an_epoch_and_seeds_differ():
    batches = TraceBatches(EXAMPLES, settings(), 0)
    order = [int(batches.order[position]) for position in range(220)]
    counts = Counter(order[:100])
    # Shares are rounded to a hundredth of the smallest; here without a remainder.
    assert counts == Counter(range(100)) == Counter(order[100:200])
    assert order[:100] != order[100:200]
    other = TraceBatches(EXAMPLES, settings(seed=1), 0)
    assert [int(other.order[position]) for position in range(100)] != order[:100]
    # Packing reorders a little and loses nothing.
    taken = Counter(drawn(take(batches, 12)))
    state = batches.get_state()
    held = Counter(index for row in of_type(list, state["open"]) for index in row)
    assert taken + held == Counter(int(batches.order[p]) for p in range(of_type(int, state["position"])))


def test_weights_multiply_what_there_is():
    mixed = settings(tasks={"add": 1.0, "chain": 3.0}, efforts={"low": 1.0, "high": 0.5})
    batches = TraceBatches(EXAMPLES, mixed, 0)
    first = [EXAMPLES[batches.order[position]] for position in range(1550)]
    kinds = Counter((example.task, example.effort) for example in first)
    expected = {("add", "low"): 40, ("add", "high"): 10, ("chain", "low"): 90, ("chain", "high"): 15}
    for kind, share in expected.items():
        assert kinds[kind] / 1550 == pytest.approx(share / 155, rel=0.01)
    never = TraceBatches(EXAMPLES, settings(tasks={"add": 1.0}), 0)
    assert {EXAMPLES[index].task for index in drawn(take(never, 9))} == {"add"}


def test_weights_that_fit_no_trace_are_refused(monkeypatch):
    with pytest.raises(PuzzleError, match="tasks names 'recall', but the traces have only add, chain"):
        TraceBatches(EXAMPLES, settings(tasks={"recall": 1.0}), 0)
    with pytest.raises(PuzzleError, match="efforts names 'medium', but the traces have only high, low"):
        TraceBatches(EXAMPLES, settings(efforts={"medium": 1.0}), 0)
    with pytest.raises(PuzzleError, match="leave no trace"):
        TraceBatches(EXAMPLES, settings(tasks={"add": 0.0, "chain": 0.0}), 0)
    with pytest.raises(PuzzleError, match="there is no trace to train on"):
        TraceBatches([], settings(), 0)
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(PuzzleError, match=r"needs grain: pip install grain"):
        TraceBatches(EXAMPLES, settings(), 0)


def test_one_example_is_enough():
    only = TraceExample((5, 6, 7), 1, task="add", effort="low")
    batch = next(TraceBatches([only], settings(row_length=7, rows=2), 0))
    assert batch.tokens.tolist() == [[[5, 6, 7, 5, 6, 7, 0]] * 2]


def test_extras_are_read_when_an_example_is_packed():
    def extras(index):
        return {"top": np.stack([EXAMPLES[index].tokens, EXAMPLES[index].tokens + 1], axis=1)}

    shape = settings(micro_batches=2)
    batch = next(TraceBatches(EXAMPLES, shape, 0, extras))
    assert batch.extras["top"].shape == (2, 3, 64, 2)
    inside = batch.segment_ids > 0
    np.testing.assert_array_equal(batch.extras["top"][..., 1][inside], batch.tokens[inside] + 1)
    assert not batch.extras["top"][~inside].any()
    (held_out,) = packed(EXAMPLES[:2], rows=3, length=64, pad_id=0, extras=extras)
    np.testing.assert_array_equal(held_out.extras["top"][..., 0], held_out.tokens)


def test_evaluation_sees_every_example_once():
    batches = list(packed(EXAMPLES, rows=7, length=40, pad_id=3))
    assert {batch.tokens.shape for batch in batches} == {(7, 40)}
    assert sorted(drawn(batches)) == list(range(100))
    weights = sum(batch.weights.sum() for batch in batches)
    assert weights == sum(len(example.tokens) - example.prompt_length for example in EXAMPLES)
    padded = [row for batch in batches for row in batch.segment_ids if not row.any()]
    assert 0 < len(padded) < 7 and batches[-1].tokens[-1].tolist() == [3] * 40
    assert list(packed([], rows=7, length=40, pad_id=3)) == []
    with pytest.raises(PuzzleError, match=r"example \d+ has \d+ tokens, but a row has 20"):
        next(packed(EXAMPLES, rows=7, length=20, pad_id=3))


# The verb -----------------------------------------------------------------------------------------------------------


def test_training_shares_no_prompt_with_other_splits():
    def prompts(split):
        return {problem.prompt for problem, _ in QuestionSet(("add", "chain"), ("low",), 300, split).questions()}

    training = prompts("training")
    assert len(training) > 300
    assert all(not training & prompts(split) for split in SPLITS if split != "training")


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    config = chat_config()
    out = tmp_path_factory.mktemp("models") / "parent"
    save_checkpoint(out, config, random_params(config), config_base={}, extra_files=chat_files())
    return out


def ask(parent, out, *flags):
    given = ["--parent", str(parent), "--out", str(out), "--problems", "2", *flags]
    console = Console(width=150, file=io.StringIO())
    traces_command.run(parse(VERBS["traces"], given), console)
    return printed(console)


def test_the_parent_answers_and_the_answers_train(parent, tmp_path):
    out = tmp_path / "new" / "traces.parquet"
    flags = ("--tasks", "add", "--efforts", "low", "high", "--max-tokens", '{"low": 4, "high": 6}')
    said = ask(parent, out, *flags, "--problems", "low=3,high=1", "--batch-size", "3")
    assert "4 traces" in said and "ended by the limit" in said
    assert [path.name for path in out.parent.iterdir()] == ["traces.parquet"]
    traces = read_traces(out)
    asked = QuestionSet(("add",), ("low", "high"), {"low": 3, "high": 1}, "training").questions()
    assert [(t.task, t.effort, t.problem_seed) for t in traces] == [(p.task, e, p.seed) for p, e in asked]
    chat = Chat.load(parent)
    assert [list(t.prompt) for t in traces] == [chat.prompt_tokens(p.prompt, e) for p, e in asked]
    assert all(1 <= len(t.completion) <= (4 if t.effort == "low" else 6) for t in traces)
    examples, counts = read_examples((out,), settings(row_length=512), 128, chat)
    assert counts.kept == 4
    batch = next(TraceBatches(examples, settings(row_length=512), chat.pad_id))
    assert batch.weights.sum() > 0


def test_answers_that_are_in_the_journal_are_not_asked_again(parent, tmp_path, monkeypatch):
    given = parse(
        VERBS["traces"],
        [
            *("--parent", str(parent), "--out", str(tmp_path / "one.parquet"), "--problems", "2"),
            *(
                "--tasks",
                "add",
                "--efforts",
                "low",
                "high",
                "--max-tokens",
                '{"low": 4, "high": 6}',
                "--batch-size",
                "3",
            ),
        ],
    )
    console, journal = Console(width=150, file=io.StringIO()), tmp_path / "kept" / "answers.jsonl"
    traces_command.run(given, console, journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # as if killed while writing the last one
    asked = []
    ask = traces_command.answer_questions

    def counted(*given, skip, **options):
        asked.append(skip)
        return ask(*given, skip=skip, **options)

    monkeypatch.setattr(traces_command, "answer_questions", counted)
    traces_command.run(dataclasses.replace(given, out=tmp_path / "two.parquet"), console, journal)
    assert [len(skip) for skip in asked] == [3]
    assert read_traces(tmp_path / "two.parquet") == read_traces(tmp_path / "one.parquet")


def test_bad_options_are_one_sentence_before_any_work(parent, tmp_path):
    there = tmp_path / "there.jsonl"
    there.write_text("")
    file = tmp_path / "file"
    file.write_text("")
    out = tmp_path / "out.parquet"
    for where, flags, message in [
        (there, (), r"there\.jsonl, which exists already"),
        (tmp_path / "out.csv", (), r"must end in \.parquet or \.jsonl"),
        (file / "out.jsonl", (), "whose directory cannot be made"),
        (out, ("--problems", "0"), "problems.low is 0, but must be at least 1"),
        (out, ("--problems", "low=3,medium=0"), "problems.medium is 0, but must be at least 1"),
        (out, ("--tasks", "none"), "task is 'none'"),
        (out, ("--tasks", "add", "add"), "tasks is 'add,add', but must name at least one, and each once"),
        (out, ("--efforts", "none"), "effort is 'none'"),
        (out, ("--seed", "100"), "seed is 100"),
        (out, ("--temperature", "nan"), "temperature is nan"),
        (out, ("--batch-size", "0"), "batch_size is 0"),
        (out, ("--max-tokens", "{"), "cannot be read as YAML"),
        (out, ("--max-tokens", "0"), "max_tokens.low is 0, but must be at least 1"),
        (out, ("--max-tokens", '{"some": 3}'), "effort is 'some'"),
        (out, ("--max-tokens", "700"), "but the context of the parent is 768"),
        (out, ("--mesh", "2"), "mesh is '2', but must be a mapping of data, sequence, model, processes"),
        (out, ("--mesh", "data=64,model=64"), "a mesh of 64 x 64 needs 4096 devices"),
        (out, ("--mesh.sequence", "2"), "mesh.sequence is 2, but train traces is not shared along it"),
        (out, ("--parent", str(tmp_path / "nowhere")), "nowhere"),
    ]:
        with pytest.raises(PuzzleError, match=message):
            ask(parent, where, *flags)
    assert not out.exists()
