"""Pages as a browser shows them on a phone and on a desktop; skipped where there is no Chromium.

If PUZZLE_SCREENSHOTS names a directory, screenshots are kept there for inspection.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from puzzle_jax.report.comparison import ComparisonTable
from puzzle_jax.report.evaluation import EvaluationReport
from puzzle_jax.report.figures import frontier_figure
from puzzle_jax.report.html import render
from puzzle_jax.run.page import COLUMNS
from tests.report.test_evaluation import EVALUATION
from tests.support import present
from tests.waiting import HANG

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=3000"
)
HEIGHT = 4000

# Goes before anything else on the page, and records whatever goes wrong while it loads.
WATCH = """<script>
window.wrong = [];
console.error = (...words) => window.wrong.push("console: " + words.join(" "));
window.addEventListener("error", e => window.wrong.push("error: " + (e.message || e.target.outerHTML)), true);
</script>"""

# Runs after the page has loaded, and reports its errors, images and width, and which text is covered or too small.
LOOK = """<script>
window.addEventListener("load", () => {
  const covered = [], small = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement, text = node.textContent.trim();
    if (!text || parent.closest("script, style, details:not([open]) > :not(summary), svg")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const scrolled = parent.closest("[data-scrolls], .scroll, figure, pre") || document.body;
    for (const box of range.getClientRects()) {
      const x = box.left + box.width / 2, y = box.top + box.height / 2;
      const outside = scrolled.getBoundingClientRect();
      if (!box.width || x < outside.left || x > outside.right || x < 0 || x > innerWidth) continue;
      texts += 1;
      const top = document.elementFromPoint(x, y);
      if (!top || !(top.contains(parent) || parent.contains(top))) covered.push(text);
    }
    if (parseFloat(getComputedStyle(parent).fontSize) < 11) small.push(text);
  }
  const images = [...document.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width]);
  parent.postMessage(JSON.stringify({
    wrong: window.wrong, covered, small, images, texts,
    width: innerWidth, needed: document.documentElement.scrollWidth,
  }), "*");
});
</script>"""

# A window is at least 500 pixels wide; a frame within it can be as narrow as a phone.
FRAME = """<!doctype html><body style="margin: 0"><script>
addEventListener("message", event => document.body.dataset.found = event.data);
</script><iframe src="page.html" style="width: WIDTHpx; height: HEIGHTpx; border: 0"></iframe></body>"""


def evaluation_page() -> str:
    return EvaluationReport(EVALUATION).html({})


def with_all_models(value: Any) -> Any:
    """An evaluation in which every model of a run has the child's numbers."""
    if not isinstance(value, dict):
        return value
    found = {name: with_all_models(each) for name, each in value.items()}
    return found | {name: found["child"] for name in COLUMNS if name != "parent"} if "child" in found else found


def run_page() -> str:
    """The page of a run with all its models."""
    evaluation = with_all_models(EVALUATION)
    section = ComparisonTable(evaluation, COLUMNS).section()
    picture = frontier_figure(EVALUATION["points"], "parent")
    return render(
        "run",
        verdict=ComparisonTable(evaluation, COLUMNS).verdict("final"),
        heading=section.heading,
        rows=section.rows,
        remarks=section.remarks,
        images={"frontier.png": picture, "architecture.png": picture},
        predicted=[["KL to the parent", "0.0663", "0.0755"], ["tokens/s over the parent's, chat", "1.40x", "1.30x"]],
        took=[["search", "311"], ["distill", "120"], ["all", "431"]],
        serve="puzzle generate --model runs/road/child --effort high --cache_dtype float8_e4m3fn PROMPT",
    )


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@needs_chromium
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("page", [evaluation_page, run_page])
def test_a_page_opens_offline_and_shows_all_its_text(page, width, tmp_path):
    found = seen(page(), width, tmp_path)
    assert found["width"] == width and found["needed"] <= width
    assert found["wrong"] == [] and requests(page()) == []
    assert found["texts"] > 40 and found["covered"] == [] and found["small"] == []
    assert all(natural > 0 and 0.5 * width < drawn <= width for natural, drawn in found["images"])
    if where := os.environ.get("PUZZLE_SCREENSHOTS"):
        (tmp_path / "page.html").write_text(page())
        picture = Path(where).resolve() / f"{page.__name__}-{width}.png"
        _chromium(tmp_path / "frame.html", width, f"--screenshot={picture}")


@needs_chromium
def test_what_is_wrong_with_a_page_is_found(tmp_path):
    page = """<html><head></head><body style="font-size: 16px"><p>here</p><p style="font-size: 8px">tiny</p>
    <div style="width: 700px">wide</div><img src="missing.png"><script>console.error("no")</script>
    <div style="position: absolute; top: 0; width: 300px; height: 40px; background: white"></div></body></html>"""
    found = seen(page, 390, tmp_path)
    assert found["covered"] == ["here"] and found["small"] == ["tiny"] and found["needed"] == 708
    assert found["wrong"][0] == "console: no" and "missing.png" in found["wrong"][1]
    assert found["images"][0][0] == 0
    styled = '<style>@import "a.css"; p { background: url(b.png) }</style><link href="c.css"><a href="https://d.e">'
    assert requests(page + styled) == ["missing.png", "c.css", "a.css", "b.png"]


def requests(page: str) -> list[str]:
    """Addresses that a page would load by itself; links are not among them."""
    loading = re.findall(
        r"""<(?:img|script|link|iframe|source|object|video)\b[^>]*\s(?:src|href|data)=["']([^"']*)""", page
    )
    styles = re.findall(r"""(?:@import\s*|url\()["']?([^"')]+)""", page)
    return [address for address in (*loading, *styles) if not address.startswith(("data:", "#"))]


def seen(page: str, width: int, directory: Path) -> dict[str, Any]:
    """A browser's report about a page shown at a width."""
    path, frame = directory / "page.html", directory / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)).replace("HEIGHT", str(HEIGHT)))
    path.write_text(re.sub("<head>", "<head>" + WATCH, page, count=1).replace("</body>", LOOK + "</body>"))
    shown = re.search(r'data-found="([^"]*)"', _chromium(frame, width, "--dump-dom"))
    return json.loads(html.unescape(present(shown)[1]))


def _chromium(path: Path, width: int, *options: str) -> str:
    home, size = path.parent / "profile", f"--window-size={max(width, 500)},{HEIGHT}"
    command = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={home}", size, *options, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=True).stdout
