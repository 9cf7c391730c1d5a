"""Distillation of a child on its parent's own answers: from directories to a trained child's directory.

    OUT/run.json, checkpoints/, metrics.jsonl   the run (`train.loop`)
    OUT/child/                                  the trained child, in Hugging Face form, with its provenance

Everything that a user can mend is refused before weights are read: a child of another parent, another tokenizer, traces
of another model, a directory that holds something else. What is trained goes out in bfloat16; frozen experts and routers
are copied from the parent's files and stay its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.child_of import OpenedChild, load_delta, open_child
from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.calibrate import calibrate_cache
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.network import compute_dtype
from puzzle_jax.model.sharding import make_training_mesh, on_mesh
from puzzle_jax.model.spec import Params
from puzzle_jax.model.stacked import unstack_params
from puzzle_jax.runs import open_run
from puzzle_jax.tasks import Chat
from puzzle_jax.train.distill_recipe import DistillRecipe
from puzzle_jax.train.loop import Job, Trained, train
from puzzle_jax.train.objectives import Distillation, Fixed, Loss, LossSettings
from puzzle_jax.train.optimizer import make_optimizer
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.step import Shardings, TrainState, init_state, make_step
from puzzle_jax.train.student import Student
from puzzle_jax.train.teacher_cache import CACHE_FILE, TeacherCache, make_cache, open_cache
from puzzle_jax.train.trace_batches import TraceBatches, evaluation_batches
from puzzle_jax.train.trace_examples import TraceExample, read_examples
from puzzle_jax.train.trace_settings import TraceSettings

CHILD = "child"
_CALIBRATION_ANSWERS = 256


class Objective(Protocol):
    """What is minimised: sums over a micro-batch."""

    def __call__(self, trained: Params, fixed: Fixed, batch: Packed, key: Any = None) -> Loss: ...


@dataclass(frozen=True)
class Distiller:
    """A run, its inputs read and checked.

    Attributes:
      recipe: all settings.
      opened: the child.
      chat: of the parent.
      examples: to train on.
      heldout: to evaluate on.
      placement: of arrays.
      blocks: trains every layer alone on the parent's activations, in place of the whole (`train.blocks`).
    """

    recipe: DistillRecipe
    opened: OpenedChild
    chat: Chat
    examples: Sequence[TraceExample]
    heldout: Sequence[TraceExample]
    placement: Placement
    blocks: bool = False

    @staticmethod
    def open(recipe: DistillRecipe, console: Console, *, blocks: bool = False) -> Distiller:
        """Reads and checks all inputs but the parent's weights.

        Raises PuzzleError for whatever is wrong with them, and where `recipe.out` holds something else.
        """
        opened = open_child(recipe.parent, recipe.child)
        chat = Chat.load(recipe.parent)
        settings = recipe.data.of(recipe.traces)
        found = read_examples(settings, opened.child.parent.vocab_size, chat)
        console.print(f"traces: {found.counts}", highlight=False)
        training, heldout = apart(found.examples, recipe.data.heldout, settings)
        mesh = None
        if recipe.mesh.devices > 1 or recipe.mesh.processes > 1:
            mesh = make_training_mesh(recipe.mesh.data, recipe.mesh.sequence, recipe.mesh.model)
        distiller = Distiller(recipe, opened, chat, training, heldout, Placement(mesh), blocks)
        if jax.process_index() == 0:
            open_run(recipe.out, distiller.identity)
        return distiller

    @cached_property
    def student(self) -> Student:
        """The child with the values that it was trained to before."""
        child, recipe = self.opened.child, self.recipe
        if self.opened.differing:
            child = replace(child, dense_delta=load_delta(recipe.parent, recipe.child, self.opened.differing))
        return Student(child, recipe.train, recipe.remat, ends=not self.blocks)

    @cached_property
    def settings(self) -> TraceSettings:
        return self.recipe.data.of(self.recipe.traces)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the result depends on; meshes and how often something is saved are left out."""
        recipe, child = self.recipe, self.opened.child
        return {
            "kind": "distill-blocks" if self.blocks else "distill",
            "parent": weight_sizes(recipe.parent),
            "child": {"kept": child.kept, "windows": [b.window for b in child.blocks], "own": self.opened.differing},
            "data": self._batches(None).fingerprint(),
            "heldout": len(self.heldout),
            "train": recipe.train,
            "top_k": recipe.top_k if recipe.teacher_cache else None,
            "loss": asdict(recipe.loss),
            "optimizer": asdict(recipe.optimizer),
            "steps": recipe.loop.steps,
            "seed": recipe.seed,
        }

    # Parts of the job ----------------------------------------------------------------------------------------------

    @cached_property
    def resident(self) -> Params:
        """The parent's weights, stacked and in place."""
        packed = self.recipe.packed if self.recipe.packed is not None else jax.default_backend() != "cpu"
        loaded = load_checkpoint(
            self.recipe.parent,
            dtype=compute_dtype(),
            mesh=self.placement.mesh,
            experts="stored" if packed else "dense",
        )
        with on_mesh(self.placement.mesh):
            stacked = jax.jit(self.student.resident, donate_argnums=0)(loaded.params)
        return self.placement.resident(stacked, self.config)

    @property
    def config(self) -> ModelConfig:
        return self.opened.child.parent

    def objective(self) -> Objective:
        if self.blocks:
            from puzzle_jax.train.blocks import Blocks

            return Blocks(self.student)
        return Distillation(self.student, self.recipe.loss)

    def job(self, console: Console) -> Job:
        """What the loop runs."""
        recipe, placement = self.recipe, self.placement
        optimizer = make_optimizer(recipe.optimizer, recipe.loop.steps)

        def fresh(resident: Params) -> TrainState:
            return init_state(self.student.masters(resident), optimizer, jax.random.key(recipe.seed))

        shardings = placement.masters(jax.eval_shape(fresh, self.resident))
        step = make_step(self.objective(), optimizer, shardings=None if shardings is None else Shardings(shardings))

        def on_devices(state: TrainState, fixed: Any, batch: Packed) -> Any:
            with on_mesh(placement.mesh):
                return step(state, fixed, batch)

        def initial() -> TrainState:
            with on_mesh(placement.mesh):
                return jax.jit(fresh, out_shardings=shardings)(self.resident)

        cache = self._cache(console) if recipe.teacher_cache else None
        return Job(
            initial=initial,
            step=on_devices,
            fixed=Fixed(self.resident),
            batches=self._batches(cache),
            identity=self.identity,
            place=placement.micro_batches,
            evaluate=self.evaluate,
            best="kl",
            name="distilling blocks" if self.blocks else "distilling",
        )

    def _batches(self, cache: TeacherCache | None) -> TraceBatches:
        return TraceBatches(self.examples, self.settings, self.chat.pad_id, None if cache is None else cache.extras)

    def _cache(self, console: Console) -> TeacherCache:
        recipe, directory = self.recipe, self.recipe.teacher_cache
        assert directory is not None
        identity = {"parent": weight_sizes(recipe.parent), "k": recipe.top_k, "temperature": recipe.loss.temperature}
        if (directory / CACHE_FILE).exists():
            return open_cache(directory, self.examples, identity)
        if recipe.mesh.processes > 1:
            raise PuzzleError(f"teacher_cache is {directory}, which is not there; let one process make it first")
        if directory.exists() and any(directory.iterdir()):
            raise PuzzleError(f"{directory} holds files that are no teacher's cache; name an empty or new directory")
        return make_cache(
            directory,
            self.examples,
            self.student,
            self.resident,
            self.placement,
            console,
            k=min(recipe.top_k, self.config.vocab_size),
            temperature=recipe.loss.temperature,
            rows=recipe.data.rows,
            length=recipe.data.row_length,
            pad_id=self.chat.pad_id,
            identity=identity,
        )

    # Evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """KL of the parent to the student and the LM loss, nats per token of the held-out answers."""
        return self.measure(state.params)

    def measure(self, trained: Params) -> dict[str, float]:
        sums = {"kl": 0.0, "next_token": 0.0}
        weight = 0.0
        rows, length = self.recipe.data.rows, self.recipe.data.row_length
        batches = evaluation_batches(self.heldout, rows=rows, length=length, pad_id=self.chat.pad_id)
        with on_mesh(self.placement.mesh):
            for batch in batches:
                found = self._measured(trained, Fixed(self.resident), self.placement.rows(batch))
                sums = {name: sums[name] + float(found.terms[term]) for name, term in _MEASURED.items()}
                weight += float(found.weight)
        return {name: total / weight for name, total in sums.items()}

    @cached_property
    def _measured(self) -> Any:
        chunks = {name: getattr(self.recipe.loss, name) for name in ("token_chunk", "vocab_chunk")}
        return jax.jit(Distillation(self.student, LossSettings(forward_kl=1.0, next_token=1.0, **chunks)))

    # Export --------------------------------------------------------------------------------------------------------

    def export(self, trained: Trained, console: Console) -> Path:
        """Writes the trained child; returns its directory."""
        recipe, out = self.recipe, self.recipe.out / CHILD
        values = _on_host(trained.state.params)
        scales = self._cache_scales(values)
        if jax.process_index():
            return out
        tokens = recipe.data.row_length * recipe.data.rows * recipe.data.micro_batches
        summary = {
            "traces": [str(path) for path in recipe.traces],
            "steps": trained.summary.step,
            "tokens_per_step": tokens,
            "blocks": self.blocks,
            "loss": {} if self.blocks else recipe.loss.shares,
            "optimizer": asdict(recipe.optimizer),
            "heldout": {
                name.removeprefix("evaluation/"): value
                for name, value in trained.summary.metrics.items()
                if name.startswith("evaluation/")
            },
        }
        earlier = self.opened.provenance
        export_child(
            recipe.parent,
            out,
            self.opened.child.config,
            self.opened.child.kept,
            provenance={**earlier, "distilled": [*earlier.get("distilled", []), summary]},
            dense_delta=self.student.delta(values),
            kv_scales=scales,
            replace=True,
        )
        console.print(f"child: {out}", highlight=False)
        return out

    def _cache_scales(self, values: Params) -> KVScales:
        """Of the trained child's FP8 cache, on held-out answers."""
        with on_mesh(self.placement.mesh):
            merged = jax.jit(
                lambda resident, own: unstack_params(self.student.params(resident, own), self.student.runs)
            )
            params = merged(self.resident, values)
            traces = [_trace(example) for example in self.heldout[:_CALIBRATION_ANSWERS]]
            child = self.student.child
            return calibrate_cache(params, self.student.config, micro_batches(traces), view=child.view)


