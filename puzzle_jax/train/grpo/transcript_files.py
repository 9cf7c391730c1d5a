"""Answers of reinforcement learning as files: JSONL for programs, a page for people.

    DIRECTORY/step-000120.jsonl   an object per answer, in the order given; null stands for what is no finite number
    DIRECTORY/step-000120.html    the same by prompt; opens offline

Rewards are read before they are trusted: a page shows what a reward was given for. Texts are a model's and may hold
anything. The JSONL has them as they are (in ASCII, with escapes); the page runs and fetches nothing, and shows
characters that cannot be seen, or that change the order of others, by their numbers.

The same answers give the same bytes, and a step that is written again replaces its files. Left out: links between
pages, which would depend on what else there is.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from puzzle_jax.files import PARTIAL, write_beside

_OPEN = 600
"""Texts of up to so many characters are unfolded."""

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Controls, half surrogate pairs, marks of direction and joining: all but tab and newline."""

_FILE = re.compile(rf"\.?step-(\d{{6,}})\.(?:jsonl|html)(?:{re.escape(PARTIAL)}\d+)?")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-top: 1px solid #999; }
div.text { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 0.3rem 0.6rem; }
div.text i { color: #a00; font-size: 0.8em; } summary, p.note { color: #555; }
section { border-left: 4px solid #bbb; padding-left: 0.8rem; margin: 1rem 0; }
section.up { border-color: #009e73; } section.down { border-color: #d55e00; }
"""


@dataclass(frozen=True)
class Transcript:
    """An answer and what it was worth.

    Attributes:
      task, effort: of the problem, and the reasoning effort that was asked for.
      prompt: the user's message.
      answer: the right one; "" where none is known.
      analysis, final: what the model wrote.
      reward: None where the reward function failed.
      reason: why it failed.
      advantage: what the answer counted in the update.
      tokens: that were generated.
      truncated: whether the limit of tokens ended it.
      group: answers to one prompt share a number.
    """

    task: str
    effort: str
    prompt: str
    answer: str
    analysis: str
    final: str
    reward: float | None
    reason: str | None
    advantage: float
    tokens: int
    truncated: bool
    group: int


def write_transcripts(directory: Path, step: int, transcripts: Sequence[Transcript]) -> None:
    """Writes the two files of a step, each whole or not at all; makes the directory when it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [asdict(t) | {"reward": _finite(t.reward), "advantage": _finite(t.advantage)} for t in transcripts]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_beside(directory / f"step-{step:06d}.jsonl", lines.encode())
    write_beside(directory / f"step-{step:06d}.html", _page(step, transcripts).encode())


def drop_after(directory: Path, step: int) -> None:
    """Deletes the files of later steps, for a run that goes on from `step`; other files stay."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        found = _FILE.fullmatch(path.name)
        if found and int(found[1]) > step:
            path.unlink()


def _page(step: int, transcripts: Sequence[Transcript]) -> str:
    groups: dict[tuple[int, str, str, str, str], list[Transcript]] = {}
    for one in transcripts:
        groups.setdefault((one.group, one.task, one.effort, one.prompt, one.answer), []).append(one)
    body = "\n".join(part for members in groups.values() for part in _group(members))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>step {step}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>Answers of step {step}</h1>\n"
        f'<p class="note">{len(groups)} prompts, {_means(transcripts)}</p>\n{body}\n</body></html>\n'
    )


def _group(members: Sequence[Transcript]) -> Iterator[str]:
    """A prompt and its answers."""
    first = members[0]
    yield f"<h2>group {first.group}: {_safe(first.task)}, {_safe(first.effort)} effort</h2>"
    yield f'<p class="note">{_means(members)}</p>'
    yield _folded("prompt", first.prompt)
    if first.answer:
        yield _folded("right answer", first.answer)
    for one in members:
        reward = f"lost ({_safe(one.reason or 'no reason given')})" if one.reward is None else f"{one.reward:.4g}"
        said = f"reward {reward}, advantage {one.advantage:+.4g}, {one.tokens} tokens"
        side = "up" if one.advantage > 0 else "down" if one.advantage < 0 else "even"
        yield f'<section class="{side}"><p>{said}{", truncated" if one.truncated else ""}</p>'
        yield f"{_folded('analysis', one.analysis)}{_folded('final', one.final)}</section>"


def _means(transcripts: Sequence[Transcript]) -> str:
    """Means over answers; that of rewards over those that have one."""
    if not transcripts:
        return "no answers"
    count = len(transcripts)
    rewards = [one.reward for one in transcripts if one.reward is not None]
    reward = f"{sum(rewards) / len(rewards):.4g}" if rewards else "-"
    tokens = sum(one.tokens for one in transcripts) / count
    truncated = sum(one.truncated for one in transcripts) / count
    return (
        f"{count} answers; means: reward {reward} ({count - len(rewards)} lost), {tokens:.1f} tokens, "
        f"{truncated:.1%} truncated"
    )


def _folded(name: str, text: str) -> str:
    unfolded = " open" if len(text) <= _OPEN else ""
    summary = f"<summary>{name}, {len(text)} characters</summary>"
    return f'<details{unfolded}>{summary}<div class="text">{_safe(text)}</div></details>'


def _safe(text: str) -> str:
    """Text for HTML, with the numbers of characters that are not seen."""
    return _UNSEEN.sub(lambda found: f"<i>U+{ord(found[0]):04X}</i>", html.escape(text))


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
