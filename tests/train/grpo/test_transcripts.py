"""Sample answers as files: contents of the JSONL and the page, whatever a model wrote."""

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from puzzle_jax.train.grpo.transcripts import Transcript, drop_after, write_transcripts

GOOD = Transcript(
    task="add",
    effort="low",
    prompt="2 + 3?",
    answer="5",
    analysis="2 + 3 = 5\n",
    final="5",
    reward=1.0,
    reason=None,
    advantage=0.5,
    tokens=12,
    truncated=False,
    group=7,
)
WRONG = replace(GOOD, final="6", reward=0.25, advantage=-0.5, tokens=30, truncated=True)
LOST = replace(GOOD, task="code", effort="high", prompt="run", answer="", reward=None, advantage=0.0, group=8)
LOST = replace(LOST, reason="timed out after 2 s & more", tokens=18, analysis="x" * 601)
VILE = '</script></div><script>alert("1")</script>&amp;<!--\x00\x1b[31m\r\n\ttab\ud800 \u202egnp.\u202c\u2028 שלום \x85'
SEEN = (
    '</script></div><script>alert("1")</script>&amp;<!--U+0000U+001B[31mU+000D\n\ttabU+D800 '
    "U+202Egnp.U+202CU+2028 שלום U+0085"
)
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "details", "summary", "div", "i", "section"}


class Page(HTMLParser):
    """Collects tags, the text of paragraphs and headings, and (summary, unfolded, text) of each `details` element."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.told, self.folded = set(), [], []
        self._open: list[str] = []
        self._unfolded = False
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "meta":
            return
        self._open.append(tag)
        if tag in ("h1", "h2", "p"):
            self.told.append("")
        if tag == "details":
            self._unfolded = "open" in dict(attrs)
        if tag == "summary":
            self.folded.append(["", self._unfolded, ""])

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "summary" in self._open:
            self.folded[-1][0] += data
        elif "div" in self._open:
            self.folded[-1][2] += data
        elif {"h1", "h2", "p"} & {*self._open}:
            self.told[-1] += data


def rows(path: Path):
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def test_jsonl_holds_what_was_given(tmp_path: Path):
    given = [GOOD, WRONG, LOST, replace(GOOD, prompt=VILE, analysis=VILE, reason=VILE)]
    write_transcripts(tmp_path / "new" / "samples", 120, given)
    held = rows(tmp_path / "new" / "samples" / "step-000120.jsonl")
    assert held == [asdict(one) for one in given]
    assert [Transcript(**row) for row in held] == given


def test_what_is_not_finite_is_null(tmp_path: Path):
    write_transcripts(tmp_path, 1, [replace(GOOD, reward=float("nan"), advantage=float("inf"))])
    (row,) = rows(tmp_path / "step-000001.jsonl")
    assert row == asdict(GOOD) | {"reward": None, "advantage": None}


def test_the_page_groups_answers_by_prompt(tmp_path: Path):
    write_transcripts(tmp_path, 120, [GOOD, LOST, WRONG])
    page = Page((tmp_path / "step-000120.html").read_text())
    assert page.told == [
        "Answers of step 120",
        "2 prompts, 3 answers; means: reward 0.625 (1 lost), 20.0 tokens, 33.3% truncated",
        "group 7: add, low effort",
        "2 answers; means: reward 0.625 (0 lost), 21.0 tokens, 50.0% truncated",
        "reward 1, advantage +0.5, 12 tokens",
        "reward 0.25, advantage -0.5, 30 tokens, truncated",
        "group 8: code, high effort",
        "1 answers; means: reward - (1 lost), 18.0 tokens, 0.0% truncated",
        "reward lost (timed out after 2 s & more), advantage +0, 18 tokens",
    ]
    assert page.folded == [
        ["prompt, 6 characters", True, "2 + 3?"],
        ["right answer, 1 characters", True, "5"],
        ["analysis, 10 characters", True, "2 + 3 = 5\n"],
        ["final, 1 characters", True, "5"],
        ["analysis, 10 characters", True, "2 + 3 = 5\n"],
        ["final, 1 characters", True, "6"],
        ["prompt, 3 characters", True, "run"],
        ["analysis, 601 characters", False, "x" * 601],
        ["final, 1 characters", True, "5"],
    ]


def test_prompts_that_share_a_number_by_mistake_are_all_shown(tmp_path: Path):
    write_transcripts(tmp_path, 1, [GOOD, replace(GOOD, prompt="another")])
    page = Page((tmp_path / "step-000001.html").read_text())
    assert [text for name, _, text in page.folded if name.startswith("prompt")] == ["2 + 3?", "another"]


def test_nothing_that_a_model_writes_leaves_its_place(tmp_path: Path):
    vile = replace(
        GOOD, task=VILE, effort=VILE, prompt=VILE, answer=VILE, analysis=VILE, final=VILE, reward=None, reason=VILE
    )
    write_transcripts(tmp_path, 1, [vile])
    text = (tmp_path / "step-000001.html").read_bytes().decode()
    page = Page(text)
    assert page.tags == TAGS
    assert [seen for _, _, seen in page.folded] == [SEEN] * 4
    assert page.told[2] == f"group 7: {SEEN}, {SEEN} effort"
    assert page.told[-1] == f"reward lost ({SEEN}), advantage +0.5, 12 tokens"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]", text)
    assert not re.search(r"<script|https?:|<link", text)


def test_a_page_without_answers(tmp_path: Path):
    write_transcripts(tmp_path, 3, [])
    assert Page((tmp_path / "step-000003.html").read_text()).told == ["Answers of step 3", "0 prompts, no answers"]
    assert (tmp_path / "step-000003.jsonl").read_bytes() == b""


def test_the_same_answers_give_the_same_bytes_and_others_replace_them(tmp_path: Path):
    def written(transcripts):
        write_transcripts(tmp_path, 5, transcripts)
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    first = written([GOOD, WRONG])
    assert set(first) == {"step-000005.jsonl", "step-000005.html"}
    assert written([GOOD, WRONG]) == first
    other = written([GOOD])
    assert set(other) == set(first) and all(other[name] != first[name] for name in first)


@pytest.mark.parametrize("name", ["step-000004.txt", "step-4.jsonl", "notes", "xstep-000004.html", "step-000004.html~"])
def test_later_steps_are_dropped_and_nothing_else(tmp_path: Path, name: str):
    for step in (2, 3, 4, 1_000_000):
        write_transcripts(tmp_path, step, [GOOD])
    (tmp_path / name).write_text("kept")
    (tmp_path / ".step-000004.html.partial-123").write_text("torn")
    (tmp_path / ".step-000002.html.partial-123").write_text("torn")
    drop_after(tmp_path, 3)
    left = {path.name for path in tmp_path.iterdir()}
    steps = {f"step-{step:06d}.{kind}" for step in (2, 3) for kind in ("jsonl", "html")}
    assert left == steps | {name, ".step-000002.html.partial-123"}
    drop_after(tmp_path / "missing", 3)
