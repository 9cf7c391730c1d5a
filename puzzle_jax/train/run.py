"""The parts of a run that distillation and reinforcement learning share: from checked inputs to a trained child.

    OUT/run.json, checkpoints/, metrics.jsonl   the run (`train.loop`)
    OUT/report.html                             its report (`report.training`)
    OUT/child/                                  the trained model, in Hugging Face form, with its provenance

Trained parameters are exported in bfloat16, trained experts in MXFP4 where the base checkpoint packs them; frozen
experts and routers are copied from its files byte for byte. Left out: what is learnt and from what, which each of the
two defines.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import optax
from rich.console import Console

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.evaluate.models import Model
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.network import compute_dtype
from puzzle_jax.model.sharding import make_training_mesh, on_mesh
from puzzle_jax.model.spec import Params
from puzzle_jax.processes.distributed import agree, from_primary, on_all, on_primary
from puzzle_jax.report.training import write_training_report
from puzzle_jax.runs import METRICS_FILE, begun_on, open_run
from puzzle_jax.train.loop import Job, Trained, train
from puzzle_jax.train.optimizer import make_optimizer
from puzzle_jax.train.placement import Placement, on_host
from puzzle_jax.train.recipe import RunRecipe
from puzzle_jax.train.step import Shardings, TrainState, init_state
from puzzle_jax.train.student import Student

CHILD = "child"
CALIBRATION_ANSWERS = 256
"""Approximate number of answers on which the scales of a trained model's FP8 cache are calibrated."""

_DIRECTORIES = ("parent", "child", "model", "traces", "out", "teacher_cache")

Recipe = TypeVar("Recipe", bound=RunRecipe)


class RunInputs(Generic[Recipe]):
    """A recipe's inputs, read and checked, except for the weights.

    Attributes:
      recipe: all settings.
      model: the checkpoint whose weights training starts from; its template sees the date on which the run was begun.
      student: the model that learns.
      earlier: provenance of the model that is trained; empty where it has none.
      identity: everything that the result depends on, as JSON values; meshes and save intervals are left out.
    """

    recipe: Recipe
    model: Model
    student: cached_property[Student]
    earlier: cached_property[Mapping[str, Any]]
    identity: cached_property[dict[str, object]]

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def common_identity(self) -> dict[str, object]:
        """The part of `identity` that every kind of run has."""
        recipe = self.recipe
        return {
            "optimizer": asdict(recipe.optimizer),
            "train": sorted(set(recipe.train)),
            "steps": recipe.loop.steps,
            "seed": recipe.seed,
            "today": self.model.chat.today.date().isoformat(),
        }


Inputs = TypeVar("Inputs", bound=RunInputs)


def day_of(out: Path) -> datetime.datetime:
    """The date that chat templates see: the day on which the run in `out` was begun, or now."""
    return begun_on(out) or datetime.datetime.now()


def agreed_inputs(recipe: RunRecipe, read: Callable[[datetime.datetime], Inputs]) -> Inputs:
    """Reads a recipe's inputs in every process and checks that all processes have the same.

    Args:
      read: reads the inputs, given the date that chat templates see.

    Raises PuzzleError for invalid inputs, and where processes have different ones.
    """

    def opened() -> tuple[Inputs, dict[str, object]]:
        inputs = read(datetime.datetime.fromisoformat(day))
        return inputs, inputs.identity

    # The primary process decides, since hosts may be in different time zones.
    day = from_primary("day", lambda: day_of(recipe.out).isoformat())
    inputs, identity = on_all("open the inputs", opened)
    # Directories may have other paths on each host; the identity covers their contents.
    agree("the recipe", {name: value for name, value in asdict(recipe).items() if name not in _DIRECTORIES})
    agree("the inputs", identity)
    return inputs


def open_placement(inputs: RunInputs) -> Placement:
    """Opens the run's directory and returns the placement of arrays.

    Raises PuzzleError where the directory holds something else, and where there are too few devices.
    """
    recipe, mesh = inputs.recipe, None
    if recipe.mesh.devices > 1 or recipe.mesh.processes > 1:
        mesh = make_training_mesh(recipe.mesh.data, recipe.mesh.sequence, recipe.mesh.model)
    on_primary("open the run", lambda: open_run(recipe.out, inputs.identity))
    return Placement(mesh)


