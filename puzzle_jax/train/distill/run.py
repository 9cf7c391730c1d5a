"""Distillation of a child on its parent's own answers: from directories to a trained child (`train.run`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property, partial

import jax
import numpy as np
from jaxtyping import ArrayLike
from rich.console import Console

from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.calibrate import calibrate_cache
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.sharding import on_mesh
from puzzle_jax.model.spec import Params
from puzzle_jax.model.stacked import unstack_params
from puzzle_jax.processes.distributed import primary_console
from puzzle_jax.train.distill.blocks import Blocks
from puzzle_jax.train.distill.inputs import DistillInputs
from puzzle_jax.train.distill.objectives import Distillation, Fixed, Loss, LossSettings
from puzzle_jax.train.distill.recipe import DistillRecipe
from puzzle_jax.train.distill.teacher_cache import TeacherCache, make_cache
from puzzle_jax.train.loop import EVALUATION, Job, Trained
from puzzle_jax.train.rows import Packed, packed
from puzzle_jax.train.run import CALIBRATION_ANSWERS, CHILD, Run, agreed_inputs, open_placement
from puzzle_jax.train.step import TrainState, make_step
from puzzle_jax.train.traces.examples import TraceExample

_MEASURED = {"kl": "forward_kl", "next_token": "next_token"}


def distill(recipe: DistillRecipe, console: Console, *, blocks: bool = False) -> Trained:
    """Trains a child and writes it; on a signal it saves and returns early, without a child.

    Raises PuzzleError, before weights are read or anything is written, for anything wrong with what the recipe names,
    and where `recipe.out` holds something else.
    """
    console = primary_console(console)
    inputs = agreed_inputs(recipe, partial(DistillInputs.open, recipe, blocks=blocks))
    run = Distiller(inputs, open_placement(inputs), console)
    console.print(f"traces: {inputs.counts}", highlight=False)
    return run.train()


class Distiller(Run[DistillInputs]):
    """A run of distillation, of a child as a whole or of its layers one by one."""

    @property
    def recipe(self) -> DistillRecipe:
        return self.inputs.recipe

    def objective(self) -> Distillation | Blocks:
        """The objective to minimise."""
        if self.inputs.blocks:
            return Blocks(self.student)
        return Distillation(self.student, self.recipe.loss)

    def job(self) -> Job:
        step = make_step(self.objective(), self.optimizer, shardings=self.shardings)

        def on_devices(state: TrainState, fixed: Fixed, batch: Packed) -> tuple[TrainState, Mapping[str, ArrayLike]]:
            with on_mesh(self.placement.mesh):
                return step(state, fixed, batch)

        return Job(
            initial=lambda: self.initial(self.inputs.delta()),
            step=on_devices,
            fixed=Fixed(self.base),
            batches=self.inputs.batches(self._cache()),
            identity=self.inputs.identity,
            place=self.placement.micro_batches,
            evaluate=lambda state: self.measure(state.params),
            best="kl",
            name="distilling blocks" if self.inputs.blocks else "distilling",
            tokens_per_step=self.recipe.data.tokens_per_step,
        )

    def _cache(self) -> TeacherCache | None:
        """The teacher's cached logits, computed now if they do not exist yet."""
        recipe, found = self.recipe, self.inputs.cache()
        if found is not None or recipe.teacher_cache is None:
            return found
        return make_cache(
            recipe.teacher_cache,
            self.inputs.training,
            self.student,
            self.base,
            self.placement,
            self.console,
            k=min(recipe.top_k, self.inputs.config.vocab_size),
            temperature=recipe.loss.temperature,
            rows=recipe.data.rows,
            length=recipe.data.row_length,
            pad_id=self.inputs.model.chat.pad_id,
            identity=self.inputs.cache_identity,
        )

    # Evaluation ----------------------------------------------------------------------------------------------------

    def measure(self, trained: Params) -> dict[str, float]:
        """ "kl", KL(parent || student), and "next_token", the LM loss, in nats per token of the held-out answers."""
        data, sums, weight = self.recipe.data, dict.fromkeys(_MEASURED, 0.0), 0.0
        pad_id = self.inputs.model.chat.pad_id
        batches = packed(self.inputs.heldout, rows=data.rows, length=data.row_length, pad_id=pad_id)
        with on_mesh(self.placement.mesh):
            for batch in batches:
                found = self._measured(trained, Fixed(self.base), self.placement.rows(batch))
                sums = {name: sums[name] + float(found.terms[term]) for name, term in _MEASURED.items()}
                weight += float(found.weight)
        return {name: total / weight for name, total in sums.items()}

    @cached_property
    def _measured(self) -> Callable[[Params, Fixed, Packed], Loss]:
        loss = self.recipe.loss
        terms = {term: 1.0 for term in _MEASURED.values()}
        settings = LossSettings(**terms, token_chunk=loss.token_chunk, vocab_chunk=loss.vocab_chunk)
        return jax.jit(Distillation(self.student, settings))

    # Export --------------------------------------------------------------------------------------------------------

    def export(self, trained: Trained) -> None:
        values = trained.state.params
        scales = self._cache_scales(values)
        self.write_child(values, "distilled", lambda: self._record(trained), scales, pad_experts=self.inputs.padded)
        self.console.print(f"child: {self.recipe.out / CHILD}", highlight=False)

    def _record(self, trained: Trained) -> dict[str, object]:
        """This run's entry in the provenance."""
        recipe, data = self.recipe, self.recipe.data
        metrics = trained.metrics
        return {
            "traces": [str(path) for path in recipe.trace_paths],
            "steps": trained.step,
            "tokens_per_step": data.tokens_per_step,
            "blocks": self.inputs.blocks,
            "loss": {} if self.inputs.blocks else recipe.loss.shares,
            "optimizer": asdict(recipe.optimizer),
            "heldout": {name: metrics[f"{EVALUATION}{name}"] for name in _MEASURED},
        }

    def _cache_scales(self, trained: Params) -> KVScales:
        """Scales of the trained child's FP8 cache, calibrated on held-out answers."""
        student = self.student
        traces = [_trace(example) for example in self.inputs.heldout[:CALIBRATION_ANSWERS]]
        merged = jax.jit(lambda base, own: unstack_params(student.params(base, own), student.runs))
        with on_mesh(self.placement.mesh):
            params = merged(self.base, trained)
            return calibrate_cache(params, student.config, micro_batches(traces), view=student.child.view)


def _trace(example: TraceExample) -> Trace:
    prompt, completion = np.split(example.tokens, [example.prompt_length])
    texts = tuple(prompt.tolist()), tuple(completion.tolist())
    return Trace(example.task, example.effort, 0, {}, *texts, reward=None, truncated=False)
