"""Which answers of a reinforcement learning run become transcripts, and when; `transcript_files` writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import jax

from puzzle_jax.train.grpo import transcript_files as transcripts
from puzzle_jax.train.grpo.policy_batches import Judged


@dataclass
class StepTranscripts:
    """Transcripts of a run, written by its primary process.

    Attributes:
      directory: of the files.
      every: steps between two that are shown, of which the first step is one; 0: none.
      groups: of a step that are shown.
    """

    directory: Path
    every: int
    groups: int
    _begun: bool = field(default=False, init=False)

    def begin(self, step: int) -> None:
        """Called before each step is made; deletes what an earlier process showed of steps that are made again."""
        if not self._begun and jax.process_index() == 0:
            transcripts.drop_after(self.directory, step - 1)
        self._begun = True

    def add(self, step: int, judged: Judged) -> None:
        """Writes the step's answers, if it is one that is shown."""
        if jax.process_index() or not self.every or (step != 1 and step % self.every):
            return
        transcripts.write_transcripts(self.directory, step, shown(judged, self.groups))


def shown(judged: Judged, groups: int) -> list[transcripts.Transcript]:
    """Transcripts of all answers of the first `groups` groups."""
    return [
        transcripts.Transcript(
            task=rollout.prompt.problem.task,
            effort=rollout.prompt.effort,
            prompt=rollout.prompt.problem.prompt,
            answer=rollout.prompt.problem.answer,
            analysis=rollout.answer.analysis,
            final=rollout.answer.final,
            reward=rollout.judgement.reward,
            reason=rollout.judgement.reason,
            advantage=float(advantage),
            tokens=rollout.length,
            truncated=rollout.generated.truncated,
            group=group,
        )
        for group, (rollouts, advantages) in enumerate(zip(judged.groups[:groups], judged.advantages, strict=False))
        for rollout, advantage in zip(rollouts, advantages, strict=True)
    ]
