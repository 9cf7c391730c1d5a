"""The inputs of a distillation: a child of the parent, the parent's answers, and its cached logits where asked for.

Every mistake that a user can fix is reported here, before weights are read or anything is written: a child of another
parent, one whose trained values would be lost, another tokenizer, traces of another model, a cache of something else.
"""

from __future__ import annotations

import datetime
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from puzzle_jax.convert_hf.child_of import OpenedChild, load_delta, open_child
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import PROVENANCE
from puzzle_jax.errors import PuzzleError, PuzzleWarning
from puzzle_jax.evaluate.models import Model
from puzzle_jax.model.spec import Params
from puzzle_jax.train.distill.recipe import DistillRecipe
from puzzle_jax.train.distill.teacher_cache import CACHE_FILE, TeacherCache, open_cache
from puzzle_jax.train.run import RunInputs, day_of
from puzzle_jax.train.student import Student
from puzzle_jax.train.traces.batches import TraceBatches
from puzzle_jax.train.traces.examples import Counts, TraceExample, read_examples
from puzzle_jax.train.traces.settings import DataSettings


@dataclass(frozen=True)
class DistillInputs(RunInputs[DistillRecipe]):
    """Everything that a recipe names, read and checked, except the parent's weights.

    Attributes:
      blocks: true if every layer trains alone on the parent's activations (`train.distill.blocks`).
      opened: the child.
      training: examples to train on.
      heldout: examples to evaluate on.
      counts: how many traces were kept, cut or dropped.
    """

    recipe: DistillRecipe
    model: Model
    blocks: bool
    opened: OpenedChild
    training: tuple[TraceExample, ...]
    heldout: tuple[TraceExample, ...]
    counts: Counts

    @staticmethod
    def open(recipe: DistillRecipe, today: datetime.datetime | None = None, *, blocks: bool) -> DistillInputs:
        """Reads and checks the inputs.

        Args:
          today: the date that the chat template sees; by default the day on which the run was begun.

        Raises PuzzleError for any input that is wrong.
        """
        if blocks and recipe.teacher_cache is not None:
            raise PuzzleError(f"teacher_cache is {recipe.teacher_cache}, but layers that train alone read no logits")
        model = Model.open("parent", recipe.parent, today or day_of(recipe.out), recipe.weights)
        opened = open_child(recipe.parent, recipe.child)
        found = read_examples(recipe.trace_paths, recipe.data, model.config.vocab_size, model.chat)
        training, heldout = apart(found.examples, recipe.data)
        inputs = DistillInputs(recipe, model, blocks, opened, training, heldout, found.counts)
        inputs.student.check_own(opened.differing)
        inputs.cache()
        for warning in inputs.lost_evidence():
            warnings.warn(warning, PuzzleWarning, stacklevel=2)
        return inputs

    def lost_evidence(self) -> list[str]:
        """Warnings of what the examples cannot teach, although a user may expect it: answers that no row can hold, and
        windows that no example is longer than."""
        data, counts = self.recipe.data, self.counts
        found = []
        if counts.over_long or counts.cut:
            what = f"{counts.cut} cut" if counts.cut else f"{counts.over_long} dropped (data.over_long)"
            found.append(
                f"of {counts.traces} traces {what}, since they are longer than data.row_length ({data.row_length}); "
                f"the longest has {counts.longest} tokens"
            )
        longest = max(len(example.tokens) for example in (*self.training, *self.heldout))
        child = self.opened.child
        narrowed = {
            block.window
            for block, own in zip(child.blocks, child.parent.blocks, strict=True)
            if block.window is not None and block.window != own.window and block.window >= longest
        }
        if narrowed:
            windows = " and ".join(map(str, sorted(narrowed)))
            found.append(
                f"the child has windows of {windows} where its parent sees more, but the longest example has {longest} "
                "tokens, so that training never sees what such a window cuts off; give longer traces, or raise "
                "data.row_length"
            )
        return found

    @cached_property
    def earlier(self) -> Mapping[str, Any]:
        return self.opened.provenance

    @cached_property
    def padded(self) -> bool:
        """True if the child's directory holds padding experts; the trained child's then will, too."""
        written = describe_checkpoint(self.recipe.child).config.blocks
        return any(block.num_experts > len(ids) for block, ids in zip(written, self.opened.child.kept, strict=True))

    @cached_property
    def student(self) -> Student:
        """The child as it was cut; `delta` holds what it has learnt since."""
        recipe, packed = self.recipe, self.model.description.form == "mxfp4"
        return Student(
            self.opened.child,
            recipe.train,
            recipe.remat,
            ends=not self.blocks,
            dense=recipe.dense,
            packed=packed,
        )

    def delta(self) -> Params | None:
        """The child's own values, read onto the host; None where it was not trained before."""
        if not self.opened.differing:
            return None
        return load_delta(self.recipe.parent, self.recipe.child, self.opened.differing)

    def batches(self, cache: TeacherCache | None) -> TraceBatches:
        extras = None if cache is None else cache.extras
        return TraceBatches(self.training, self.recipe.data, self.model.chat.pad_id, extras)

    @cached_property
    def identity(self) -> dict[str, object]:
        recipe, child = self.recipe, self.opened.child
        return {
            "kind": "distill-blocks" if self.blocks else "distill",
            "parent": self.model.fingerprint,
            "child": {
                "kept": child.kept,
                "windows": [block.window for block in child.blocks],
                "rope": asdict(child.viewed.rope),
                "own": self.opened.differing,
                # It changes with whatever the child was trained on.
                "record": hashlib.sha256((recipe.child / PROVENANCE).read_bytes()).hexdigest()[:16],
            },
            "data": self.batches(None).fingerprint,
            "heldout": len(self.heldout),
            "top_k": recipe.top_k if recipe.teacher_cache else None,
            "loss": asdict(recipe.loss),
            **({} if recipe.dense else {"dense": False}),  # runs begun before this setting existed go on
            **self.common_identity(),
        }

    @property
    def cache_identity(self) -> dict[str, object]:
        """Everything that the teacher's cached logits depend on besides the examples."""
        recipe = self.recipe
        return {"parent": self.model.fingerprint, "k": recipe.top_k, "temperature": recipe.loss.temperature}

    def cache(self) -> TeacherCache | None:
        """The teacher's cached logits; None if the recipe asks for none, or if they have yet to be made.

        Raises PuzzleError where `recipe.teacher_cache` holds something else.
        """
        directory = self.recipe.teacher_cache
        if directory is None:
            return None
        if (directory / CACHE_FILE).exists():
            return open_cache(directory, self.training, self.cache_identity)
        if directory.exists() and not directory.is_dir():
            raise PuzzleError(f"{directory} is a file, but must be a directory for the teacher's cache")
        if directory.exists() and any(directory.iterdir()):
            raise PuzzleError(f"{directory} holds files that are no teacher's cache; name an empty or new directory")
        if self.recipe.mesh.processes > 1:
            raise PuzzleError(f"teacher_cache is {directory}, which is not there; let one process make it first")
        return None


def apart(
    examples: Sequence[TraceExample], settings: DataSettings
) -> tuple[tuple[TraceExample, ...], tuple[TraceExample, ...]]:
    """Examples to train on, and about `settings.heldout` to evaluate on: all answers to the prompts of lowest hash.

    Raises PuzzleError where there are too few prompts for both.
    """

    def place(example: TraceExample) -> str:
        prompt = np.asarray(example.tokens[: example.prompt_length], "<i4").tobytes()
        return hashlib.sha256(f"{settings.seed} ".encode() + prompt).hexdigest()

    places = [place(example) for example in examples]
    held: set[str] = set()
    count = 0
    for name in sorted(set(places)):
        if count >= settings.heldout:
            break
        held.add(name)
        count += places.count(name)
    training = tuple(e for e, name in zip(examples, places, strict=True) if name not in held)
    if not training:
        raise PuzzleError(
            f"data.heldout is {settings.heldout}, which leaves nothing to train on: the traces hold {len(examples)} "
            f"usable answers to {len(held)} prompts"
        )
    return training, tuple(e for e, name in zip(examples, places, strict=True) if name in held)
