"""Time left, corrected by what stages took."""

import pytest

from puzzle_jax.search.hours.left import Reported, TimeLeft, spoken


def test_seconds_of_stages_that_ran_correct_those_that_are_left():
    known = TimeLeft({"trace": 10.0, "rank": 2.0, "score": 30.0, "solve": 8.0})
    assert known.finished("cost", 77.0) is None  # not predicted, so it corrects nothing
    assert known.finished("trace", 30.0) == pytest.approx(3 * 40)
    # The ranking took as long as predicted; it counts twice as much as what came before.
    assert known.finished("rank", 2.0) == pytest.approx(38 * (15 + 2) / (5 + 2))
    assert known.finished("score", None) == pytest.approx(8 * 17 / 7)
    assert known.finished("solve", 9.0) is None


def test_nothing_is_said_before_anything_was_measured():
    known = TimeLeft({"trace": 10.0, "rank": 2.0})
    assert known.finished("trace", None) is None
    assert known.finished("rank", None) is None


def test_durations_as_people_say_them():
    durations = (3.0, 42.0, 400.0, 3_570.0, 9_000.0)
    assert [spoken(seconds) for seconds in durations] == ["1 min", "1 min", "7 min", "1 h 0 min", "2 h 30 min"]


def test_short_stages_are_no_measure():
    """No time left is given until a long stage has run, and then it is corrected by that stage alone."""
    reported = Reported(lambda: TimeLeft({"trace": 10.0, "rank": 2.0, "score": 600.0}))
    assert reported.finished("cost", 299.0) == "" and reported.finished("trace", 299.0) == ""
    assert reported.finished("rank", 300.0) == ", about 25 h 0 min left"
    assert reported.finished("score", None) == ""
