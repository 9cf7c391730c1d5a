"""Answers of reinforcement learning as files: JSONL for programs, a page for people.

    DIRECTORY/step-000120.jsonl   an object per answer, in the order given; null stands for a number that is not finite
    DIRECTORY/step-000120.html    the same, grouped by prompt; opens offline

Rewards should be inspected before they are trusted: a page shows what each was given for. Texts come from a model and
may contain anything. The JSONL holds them unchanged (in ASCII, with escapes); the page runs and fetches nothing, and
shows characters that are invisible, or that reorder others, by their code points.

The same answers give byte-identical files, and a step that is written again replaces its files. Left out: links between
pages, which would depend on the other pages there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax

from puzzle_jax.files import PARTIAL, write_beside
from puzzle_jax.report.html import render
from puzzle_jax.train.grpo.policy_batches import RewardedGroups

_UNFOLDED = 600
"""Texts of up to this many characters are shown unfolded."""

_FILE = re.compile(rf"\.?step-(\d{{6,}})\.(?:jsonl|html)(?:{re.escape(PARTIAL)}\d+)?")


@dataclass
class StepTranscripts:
    """Transcripts of a run, written by its primary process.

    Attributes:
      directory: directory of the files.
      every: shows the first step and every step that is a multiple of this number; 0 shows none.
      groups: number of groups of a step that are shown.
    """

    directory: Path
    every: int
    groups: int
    _begun: bool = field(default=False, init=False)

    def begin(self, step: int) -> None:
        """Must be called before each step; deletes an earlier process's files of steps that are run again."""
        if not self._begun and jax.process_index() == 0:
            drop_after(self.directory, step - 1)
        self._begun = True

    def add(self, step: int, groups: RewardedGroups) -> None:
        """Writes the step's answers, if the step is one that is shown."""
        if jax.process_index() or not self.every or (step != 1 and step % self.every):
            return
        write_transcripts(self.directory, step, shown(groups, self.groups))


def shown(groups: RewardedGroups, most: int) -> list[Transcript]:
    """Transcripts of all answers of the first `most` groups."""
    return [
        Transcript(
            task=rollout.prompt.problem.task,
            effort=rollout.prompt.effort,
            prompt=rollout.prompt.problem.prompt,
            answer=rollout.prompt.problem.answer,
            analysis=rollout.answer.analysis,
            final=rollout.answer.final,
            reward=rollout.outcome.reward,
            reason=rollout.outcome.reason,
            advantage=float(advantage),
            tokens=rollout.length,
            truncated=rollout.generated.truncated,
            group=group,
        )
        for group, (rollouts, advantages) in enumerate(zip(groups.groups[:most], groups.advantages, strict=False))
        for rollout, advantage in zip(rollouts, advantages, strict=True)
    ]


@dataclass(frozen=True)
class Transcript:
    """An answer with its reward and advantage.

    Attributes:
      answer: the correct answer; "" where none is known.
      analysis, final: what the model wrote.
      reward: None where the reward function failed.
      reason: why it failed.
      advantage: advantage of the answer in the update.
      group: number of the group; answers to one prompt share it.
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
    """Writes the two files of a step, each whole or not at all; creates the directory if needed."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [asdict(t) | {"reward": _finite(t.reward), "advantage": _finite(t.advantage)} for t in transcripts]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_beside(directory / f"step-{step:06d}.jsonl", lines.encode())
    write_beside(directory / f"step-{step:06d}.html", _page(step, transcripts).encode())


def drop_after(directory: Path, step: int) -> None:
    """Deletes the files of later steps, for a run that resumes from `step`; other files stay."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        found = _FILE.fullmatch(path.name)
        if found and int(found[1]) > step:
            path.unlink()


def _page(step: int, transcripts: Sequence[Transcript]) -> str:
    groups: dict[tuple[object, ...], list[Transcript]] = {}
    for one in transcripts:
        groups.setdefault((one.group, one.task, one.effort, one.prompt, one.answer), []).append(one)
    keys = ("number", "task", "effort", "prompt", "answer")
    shown = [
        dict(zip(keys, of, strict=True)) | {"means": _means(members), "members": members}
        for of, members in groups.items()
    ]
    return render("transcripts", step=step, means=_means(transcripts), groups=shown, unfolded=_UNFOLDED)


def _means(transcripts: Sequence[Transcript]) -> str:
    """Describes means over answers; the mean reward is over answers that have one."""
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


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
