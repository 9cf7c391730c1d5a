import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from puzzle_jax.report.table import SearchReport
from tests.support import present


def entry(scale, kl, missed=(), layers=((16, None), (100, 8))):
    return {
        "parameters": int(2_000_000 * scale),
        "checkpoint_bytes": int(900_000 * scale),
        "expert_bytes": int(700_000 * scale),
        "scenarios": {
            "chat": {
                "batch": 4,
                "kv_bytes": int(50_000 * scale),
                "predicted_tokens_per_second": 100.0 / scale,
                "predicted_error": 0.01 * (1 - scale),
                "throughput": {"tokens_per_second": 110.0 / scale, "low": 90.0, "high": 120.0},
            },
            "long": {
                "batch": int(6 / scale),
                "kv_bytes": int(80_000 * scale),
                "predicted_tokens_per_second": 30.0 / scale,
                "predicted_error": 0.0,
                "throughput": None,
            },
        },
        "predicted_kl": kl / 2,
        "heldout": {"kl": kl, "kl_se": 0.01},
        "efforts": {"low": {"accuracy": 0.5, "accuracy_se": 0.05, "mean_tokens": 6.25}},
        "missed": list(missed),
        "layers": [{"num_local_experts": n, "sliding_window": w} for n, w in layers],
    }


MODELS = {
    "parent": entry(1.0, 0.0),
    "child": entry(0.5, 0.04, layers=((12, 32), (50, 8))),
    "windows_only": entry(0.9, 0.3, ["expert bytes ratio is 1, asked for 0.65"]),
}
REPORT = SearchReport(
    MODELS,
    ["low"],
    [{"name": "chat", "batch": 4, "input_tokens": 30, "output_tokens": 20}],
    Path("runs/tiny/child"),
)


def test_rows_are_relative_to_the_parent():
    heading, rows = REPORT.rows()
    assert heading == ["", "parent", "child", "windows only"]
    table = {row[0].strip(): row[1:] for row in rows}
    assert table["parameters"] == ["2.00M (100%)", "1.00M (50%)", "1.80M (90%)"]
    assert table["kv bytes per request".replace("kv", "KV")] == ["50.00k (100%)", "25.00k (50%)", "45.00k (90%)"]
    assert table["predicted tokens/s"][:2] == ["100 (1.00x)", "200 (2.00x ±0.01)"]  # 0.5% of 2
    assert table["measured tokens/s"][1] == "220 (2.00x)"
    assert table["held-out KL"][1] == "0.0400 ±0.0100"
    assert table["accuracy, low"][0] == "50.0% ±5.0%"
    assert table["mean tokens, low"][0] == "6.2"
    assert table["meets the target"] == ["-", "yes", "no"]


def test_tokens_and_ends_are_compared_with_the_parents():
    """Both rows need every model but the parent compared; an interval without an end shows a question mark."""

    def compared(value, low, difference):
        ended = {"difference": difference, "low": difference - 0.02, "high": None}
        return {"low": {"tokens": {"value": value, "low": low, "high": 1.5}, "ended": ended}}

    entries = {
        name: {**e, "efforts": {"low": {**e["efforts"]["low"], "truncated": 0.125}}} for name, e in MODELS.items()
    }
    entries["child"]["compared"] = compared(1.25, 1.1, -0.04)
    assert not any("over the parent's" in row[0] for row in replace(REPORT, evaluation=entries).rows()[1])
    entries["windows_only"]["compared"] = compared(None, 1.0, 0.01)
    table = {row[0].strip(): row[1:] for row in replace(REPORT, evaluation=entries).rows()[1]}
    assert table["tokens over the parent's, low"] == ["-", "1.25 (1.10 to 1.50)", "-"]
    assert table["ended by itself, low"] == ["87.5%", "87.5%, -4.0 (-6.0 to ?)", "87.5%, +1.0 (-1.0 to ?)"]