_MEASURED = {"kl": "forward_kl", "next_token": "next_token"}


def distill(recipe: DistillRecipe, console: Console, *, blocks: bool = False) -> Trained:
    """Trains a child and writes it; on a signal it saves and returns early, without a child."""
    distiller = Distiller.open(recipe, console, blocks=blocks)
    trained = train(distiller.job(console), recipe.loop, recipe.out, console)
    if not trained.summary.preempted:
        distiller.export(trained, console)
    return trained


def apart(
    examples: Sequence[TraceExample], heldout: int, settings: TraceSettings
) -> tuple[tuple[TraceExample, ...], tuple[TraceExample, ...]]:
    """Examples to train on and, of those whose prompts come first by a hash, about `heldout` to evaluate on.

    Raises PuzzleError where there are too few prompts for both.
    """

    def place(example: TraceExample) -> str:
        prompt = np.asarray(example.tokens[: example.prompt_length], "<i4").tobytes()
        return hashlib.sha256(f"{settings.seed} ".encode() + prompt).hexdigest()

    places = [place(example) for example in examples]
    held: set[str] = set()
    count = 0
    for name in sorted(set(places)):
        if count >= heldout:
            break
        held.add(name)
        count += places.count(name)
    training = tuple(e for e, name in zip(examples, places, strict=True) if name not in held)
    if not training:
        shown = ", ".join(map(str, settings.paths))
        raise PuzzleError(
            f"{shown} has {len(examples)} answers to {len(held)} prompts, which data.heldout ({heldout}) takes all"
        )
    return training, tuple(e for e, name in zip(examples, places, strict=True) if name in held)


def weight_sizes(directory: Path) -> dict[str, int]:
    """Tells checkpoints apart: size of every weight file."""
    return {path.name: path.stat().st_size for path in sorted(directory.glob("*.safetensors"))}


def _on_host(tree: Any) -> Any:
    """The whole arrays in every process, one after the other."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda leaf: np.asarray(multihost_utils.process_allgather(leaf, tiled=True)), tree)


def _trace(example: TraceExample) -> Trace:
    tokens = [int(token) for token in example.tokens]
    at = example.prompt_length
    return Trace(
        task=example.task,
        effort=example.effort,
        problem_seed=0,
        details={},
        prompt=tuple(tokens[:at]),
        completion=tuple(tokens[at:]),
        reward=None,
        truncated=False,
    )
