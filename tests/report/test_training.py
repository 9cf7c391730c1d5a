"""The page of a training run, from made-up metrics: tables, figures, gaps, and files that cannot be shown."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from puzzle_jax.errors import PuzzleError
from puzzle_jax.report import training
from puzzle_jax.runs import read_metrics
from tests.support import present

EFFORTS = ("high", "low", "medium")


def rl_lines():
    lines = []
    for step in range(1, 13):
        line = {
            "step": step,
            "reward": [0.1, 0.9, 0.3][step % 3],
            "reward/add": 0.25,
            "pass_rate": step / 16,
            "tokens": 1000.0 + 100 * step,
            "loss": None if step in (4, 5, 7) else 0.5 - step / 100,
            "grad_norm": 0.5,
            "kl": None,
            "ratio_mean": 1.0,
            "ratio_max": 3.0,
            "sampler_gap": 0.0,
            "rollout_seconds": None if step == 6 else 6.0,
            "reward_seconds": 1.0,
            "score_seconds": 1.0,
            "update_seconds": 2.0,
            "_mine <b>$": float(step),
            **{f"pass_rate/{effort}": 0.125 for effort in EFFORTS},
        }
        if step % 4 == 0:
            line |= {"evaluation/accuracy": [0.5, 0.75, 0.625][step // 4 - 1], "evaluation/accuracy/low": 0.5}
        lines.append(line)
    return lines


def write(run: Path, lines) -> Path:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


class Tables(HTMLParser):
    """Collects rows of cells, headings, and the bytes of images."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.titles, self.images, self._in = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._in = tag
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag == "img":
            kind, data = present(dict(attrs)["src"]).split(",")
            assert kind == "data:image/png;base64"
            self.images.append(base64.b64decode(data))

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "td":
            self.rows[-1][-1] += data
        if self._in == "h2":
            self.titles.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = write(tmp_path_factory.mktemp("a run"), rl_lines())
    assert training.write_training_report(run) == run / "report.html"
    return run


@pytest.fixture
def drawn(monkeypatch):
    """Draws figures and returns them as matplotlib objects by title, instead of as bytes."""

    def of(metrics):
        figures = []
        monkeypatch.setattr(training, "png", lambda figure: figures.append(figure) or b"")
        titles = training.training_figures(metrics)
        return dict(zip(titles, figures, strict=True))

    return of


def read(run: Path):
    return training._series(read_metrics(run / "metrics.jsonl"))


def lines_of(axes):
    return {line.get_label(): line.get_ydata() for line in axes.lines}


def test_the_table_has_first_last_and_best(run):
    text = (run / "report.html").read_text()
    rows = {row[0]: row[1:] for row in Tables(text).rows if row}
    assert rows == {
        "reward": ["0.9", "0.1", "0.9", "1"],
        "pass_rate": ["0.0625", "0.75", "0.75", "12"],
        "pass_rate/low": ["0.125", "0.125", "0.125", "1"],
        "pass_rate/medium": ["0.125", "0.125", "0.125", "1"],
        "pass_rate/high": ["0.125", "0.125", "0.125", "1"],
        "evaluation/accuracy": ["0.5", "0.625", "0.75", "8"],
        "evaluation/accuracy/low": ["0.5", "0.5", "0.5", "4"],
        "loss": ["0.49", "0.38", "-", "-"],
        "tokens": ["1,100.0", "2,200.0", "-", "-"],
        "kl": ["-", "-", "-", "-"],
        "sampler_gap": ["0", "0", "0", "1"],
    }
    assert f"From {run}/metrics.jsonl: 12 logged steps, 1 to 12." in text


def test_figures_are_in_the_page_and_nothing_is_fetched(run):
    text = (run / "report.html").read_text()
    page = Tables(text)
    assert page.titles == [
        "Reward",
        "Evaluation",
        "Length",
        "Loss",
        "Entropy and KL",
        "Ratio of new to old policy",
        "Sampler against trainer",
        "Speed",
        "other",
    ]
    assert len(set(page.images)) == len(page.titles)
    for png in page.images:
        picture = imread(io.BytesIO(png))
        assert picture.shape[0] > 150 and picture.shape[1] > 300 and np.ptp(picture[..., :3]) > 0.5
    assert not re.search(r"https?:|<script|<link|<b>", text)


def test_the_same_metrics_give_the_same_page(run):
    before = (run / "report.html").read_bytes()
    training.write_training_report(run)
    assert (run / "report.html").read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "report.html"]


def test_nulls_are_gaps_and_absent_values_are_not(run, drawn):
    figures = drawn(read(run))
    (loss,) = [line for line in figures["Loss"].axes[0].lines if line.get_label() == "loss"]
    assert np.flatnonzero(np.isnan(loss.get_ydata())).tolist() == [3, 4, 6]
    accuracy = figures["Evaluation"].axes[0].lines[0]
    assert accuracy.get_xdata().tolist() == [4, 8, 12] and accuracy.get_ydata().tolist() == [0.5, 0.75, 0.625]
    assert np.isnan(lines_of(figures["Entropy and KL"].axes[0])["kl"]).all()


