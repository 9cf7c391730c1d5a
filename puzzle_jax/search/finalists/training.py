"""Short distillations of several children of one parent, by one compiled step.

Children are views on the parent (`train.student`): masks, and windows in layers where the finalists' differ, are data.
Attention takes longer with a window that is data than with one that is compiled in, but less than it saves: compiling
takes as long as dozens of steps, and would be repeated for every pattern of windows.

Loss and optimiser are those of a distillation: KL(parent || child) on the parent's answers, AdamW, a cosine schedule.
Every finalist sees the same batches. Left out: meshes, checkpoints, and gradients over several micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np
import optax
from jaxtyping import Array, Float
from rich.console import Console

from puzzle_jax.config import ModelConfig
from puzzle_jax.generate.batches import TokenWeights, alike
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.child import Child, ChildBlock
from puzzle_jax.model.spec import Params
from puzzle_jax.progress import progress
from puzzle_jax.search.recipe import FinalistSettings
from puzzle_jax.train.distill.objectives import Distillation, Fixed, LossSettings
from puzzle_jax.train.losses.head import head_losses
from puzzle_jax.train.optimizer import OptimizerSettings, make_optimizer
from puzzle_jax.train.rows import Example, Packed, packed
from puzzle_jax.train.step import Step, TrainState, init_state, make_step
from puzzle_jax.train.student import Student, head_of
from puzzle_jax.train.traces.batches import TraceBatches
from puzzle_jax.train.traces.examples import TraceExample, examples_of
from puzzle_jax.train.traces.settings import DataSettings

_WARMUP, _FINAL = 0.1, 0.05
"""Shares: of the steps that warm up, and of the learning rate at the end."""


@dataclass(frozen=True)
class ShortDistillation:
    """Trains children alike and measures them.

    Attributes:
      params, config: the parent, which teaches, on one device; its parameters are copied once, stacked.
      pad_id: token id of padding.
      settings: length, learning rate and rows.
      children: all children that will be trained, which decide what is compiled in.
      training: traces to train on; those that are longer than a row are dropped.
      validation: traces on which trained children are compared with the parent.
      seed: random seed of the order of the traces.
      console: where progress is shown.
      weigh: weights of the validation traces' completion tokens.
      packed: whether the children's checkpoints will hold experts as MXFP4.

    Raises `PuzzleError` where grain is not installed, or no trace fits a row.
    """

    params: Params
    config: ModelConfig
    pad_id: int
    settings: FinalistSettings
    children: Sequence[Child]
    training: Sequence[Trace]
    validation: Sequence[Trace]
    seed: int
    console: Console
    weigh: TokenWeights = alike
    packed: bool = True

    def __call__(self, child: Child) -> Float[np.ndarray, "traces"]:
        """Trains a child from the parent's weights; returns its KL per completion token on every validation trace."""
        fixed, settings = Fixed(self._base, child.view), self.settings
        state = self._fresh(self._base)
        batches = TraceBatches(self._examples, self._data, self.pad_id)
        with progress(self.console, "training a finalist", settings.steps) as advance:
            for _ in range(settings.steps):
                state, metrics = self._step(state, fixed, next(batches))
                advance(1, note=f"loss {float(np.asarray(metrics['loss'])):.4f}")
        return self.measure(state.params, child)

    def measure(self, trained: Params, child: Child) -> Float[np.ndarray, "traces"]:
        """KL(parent || child) per completion token on every validation trace, for master weights of the child."""
        fixed = Fixed(self._base, child.view)
        sums = np.zeros(len(self.validation))
        for batch in self._measured_rows:
            kl = np.asarray(self._kl(trained, fixed, batch), np.float64)
            counted = np.asarray(batch.weights) > 0
            weighted = kl[counted] * batch.extras["weight"][counted]
            sums += np.bincount(batch.extras["trace"][counted], weighted, len(sums))
        return sums / [self.weigh(trace).sum() for trace in self.validation]

    @cached_property
    def student(self) -> Student:
        """All children as one: whole layers of experts, with the windows that the children share."""
        first = self.children[0]
        windows = [{child.blocks[layer].window for child in self.children} for layer in range(len(first.blocks))]
        whole = [tuple(range(block.num_experts)) for block in first.parent.blocks]
        blocks = (ChildBlock(ids, block.window) for ids, block in zip(whole, first.blocks, strict=True))
        variable = frozenset(layer for layer, found in enumerate(windows) if len(found) > 1)
        on_cpu = jax.default_backend() == "cpu"
        shared = replace(first, blocks=tuple(blocks))
        return Student(shared, self.settings.train, remat=not on_cpu, variable=variable, packed=self.packed)

    @cached_property
    def _base(self) -> Params:
        return jax.jit(self.student.stacked)(self.params)

    @cached_property
    def _data(self) -> DataSettings:
        return DataSettings(row_length=self.settings.row_length, rows=self.settings.rows, seed=self.seed)

    @cached_property
    def _examples(self) -> tuple[TraceExample, ...]:
        named = ((f"training trace {number}", trace) for number, trace in enumerate(self.training, 1))
        return examples_of(named, self._data, self.config.vocab_size, "traces/training").examples

    @cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        steps = self.settings.steps
        warmup = round(_WARMUP * steps)
        rate = self.settings.learning_rate
        return make_optimizer(OptimizerSettings(learning_rate=rate, warmup_steps=warmup, final_fraction=_FINAL), steps)

    @cached_property
    def _fresh(self) -> Callable[[Params], TrainState]:
        key = jax.random.key(self.seed)
        return jax.jit(lambda base: init_state(self.student.master_weights(base), self._optimizer, key))

    @cached_property
    def _step(self) -> Step:
        return make_step(Distillation(self.student, LossSettings()), self._optimizer)

    @cached_property
    def _kl(self) -> Callable[[Params, Fixed, Packed], Float[Array, "rows length"]]:
        student = self.student

        def kl(trained: Params, fixed: Fixed, batch: Packed) -> Array:
            teacher = student.teacher_hidden(fixed.base, batch)
            own = student.hidden(fixed.base, trained, batch, view=fixed.view)
            found = head_losses(
                "forward_kl",
                head_of(student.params(fixed.base, trained)),
                own.x.reshape(-1, own.x.shape[-1]),
                eps=student.config.rms_norm_eps,
                teacher=head_of(fixed.base),
                y=teacher.x.reshape(-1, teacher.x.shape[-1]),
            )
            return found.reshape(batch.tokens.shape)

        return jax.jit(kl)

    @cached_property
    def _measured_rows(self) -> list[Packed]:
        """The validation traces, packed with the number of each at its positions; rows are as long as the longest."""
        examples = []
        for number, trace in enumerate(self.validation):
            tokens = np.array([*trace.prompt, *trace.completion], np.int32)
            weight = np.zeros(len(tokens), np.float32)
            weight[len(trace.prompt) - 1 : -1] = self.weigh(trace)
            extras = {"trace": np.full(len(tokens), number, np.int32), "weight": weight}
            examples.append(Example(tokens, len(trace.prompt), extras))
        length = max(self.settings.row_length, *(len(example.tokens) for example in examples))
        return list(packed(examples, rows=self.settings.rows, length=length, pad_id=self.pad_id))