def test_several_scenarios_are_told_apart():
    long = {"name": "long", "batch": None, "input_tokens": 700, "output_tokens": 200}
    both = replace(REPORT, scenarios=[*REPORT.scenarios, long])
    table = {row[0]: row[1:] for row in both.rows()[1]}
    assert table["KV bytes per request, chat"][1] == "25.00k (50%)"
    assert table["KV bytes per request, long"][1] == "40.00k (50%)"
    assert table["requests together, long"] == ["6", "12", "6"]
    assert table["predicted tokens/s, long"][1] == "60 (2.00x)"
    assert "measured tokens/s, chat" in table and "measured tokens/s, long" not in table
    assert "requests together, chat" not in table
    assert both.caption().endswith(
        "; scenario long: as many requests as fit of 700 input and 200 output tokens together"
    )


def test_the_childs_worst_task_and_effort_are_marked():
    assert REPORT.groups() is None  # an evaluation that was written without them

    def grouped(entry, kls, right):
        kl = {name: {"kl": value, "kl_se": 0.01} for name, value in kls.items()}
        accuracy = {name: {"accuracy": value} for name, value in right.items()}
        tasks = ("add", "recall")
        return {
            **entry,
            "heldout_kl": {
                "tasks": {name: kl[name] for name in tasks},
                "efforts": {name: kl[name] for name in ("low", "high")},
            },
            "tasks": {name: accuracy[name] for name in tasks},
            "efforts": {name: accuracy[name] for name in ("low", "high")},
        }

    names = ("add", "recall", "low", "high")
    models = {
        "parent": ((0.0, 0.0, 0.0, 0.0), (0.5, 0.75, 0.625, 0.875)),
        "child": ((0.125, 0.25, 0.5, 0.0625), (0.25, 0.625, 0.625, 0.875)),
        "uniform": ((0.5, 0.75, 0.25, 0.625), (0.0, 0.5, 0.125, 0.25)),
    }
    evaluation = {
        name: grouped(entry(1.0, 0.1), dict(zip(names, kls, strict=True)), dict(zip(names, right, strict=True)))
        for name, (kls, right) in models.items()
    }
    section = present(replace(REPORT, evaluation=evaluation).groups())
    assert section.heading == ["", "parent", "child", "uniform"]
    assert section.rows == [
        ["held-out KL, add", "0.0000", "0.1250", "0.5000"],
        ["held-out KL, recall", "0.0000", "0.2500 *", "0.7500"],
        ["held-out KL, low", "0.0000", "0.5000 *", "0.2500"],
        ["held-out KL, high", "0.0000", "0.0625", "0.6250"],
        ["accuracy, add", "50.0%", "25.0% *", "0.0%"],
        ["accuracy, recall", "75.0%", "62.5%", "50.0%"],
        ["accuracy, low", "62.5%", "62.5%", "12.5%"],
        ["accuracy, high", "87.5%", "87.5%", "25.0%"],
    ]


def test_layers_show_what_is_kept_and_what_changed():
    first, second = REPORT.layers()
    assert first == "layer  0  " + "█" * 12 + "·" * 4 + "   12 of 16 experts  window 32  (was full attention)"
    assert second == "layer  1  " + "█" * 16 + "·" * 16 + "   50 of 100 experts  window 8"


def test_terminal_and_file_say_the_same():
    stream = io.StringIO()
    REPORT.show(Console(file=stream, width=160))
    screen, text = stream.getvalue(), REPORT.markdown()
    for said in ("windows only cannot meet the target: expert bytes ratio is 1", "0.0400 ±0.0100", "4 requests of 30"):
        assert said in screen and said in text
    assert "runs/tiny/child" in screen


def test_timings_that_disagree_are_told():
    child = entry(0.5, 0.04)
    child["scenarios"]["chat"]["predicted_error"] = 0.0712
    busy = replace(REPORT, evaluation={**REPORT.evaluation, "child": child})
    assert "timings disagree" not in REPORT.caption()
    assert busy.caption() == (
        "scenario chat: 4 requests of 30 input and 20 output tokens together; timings disagree, so that predicted "
        "speeds are uncertain by up to 7%, as on a machine that does other work too: run the search again when it is "
        "quiet"
    )