def test_points_without_neighbours_are_marked_on_long_lines(drawn):
    values = np.arange(100.0)
    values[[1, 50, 52]] = np.nan
    (axes,) = drawn({"loss": training.Series(np.arange(100.0), values)})["Loss"].axes
    assert axes.lines[0].get_markevery() == [0, 51]


def test_efforts_go_from_low_to_high_and_scales_fit(run, drawn):
    figures = drawn(read(run))
    assert list(lines_of(figures["Reward"].axes[1])) == ["pass_rate", *(f"pass_rate/{e}" for e in training.EFFORTS)]
    assert list(lines_of(figures["Reward"].axes[0])) == ["reward", "reward/add"]
    ratio, gap = figures["Ratio of new to old policy"].axes[0], figures["Sampler against trainer"].axes[0]
    assert ratio.get_yscale() == "log" and gap.get_yscale() == "linear"  # a gap of 0 has no logarithm
    assert {axes.get_xlim() for figure in figures.values() for axes in figure.axes} == {(0.67, 12.33)}


def test_parts_of_a_step_are_stacked_shares(run, drawn):
    (axes,) = drawn(read(run))["Speed"].axes
    tops = {patch.get_label(): patch.get_data() for patch in axes.patches}
    assert list(tops) == ["rollout_seconds", "reward_seconds", "score_seconds", "update_seconds"]
    for (values, edges, baseline), (low, high) in zip(
        tops.values(), [(0, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 1)], strict=True
    ):
        gap = np.arange(12) == 5
        np.testing.assert_allclose(values, np.where(gap, np.nan, high))
        np.testing.assert_allclose(baseline[~gap], low)
        np.testing.assert_array_equal(edges, np.arange(13) + 0.5)


def test_unknown_metrics_come_last_by_their_names(run, drawn):
    figure = drawn(read(run))["other"]
    assert [axes.get_title() for axes in figure.axes] == [r" _mine <b>\$"]
    many = {f"x{number:02}": training.Series(np.ones(1), np.ones(1)) for number in range(13)}
    figures = drawn(many)
    assert {title: len(figure.axes) for title, figure in figures.items()} == {"other 1": 12, "other 2": 1}


def test_a_distillation_has_its_own_page(tmp_path, drawn):
    lines = [{"step": 10, "loss": 2.0, "grad_norm": 1.0}, {"step": 20, "loss": 1.0, "grad_norm": 0.5}]
    lines[1] |= {"evaluation/kl": 0.25, "evaluation/next_token": 1.5}
    page = Tables(training.write_training_report(write(tmp_path, lines)).read_text())
    assert page.rows[1:] == [
        ["evaluation/kl", "0.25", "0.25", "0.25", "20"],
        ["evaluation/next_token", "1.5", "1.5", "1.5", "20"],
        ["loss", "2", "1", "1", "20"],
    ]
    assert page.titles == ["Evaluation", "Loss"]
    assert [len(figure.axes) for figure in drawn(read(tmp_path)).values()] == [2, 2]


def test_numbers_and_names_of_any_kind_are_shown(tmp_path):
    lines = [
        {"step": 0, "grad_norm": None, "rollout_seconds": 0.0, "loss": 1e308, "$x\n\ud800": -3e38},
        {"step": 5, "loss": float("nan"), "$x\n\ud800": 3e38, "huge": 10**400, "": 1},
    ]
    page = Tables(training.write_training_report(write(tmp_path, lines)).read_text())
    assert page.rows[1:] == [["loss", "-", "-", "-", "-"]] and page.titles == ["Loss", "Speed", "other"]


def test_a_run_without_metrics_is_a_page(tmp_path):
    page = Tables(training.write_training_report(write(tmp_path, [{"step": 3}])).read_text())
    assert page.rows == [[]] and page.titles == []


def test_a_torn_last_line_is_passed_over(tmp_path):
    path = write(tmp_path, [{"step": 1, "loss": 1.0}]) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "loss": 0.')
    assert read(tmp_path)["loss"].values.tolist() == [1.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "metrics.jsonl cannot be read: No such file or directory"),
        (b"", "metrics.jsonl has no line yet"),
        (b'{"step": 1', "metrics.jsonl has no line yet"),
        (b'{"step": 1}\nnothing\n', "metrics.jsonl, line 2 is no object with a step"),
        (b'{"step": 1}\n\xff\n', "metrics.jsonl, line 2 is no object with a step"),
        (b'[1]\n{"step": 1}\n', "metrics.jsonl, line 1 is no object with a step"),
        (b'{"loss": 1}\n', "metrics.jsonl, line 1 is no object with a step"),
        (b'{"step": true}\n', "metrics.jsonl, line 1 is no object with a step"),
        (b'{"step": 1e400}\n', "metrics.jsonl, line 1 is no object with a step"),
        (b"[" * 100_000 + b"\n", "metrics.jsonl, line 1 is no object with a step"),
        (b'{"step": 1, "loss": "low"}\n', "metrics.jsonl, line 1: 'loss' is 'low', but must be a number or null"),
        (b'{"step": 1, "loss": true}\n', "metrics.jsonl, line 1: 'loss' is True, but must be a number or null"),
    ],
)
def test_files_that_cannot_be_shown_are_told_in_a_sentence(tmp_path, content, said):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(PuzzleError) as raised:
        training.write_training_report(tmp_path)
    assert said in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert not (tmp_path / "report.html").exists()
