"""The tables, sentences and figure of an evaluation, from made-up numbers."""

import copy
import io
import struct

from rich.console import Console

from puzzle_jax.report.evaluation import EvaluationReport
from puzzle_jax.report.figures import frontier_figure


def estimate(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def summary(accuracy, tokens):
    return {
        "accuracy": accuracy,
        "low": accuracy - 0.1,
        "high": accuracy + 0.1,
        "mean_tokens": tokens,
        "token_quantiles": {"10": 3.0, "50": 5.0, "90": 9.0, "99": 11.0},
        "truncated": 0.25,
        "answers": 40,
    }


def paired(difference):
    return {"difference": difference, "low": -0.5, "high": 0.5, "won": 3, "lost": 7, "p_value": 0.34375}


def spread(median):
    return {"median": median, "low": median * 0.9, "high": median * 1.1, "rounds": 5}


def above(gap, lower_bound, probability=0.75, answered=1.0):
    gap = None if gap is None else {"accuracy": gap, "rate": 1.25, "low": 0.5, "high": 2.0}
    return {"gap": gap, "lower_bound": lower_bound, "probability": probability, "answered": answered}


def effort_summary(accuracy, tokens):
    return {"all": summary(accuracy, tokens), "tasks": {"chain": summary(accuracy, tokens)}}


EVALUATION = {
    "reference": "parent",
    "settings": {"bootstrap": 2000},
    "overall": {"parent": estimate(0.6, 0.5, 0.7), "child": estimate(0.55, 0.45, 0.65)},
    "summaries": {
        "parent": {"low": effort_summary(0.5, 10.0), "high": effort_summary(0.7, 30.0)},
        "child": {"low": effort_summary(0.4, 12.0), "high": effort_summary(0.7, 33.0)},
    },
    "comparisons": {
        "child": {
            "overall": estimate(-0.05, -0.1, 0.0),
            "efforts": {
                effort: {
                    "all": paired(-0.1),
                    "tasks": {"chain": paired(-0.1)},
                    "ended": paired(-0.2),
                    "retention": estimate(0.8, 0.7, None),
                    "relative_tokens": estimate(1.2, 1.1, 1.3),
                    "relative_tokens_per_second": estimate(1.8, 1.7, 1.9),
                    "relative_request_rate": estimate(1.5, 1.4, 1.6),
                }
                for effort in ("low", "high")
            },
            "common": above(0.02, -0.03),
            "reachable": above(-0.01, None, 0.25, 0.9),
        }
    },
    "points": {
        "parent": {
            "low": {"rate": estimate(3.0, 2.8, 3.2), "accuracy": estimate(0.5, 0.4, 0.6)},
            "high": {"rate": estimate(1.0, 0.9, 1.1), "accuracy": estimate(0.7, 0.6, 0.8)},
        },
        "child": {
            "low": {"rate": estimate(4.5, 4.0, None), "accuracy": estimate(0.4, 0.3, 0.5)},
            "high": {"rate": estimate(1.8, 1.7, 1.9), "accuracy": estimate(0.7, 0.6, 0.8)},
        },
    },
    "throughput": {
        "device": "1 x cpu (cpu)",
        "cache_memory": 16777216,
        "scenarios": {"short": [64, 32]},
        "workloads": {
            name: {
                "parent": {"batch": 3, "tokens_per_second": spread(100.0), "relative": spread(1.0)},
                "child": {"batch": 9, "tokens_per_second": spread(180.0), "relative": spread(1.8)},
            }
            for name in ("short", "low", "high")
        },
    },
}


def test_the_tables_hold_the_numbers():
    text = EvaluationReport(EVALUATION).markdown()
    for row in (
        "| parent, low | 50.0% (40.0% to 60.0%) | 50.0% | 10.0 | 3 / 5 / 9 / 11 | 25.0% |",
        "| child, all | 55.0% (45.0% to 65.0%) |",
        "| child, high | -10.0% (-50.0% to +50.0%) | 3 / 7 | 0.34 | -10.0% | 80.0% (70.0% to ?) | 1.200 (1.100",
        "| short (64 in, 32 out), child | 9 | 180 (162 to 198) | 1.80 (1.62 to 1.98) |",
        "| low effort, parent | 3 |",
        "| child, low | 4.500 (4.000 to ?) | 40.0% (30.0% to 50.0%) | 1.500 (1.400 to 1.600) |",
        "16,777,216 bytes",
    ):
        assert row in text, text


def test_the_verdicts_say_what_is_known():
    common, reachable = EvaluationReport(EVALUATION).verdicts()
    assert common == (
        "Over the request rates 0.500 to 2.000 that both cover, the curve of child is everywhere above that of parent: "
        "the smallest gap is +2.0 points at 1.250 (95% lower bound: -3.0); "
        "it is above zero in 75.0% of bootstrap draws."
    )
    assert "serves (up to 2.000)" in reachable and "child is not everywhere above parent" in reachable
    assert reachable.endswith("none); it is above zero in 25.0% of bootstrap draws, and 10.0% cannot be compared.")
    apart = copy.deepcopy(EVALUATION)
    apart["comparisons"]["child"] |= {"common": above(None, None), "reachable": above(None, None)}
    assert EvaluationReport(apart).verdicts() == [
        "child and parent share no range of request rates, so that whether the curve of child lies above that of "
        "parent has no answer.",
        "child does not reach every request rate that parent serves.",
    ]


def test_without_speed_and_without_a_second_model_the_rest_is_shown():
    slow = {**EVALUATION, "throughput": None, "points": None}
    text = EvaluationReport(slow).markdown()
    assert "tokens/s" not in text and "frontier.png" not in text and "Compared with parent" in text
    alone = {**EVALUATION, "comparisons": {}}
    text = EvaluationReport(alone).markdown()
    assert "Compared" not in text and "Generated tokens per second" in text


def test_the_terminal_shows_the_same():
    console = Console(width=160, record=True, file=io.StringIO())
    EvaluationReport(EVALUATION).show(console)
    text = console.export_text()
    for part in ("Answers", "Compared with parent", "180 (162 to 198)", "the smallest gap is +2.0 points"):
        assert part in text


def test_the_figure_is_a_png_of_the_same_bytes_for_the_same_points():
    first = frontier_figure(EVALUATION["points"], "parent")
    assert first[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", first[16:24]) == (1050, 675)
    assert first == frontier_figure(EVALUATION["points"], "parent")
    moved = copy.deepcopy(EVALUATION["points"])
    moved["child"]["low"]["accuracy"]["value"] = 0.9
    assert first != frontier_figure(moved, "parent")


def test_drawing_leaves_the_global_state_alone():
    import sys

    frontier_figure(EVALUATION["points"], "parent")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
