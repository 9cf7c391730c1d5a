"""Distillation of a child on its parent's own answers: from directories to a trained child's directory.

    OUT/run.json, checkpoints/, metrics.jsonl   the run (`train.loop`)
    OUT/child/                                  the trained child, in Hugging Face form, with its provenance

What is trained goes out in bfloat16; frozen experts and routers are copied from the parent's files and stay its bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from rich.console import Console

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.calibrate import calibrate_cache
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.sharding import make_training_mesh, on_mesh
from puzzle_jax.model.spec import Params
from puzzle_jax.model.stacked import unstack_params
from puzzle_jax.processes.distributed import agree, on_all, on_primary
from puzzle_jax.runs import open_run
from puzzle_jax.train.base_parameters import load_resident
from puzzle_jax.train.distill.blocks import Blocks
from puzzle_jax.train.distill.inputs import Inputs, shared_day
from puzzle_jax.train.distill.objectives import Distillation, Fixed, LossSettings
from puzzle_jax.train.distill.recipe import DistillRecipe
from puzzle_jax.train.distill.teacher_cache import TeacherCache, make_cache
from puzzle_jax.train.loop import EVALUATION, Job, Trained, train
from puzzle_jax.train.optimizer import make_optimizer
from puzzle_jax.train.placement import Placement, on_host
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.step import Shardings, TrainState, init_state, make_step
from puzzle_jax.train.student import Student
from puzzle_jax.train.traces.batches import evaluation_batches
from puzzle_jax.train.traces.examples import TraceExample

CHILD = "child"
_CALIBRATION_ANSWERS = 256
_DIRECTORIES = ("parent", "child", "traces", "out", "teacher_cache")
_MEASURED = {"kl": "forward_kl", "next_token": "next_token"}


def distill(recipe: DistillRecipe, console: Console, *, blocks: bool = False) -> Trained:
    """Trains a child and writes it; on a signal it saves and returns early, without a child.

    Raises PuzzleError, before weights are read and anything is written, for whatever is wrong with what the recipe
    names, and where `recipe.out` holds something else.
    """
    if jax.process_index():
        console = Console(quiet=True)  # the primary process reports for all
    day = shared_day(recipe.out)
    inputs = on_all("open the inputs", lambda: Inputs.open(recipe, blocks=blocks, today=day))
    # Directories may lie elsewhere on each host; the identity tells what is in them.
    settings = {name: value for name, value in asdict(recipe).items() if name not in _DIRECTORIES}
    agree("the recipe", settings)
    agree("the inputs", inputs.identity)
    mesh = None
    if recipe.mesh.devices > 1 or recipe.mesh.processes > 1:
        mesh = make_training_mesh(recipe.mesh.data, recipe.mesh.sequence, recipe.mesh.model)
    on_primary("open the run", lambda: open_run(recipe.out, inputs.identity))
    console.print(f"traces: {inputs.counts}", highlight=False)
    distiller = Distiller(inputs, Placement(mesh))
    trained = train(distiller.job(console), recipe.loop, recipe.out, console)
    if not trained.summary.preempted:
        distiller.export(trained, console)
    return trained


@dataclass(frozen=True)
class Distiller:
    """A run.

    Attributes:
      inputs: what it starts from.
      placement: of arrays.
    """

    inputs: Inputs
    placement: Placement

    @property
    def recipe(self) -> DistillRecipe:
        return self.inputs.recipe

    @property
    def config(self) -> ModelConfig:
        """The parent's."""
        return self.inputs.config

    @property
    def student(self) -> Student:
        return self.inputs.student

    # Parts of the job ----------------------------------------------------------------------------------------------

    @cached_property
    def resident(self) -> Params:
        """The parent's weights, stacked and in place."""
        recipe = self.recipe
        return load_resident(recipe.parent, self.student, self.placement, packed=recipe.packed)

    def objective(self) -> Distillation | Blocks:
        """What is minimised."""
        if self.inputs.blocks:
            return Blocks(self.student)
        return Distillation(self.student, self.recipe.loss)

    def job(self, console: Console) -> Job:
        """What the loop runs."""
        recipe, placement = self.recipe, self.placement
        optimizer = make_optimizer(recipe.optimizer, recipe.loop.steps)

        def fresh(resident: Params, delta: Params | None) -> TrainState:
            return init_state(self.student.masters(resident, delta), optimizer, jax.random.key(recipe.seed))

        shardings = placement.masters(jax.eval_shape(fresh, self.resident, None))
        step = make_step(self.objective(), optimizer, shardings=None if shardings is None else Shardings(shardings))

        def on_devices(state: TrainState, fixed: Any, batch: Packed) -> Any:
            with on_mesh(placement.mesh):
                return step(state, fixed, batch)

        def initial() -> TrainState:
            delta = placement.parts(self.inputs.delta())
            with on_mesh(placement.mesh):
                return jax.jit(fresh, out_shardings=shardings)(self.resident, delta)

        return Job(
            initial=initial,
            step=on_devices,
            fixed=Fixed(self.resident),
            batches=self.inputs.batches(self._cache(console)),
            identity=self.inputs.identity,
            place=placement.micro_batches,
            evaluate=lambda state: self.measure(state.params),
            best="kl",
            name="distilling blocks" if self.inputs.blocks else "distilling",
            tokens_per_step=self.recipe.data.tokens_per_step,
        )

    def _cache(self, console: Console) -> TeacherCache | None:
        """The teacher's logits, asked for now where they are not there yet."""
        recipe, found = self.recipe, self.inputs.cache()
        if found is not None or recipe.teacher_cache is None:
            return found
        return make_cache(
            recipe.teacher_cache,
            self.inputs.training,
            self.student,
            self.resident,
            self.placement,
            console,
            k=min(recipe.top_k, self.config.vocab_size),
            temperature=recipe.loss.temperature,
            rows=recipe.data.rows,
            length=recipe.data.row_length,
            pad_id=self.inputs.chat.pad_id,
            identity=self.inputs.cache_identity,
        )

    # Evaluation ----------------------------------------------------------------------------------------------------

    def measure(self, trained: Params) -> dict[str, float]:
        """ "kl" of the parent to the student and "next_token", the LM loss: nats per token of the held-out answers."""
        sums, weight = dict.fromkeys(_MEASURED, 0.0), 0.0
        batches = evaluation_batches(
            self.inputs.heldout,
            rows=self.recipe.data.rows,
            length=self.recipe.data.row_length,
            pad_id=self.inputs.chat.pad_id,
        )
        with on_mesh(self.placement.mesh):
            for batch in batches:
                found = self._measured(trained, Fixed(self.resident), self.placement.rows(batch))
                sums = {name: sums[name] + float(found.terms[term]) for name, term in _MEASURED.items()}
                weight += float(found.weight)
        return {name: total / weight for name, total in sums.items()}

    @cached_property
    def _measured(self) -> Any:
        loss = self.recipe.loss
        terms = {term: 1.0 for term in _MEASURED.values()}
        settings = LossSettings(**terms, token_chunk=loss.token_chunk, vocab_chunk=loss.vocab_chunk)
        return jax.jit(Distillation(self.student, settings))

    # Export --------------------------------------------------------------------------------------------------------

    def export(self, trained: Trained, console: Console) -> None:
        """Writes the trained child, by the primary process."""
        recipe, opened = self.recipe, self.inputs.opened
        scales = self._cache_scales(trained.state.params)
        values = on_host(trained.state.params)
        earlier = opened.provenance.get("distilled", [])

        def write() -> None:
            export_child(
                recipe.parent,
                recipe.out / CHILD,
                opened.child.config,
                opened.child.kept,
                provenance={**opened.provenance, "distilled": [*earlier, self._record(trained)]},
                dense_delta=self.student.delta(values),
                kv_scales=scales,
                pad_experts=self.inputs.padded,
                replace=True,
            )

        on_primary("export the child", write)
        console.print(f"child: {recipe.out / CHILD}", highlight=False)

    def _record(self, trained: Trained) -> dict[str, Any]:
        """What provenance tells of this run."""
        recipe, data = self.recipe, self.recipe.data
        metrics = trained.summary.metrics
        return {
            "traces": [str(path) for path in recipe.trace_paths],
            "steps": trained.summary.step,
            "tokens_per_step": data.tokens_per_step,
            "blocks": self.inputs.blocks,
            "loss": {} if self.inputs.blocks else recipe.loss.shares,
            "optimizer": asdict(recipe.optimizer),
            "heldout": {name: metrics[f"{EVALUATION}{name}"] for name in _MEASURED},
        }

    def _cache_scales(self, trained: Params) -> KVScales:
        """Of the trained child's FP8 cache, on held-out answers."""
        student = self.student
        traces = [_trace(example) for example in self.inputs.heldout[:_CALIBRATION_ANSWERS]]
        merged = jax.jit(lambda resident, own: unstack_params(student.params(resident, own), student.runs))
        with on_mesh(self.placement.mesh):
            params = merged(self.resident, trained)
            return calibrate_cache(params, student.config, micro_batches(traces), view=student.child.view)


def _trace(example: TraceExample) -> Trace:
    prompt, completion = np.split(example.tokens, [example.prompt_length])
    return Trace(
        task=example.task,
        effort=example.effort,
        problem_seed=0,
        details={},
        prompt=tuple(prompt.tolist()),
        completion=tuple(completion.tolist()),
        reward=None,
        truncated=False,
    )