def report(run_dir: Path, console: Console) -> None:
    """Writes the report of a run, in the primary process, unless a signal ended it before its first line of metrics."""
    if jax.process_index() == 0 and (run_dir / METRICS_FILE).stat().st_size:
        console.print(f"report: {write_training_report(run_dir)}", highlight=False)


@dataclass
class Run(Generic[Inputs]):
    """The arrays and compiled programs of a run."""

    inputs: Inputs
    placement: Placement
    console: Console

    @property
    def student(self) -> Student:
        return self.inputs.student

    def job(self) -> Job:
        """The job that the loop runs."""
        raise NotImplementedError

    def export(self, trained: Trained) -> None:
        """Writes the trained model."""
        raise NotImplementedError

    def train(self) -> Trained:
        """Trains and exports; on a signal it saves and returns early, without a trained model."""
        recipe = self.inputs.recipe
        trained = train(self.job(), recipe.loop, recipe.out, self.console)
        if not trained.preempted:
            self.export(trained)
        report(recipe.out, self.console)
        return trained

    @cached_property
    def base(self) -> Params:
        """The base parameters, stacked and placed on devices: the teacher, or the policy that training begins with."""
        model, mesh = replace(self.inputs.model, mesh=self.placement.mesh), self.placement.mesh
        if model.weights == "auto" and jax.default_backend() != "cpu":
            packed = model.description.form == "mxfp4"
        else:  # The primary process decides, since hosts may differ in their memory.
            packed = from_primary("weights", lambda: "packed" if model.packed else "dense") == "packed"
        experts = "stored" if packed else "dense"
        loaded = load_checkpoint(model.directory, dtype=compute_dtype(), mesh=mesh, experts=experts)
        with on_mesh(mesh), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # but their memory is released
            stacked = jax.jit(self.student.stacked, donate_argnums=0)(loaded.params)
        return self.placement.base(stacked, self.student.child.parent)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.inputs.recipe.optimizer, self.inputs.recipe.optimizer_steps)

    @cached_property
    def shardings(self) -> Shardings | None:
        """Shardings of the training state; None without a mesh."""
        placed = self.placement.master_weights(jax.eval_shape(self._fresh, self.base, None))
        return placed and Shardings(placed)

    def initial(self, delta: Params | None = None) -> TrainState:
        """The state before the first step, on devices; `delta` holds what the student learnt earlier, on the host."""
        with on_mesh(self.placement.mesh):
            fresh = jax.jit(self._fresh, out_shardings=self.shardings and self.shardings.state)
            return fresh(self.base, self.placement.parts(delta))

    def _fresh(self, base: Params, delta: Params | None) -> TrainState:
        weights = self.student.master_weights(base, delta)
        return init_state(weights, self.optimizer, jax.random.key(self.inputs.recipe.seed))

    def write_child(
        self,
        trained: Params,
        kind: str,
        record: Callable[[], Mapping[str, object]],
        scales: KVScales | None,
        **options: Any,
    ) -> None:
        """Writes the trained model, in the primary process.

        Args:
          trained: master weights.
          kind: kind of the run, the key under which provenance lists such runs.
          record: makes this run's entry in provenance, in the primary process, which has its metrics.
          scales: scales of the trained model's FP8 cache.
          options: further options of `export_child`.
        """
        base, values = self.inputs.model.directory, on_host(trained)
        own = dict(self.inputs.earlier) or {"parent": str(base)}

        def write() -> None:
            export_child(
                base,
                self.inputs.recipe.out / CHILD,
                self.student.child.config,
                self.student.child.kept,
                provenance={**own, kind: [*own.get(kind, []), dict(record())]},
                dense_delta=self.student.delta(values),
                kv_scales=scales,
                replace=True,
                **options,
            )

        on_primary("export the child", write)
