"""What runs of distillation and of reinforcement learning share: from inputs that are checked to a trained child.

    OUT/run.json, checkpoints/, metrics.jsonl   the run (`train.loop`)
    OUT/report.html                             its page (`report.training`)
    OUT/child/                                  the trained model, in Hugging Face form, with its provenance

What is trained goes out in bfloat16; frozen experts and routers are copied from the base checkpoint's files and stay
its bytes. Left out: what is learnt and from what, which are the two kinds' own.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import optax
from rich.console import Console

from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.model.sharding import make_training_mesh, on_mesh
from puzzle_jax.model.spec import Params
from puzzle_jax.processes.distributed import agree, from_primary, on_all, on_primary
from puzzle_jax.runs import METRICS_FILE, begun_on, open_run
from puzzle_jax.train.base_parameters import load_base
from puzzle_jax.train.optimizer import make_optimizer
from puzzle_jax.train.placement import Placement, on_host
from puzzle_jax.train.step import Shardings, TrainState, init_state
from puzzle_jax.train.student import Student

CHILD = "child"
CALIBRATION_ANSWERS = 256
"""Answers, about, on which the scales of a trained model's FP8 cache are found."""

_DIRECTORIES = ("parent", "child", "model", "traces", "out", "teacher_cache")


class RunInputs:
    """What a recipe names, read and checked; all but the weights.

    Attributes:
      recipe: all settings.
      base: the checkpoint whose weights training begins with.
      student: what learns.
      earlier: provenance of the model that is trained; empty where it has none.
      updates: steps of the optimiser in the whole run.
      identity: what the result depends on, as JSON values.
    """

    recipe: Any
    base: cached_property[Path]
    student: cached_property[Student]
    earlier: cached_property[Mapping[str, Any]]
    updates: cached_property[int]
    identity: cached_property[dict[str, Any]]


Inputs = TypeVar("Inputs", bound=RunInputs)


def agreed_inputs(recipe: Any, read: Callable[[datetime.datetime], Inputs]) -> Inputs:
    """What every process reads of a recipe's inputs, which must be the same.

    Args:
      read: from the date that chat templates see, which is the day on which the run was begun.

    Raises PuzzleError for whatever is wrong with the inputs, and where processes have different ones.
    """
    # As the primary process finds it, since hosts may be in different time zones.
    day = from_primary("day", lambda: (begun_on(recipe.out) or datetime.datetime.now()).isoformat())
    inputs = on_all("open the inputs", lambda: read(datetime.datetime.fromisoformat(day)))
    # Directories may lie elsewhere on each host; the identity tells what is in them.
    agree("the recipe", {name: value for name, value in asdict(recipe).items() if name not in _DIRECTORIES})
    agree("the inputs", inputs.identity)
    return inputs


def open_placement(inputs: RunInputs) -> Placement:
    """Opens the run's directory, and says where arrays will live.

    Raises PuzzleError where the directory holds something else, and where there are too few devices.
    """
    recipe, mesh = inputs.recipe, None
    if recipe.mesh.devices > 1 or recipe.mesh.processes > 1:
        mesh = make_training_mesh(recipe.mesh.data, recipe.mesh.sequence, recipe.mesh.model)
    on_primary("open the run", lambda: open_run(recipe.out, inputs.identity))
    return Placement(mesh)


def primary_console(console: Console) -> Console:
    """The console in the primary process, which reports for all; one that prints nothing in the others."""
    return Console(quiet=True) if jax.process_index() else console


def report(run_dir: Path, console: Console) -> None:
    """Writes the page of a run, by the primary process. A signal may end a run before it has a line of metrics."""
    if jax.process_index() == 0 and (run_dir / METRICS_FILE).stat().st_size:
        from puzzle_jax.report.training import write_training_report  # brings matplotlib

        console.print(f"report: {write_training_report(run_dir)}", highlight=False)


@dataclass
class Run(Generic[Inputs]):
    """A run's arrays and programs.

    Attributes:
      inputs: what it starts from.
      placement: of arrays.
      console: where it reports.
    """

    inputs: Inputs
    placement: Placement
    console: Console

    @property
    def recipe(self) -> Any:
        return self.inputs.recipe

    @property
    def student(self) -> Student:
        return self.inputs.student

    @cached_property
    def base(self) -> Params:
        """The base parameters, stacked and in place: the teacher, or the policy that training begins with."""
        return load_base(self.inputs.base, self.student, self.placement, packed=self.recipe.packed)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.recipe.optimizer, self.inputs.updates)

    @cached_property
    def shardings(self) -> Shardings | None:
        """Of the training state; None without a mesh."""
        placed = self.placement.master_weights(jax.eval_shape(self._fresh, self.base, None))
        return placed and Shardings(placed)

    def initial(self, delta: Params | None = None) -> TrainState:
        """The state before the first step, in place; `delta` is what the student had learnt before, on the host."""
        with on_mesh(self.placement.mesh):
            fresh = jax.jit(self._fresh, out_shardings=self.shardings and self.shardings.state)
            return fresh(self.base, self.placement.parts(delta))

    def _fresh(self, base: Params, delta: Params | None) -> TrainState:
        masters = self.student.master_weights(base, delta)
        return init_state(masters, self.optimizer, jax.random.key(self.recipe.seed))

    def write_child(
        self, trained: Params, kind: str, record: Callable[[], Mapping[str, Any]], scales: Any, **options: Any
    ) -> None:
        """Writes the trained model, by the primary process.

        Args:
          trained: master weights.
          kind: of the run, under which provenance lists what such runs did.
          record: what provenance tells of this run; asked in the primary process, which has its metrics.
          scales: of the trained model's FP8 cache.
          options: of `export_child`.
        """
        inputs, values = self.inputs, on_host(trained)
        own = dict(inputs.earlier) or {"parent": str(inputs.base)}

        def write() -> None:
            export_child(
                inputs.base,
                self.recipe.out / CHILD,
                self.student.child.config,
                self.student.child.kept,
                provenance={**own, kind: [*own.get(kind, []), dict(record())]},
                dense_delta=self.student.delta(values),
                kv_scales=scales,
                replace=True,
                **options,
            )

        on_primary("export the child", write)
