"""The page of a search, from made-up results: its contents, and that it loads nothing else."""

import base64
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from puzzle_jax.report import search_figures as figures
from puzzle_jax.report.page import SearchPage, stage_records
from tests.report.test_table import REPORT


def layer(experts, window):
    return {"num_local_experts": experts, "sliding_window": window}


PARENT, CHILD = [layer(8, 4), layer(8, None), layer(8, 4)], [layer(6, 4), layer(8, 16), layer(5, 4)]
SCORE = {"kl": 0.25, "kl_se": 0.01}
LAYERS = [
    {
        "experts": [
            {"count": 8, "score": None},
            {"count": 6, "score": {"kl": 0.5}},
            {"count": 6, "score": {"kl": 0.1}},
        ],
        "windows": [None, 16] if full else [4],
        "window_scores": [None, {"kl": 0.03}] if full else [None],
    }
    for full in (False, True, False)
]
SOLUTIONS = {
    "chosen": 1,
    "rank_correlation": 0.5,
    "pool": [
        {
            "name": "solution 1",
            "score": 0.2,
            "validation": SCORE,
            "expected": 0.25,
            "above_best": {"mean": 0.01, "se": 0.002},
        },
        {
            "name": "experts_only",
            "score": 0.3,
            "validation": {**SCORE, "kl": 0.24},
            "expected": 0.125,
            "above_best": {"mean": 0.0, "se": 0.0},
        },
    ],
    "frontier": [{"speedup": 1.0, "score": 0.0, "label": ""}, {"speedup": 1.4, "score": 0.2, "label": ""}],
    "uniform": [{"speedup": 1.2, "score": 0.6, "label": ""}],
    "parent": {"layers": PARENT},
}
REFINED = {
    "child": {"layers": CHILD},
    "tried": [
        {"step": "rescore 1", "accepted": False, "confirmation": {"mean": -0.01, "se": 0.02}},
        {"step": "swap", "accepted": False, "confirmation": None},
    ],
}


def page() -> SearchPage:
    seconds = {
        "chat & more": {"parent": {"attention": 2.0, "experts": 1.0}, "child": {"attention": 1.0, "experts": 0.5}}
    }
    stages = {"cost": {"seconds": 1.25, "jax": "0.0"}, "score": {"seconds": 12.5, "jax": "0.0"}}
    return SearchPage(REPORT, {"layers": LAYERS}, SOLUTIONS, REFINED, seconds, {"speedup": 1.4, "score": 0.2}, stages)


def test_the_page_holds_everything_and_fetches_nothing(tmp_path: Path):
    page().write(tmp_path)
    text = (tmp_path / "report.html").read_text()
    for part in (
        "held-out KL",
        "<td>experts only</td><td>0.3000</td><td>0.2400 ±0.0100</td>",
        "The search took experts only. Spearman&#39;s rank correlation is 0.50.",
        "rescore 1: KL -0.0100 ±0.0200 on confirmation traces, refused.",
        "swap: nothing better was found.",
        "chat &amp; more",
        "<td>score</td><td>12.5</td>",
    ):
        assert part in text, part
    assert not re.search(r"https?:|<script|<link", text)
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert sorted(map(base64.b64decode, images)) == sorted(files.values())
    assert set(files) == {"scores.png", "architecture.png", "frontier.png", "predicted.png", "costs-chat & more.png"}
    for name in files:
        picture = imread(tmp_path / "figures" / name)
        assert picture.shape[0] > 150 and picture.shape[1] > 400 and np.ptp(picture[..., :3]) > 0.5, name


def test_the_finalist_that_was_chosen_is_named():
    names = [{"name": "solution 1"}, {"name": "solution 4"}, {"name": "pool 2"}]
    told = replace(page(), finalists={"steps": 60, "chosen": 1, "finalists": names}).html(page().figures())
    assert "After 60 steps of training, solution 4 had the lowest KL of 3 finalists and went on." in told


def test_figures_are_the_same_for_the_same_numbers():
    assert page().figures() == page().figures()
    changed = [{**PARENT[0], "sliding_window": 2}, *CHILD[1:]]
    assert figures.architecture(PARENT, changed) != figures.architecture(PARENT, CHILD)


def test_stages_without_a_record_are_left_out(tmp_path: Path):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "stage.json").write_text('{"seconds": 2.0, "jax": "1"}')
    found = stage_records(tmp_path, [("cost", "cost"), ("trace", "traces")])
    assert found == {"trace": {"seconds": 2.0, "jax": "1"}}
