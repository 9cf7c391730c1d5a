"""The table of models side by side, from made-up numbers."""

import copy

from puzzle_jax.report.comparison import ComparisonTable
from puzzle_jax.report.evaluation import EvaluationReport
from tests.report.test_evaluation import EVALUATION, above


def with_tokens_of_right_answers():
    found = copy.deepcopy(EVALUATION)
    found["summaries"]["child"]["high"]["all"]["mean_right_tokens"] = 31.25
    return found


def test_rows_are_measures_and_columns_models():
    section = ComparisonTable(with_tokens_of_right_answers()).section("All")
    assert section.heading == ["", "parent", "child"] and section.title == "All"
    rows = {row[0]: row[1:] for row in section.rows}
    assert list(rows) == [
        *(
            f"{effort}: {measure}"
            for effort in ("low", "high")
            for measure in (
                "accuracy",
                "difference",
                "95% interval",
                "retention",
                "tokens",
                "tokens of right answers",
                "ended by itself",
                "tokens/s",
                "requests/s over parent's",
            )
        ),
        "all: accuracy",
        "all: difference",
        "all: 95% interval",
        "above the curve of parent everywhere",
    ]
    assert rows["low: accuracy"] == ["50.0%", "40.0%"]
    assert rows["high: difference"] == ["-", "-10.0"] and rows["high: 95% interval"] == ["-", "-50.0 to +50.0"]
    assert rows["high: retention"] == ["-", "80.0%"]
    assert rows["high: tokens of right answers"] == ["-", "31.2"]
    assert rows["high: ended by itself"] == ["75.0%", "75.0%"]
    assert rows["low: tokens/s"] == ["100", "180"]
    assert rows["low: requests/s over parent's"] == ["-", "1.50x"]
    assert rows["all: accuracy"] == ["60.0%", "55.0%"]
    assert rows["all: difference"] == ["-", "-5.0"] and rows["all: 95% interval"] == ["-", "-10.0 to +0.0"]
    assert rows["above the curve of parent everywhere"] == ["-", "yes"]
    assert "40 problems per effort" in section.remarks[0] and "1 x cpu (cpu)" in section.remarks[1]


def test_the_verdict_is_one_sentence():
    assert ComparisonTable(EVALUATION).verdict("child") == (
        "child answers 55.0% of the problems over all efforts, parent 60.0% (-5.0 points, -10.0 to +0.0), and serves "
        "1.50x at low and 1.50x at high effort as many requests per second; "
        "it is more accurate at every rate that both serve."
    )


def test_a_model_that_is_faster_at_every_effort_is_compared_at_all_rates_of_the_other():
    apart = copy.deepcopy(EVALUATION)
    apart["comparisons"]["child"] |= {"common": above(None, None), "reachable": above(0.04, 0.01)}
    table = ComparisonTable(apart)
    assert table.section().rows[-1] == ["above the curve of parent everywhere", "-", "yes"]
    assert table.verdict("child").endswith("; it is more accurate at every rate that parent serves.")
    for reachable in (above(-0.04, -0.05), above(None, None)):  # less accurate; too slow for some of the rates
        apart["comparisons"]["child"]["reachable"] = reachable
        assert table.section().rows[-1][-1] == "no" and "more accurate" not in table.verdict("child")


def test_without_speed_nothing_is_said_of_it():
    slow = {**copy.deepcopy(EVALUATION), "throughput": None, "points": None}
    comparison = slow["comparisons"]["child"]
    comparison |= {"common": None, "reachable": None}
    for entry in comparison["efforts"].values():
        entry["relative_request_rate"] = None
    table = ComparisonTable(slow)
    assert table.verdict("child") == (
        "child answers 55.0% of the problems over all efforts, parent 60.0% (-5.0 points, -10.0 to +0.0)."
    )
    assert not any("/s" in row[0] or "above" in row[0] for row in table.section().rows)


def test_some_of_the_models_alone():
    assert ComparisonTable(EVALUATION, ("child",)).section().heading == ["", "child"]
    assert ComparisonTable(EVALUATION, ("child", "parent", "control")).section().heading == ["", "child", "parent"]


def test_the_page_holds_the_sentence_the_tables_and_the_figure_and_asks_for_nothing():
    page = EvaluationReport(EVALUATION).html({"frontier.png": b"png"})
    assert '<p class="verdict">child answers 55.0% of the problems' in page
    assert "<td>-50.0 to +50.0</td>" in page and "<h2>Generated tokens per second</h2>" in page
    assert "data:image/png;base64,cG5n" in page
    assert "http" not in page.replace('charset="utf-8"', "")
