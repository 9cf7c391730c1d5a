"""Time left, corrected by what stages took."""

import pytest

from puzzle_jax.search.hours.left import TimeLeft, spoken


def test_seconds_of_stages_that_ran_correct_those_that_are_left():
    left = TimeLeft({"trace": 10.0, "rank": 2.0, "score": 30.0, "solve": 8.0})
    assert left.finished("cost", 77.0) is None  # not predicted, and so no measure of anything
    assert left.finished("trace", 30.0) == pytest.approx(3 * 40)
    # The ranking took as predicted; it counts twice as much as what came before.
    assert left.finished("rank", 2.0) == pytest.approx(38 * (15 + 2) / (5 + 2))
    assert left.finished("score", None) == pytest.approx(8 * 17 / 7)
    assert left.finished("solve", 9.0) is None


def test_nothing_is_said_before_anything_was_measured():
    left = TimeLeft({"trace": 10.0, "rank": 2.0})
    assert left.finished("trace", None) is None
    assert left.finished("rank", None) is None


def test_durations_as_people_say_them():
    durations = (3.0, 42.0, 400.0, 3_570.0, 9_000.0)
    assert [spoken(seconds) for seconds in durations] == ["1 min", "1 min", "7 min", "1 h 0 min", "2 h 30 min"]
