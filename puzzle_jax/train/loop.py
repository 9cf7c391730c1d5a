"""The training loop that pretraining, distillation, blockwise distillation and reinforcement learning share.

A run lives in a directory:

    run.json        the identity of the run
    checkpoints/    the whole state, saved at intervals (`checkpoints`)
    metrics.jsonl   a line per logged step (`metrics`); tensorboard/ shows the same

A run that is started again continues from its newest checkpoint. Parameters, optimiser state, random key and position
in the data are restored exactly, so the result is bit-identical to that of an uninterrupted run. On SIGTERM or SIGINT
the loop finishes its step, saves, and returns. Batches are made ahead in a thread, metrics are read one step behind,
and checkpoints are written while training continues. A job that is evaluated during training is evaluated at step 0
as well. When a step raises, the metrics of the step before it are still written.

Left out: what is trained and how, which the job defines.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import ArrayLike
from rich.console import Console

from puzzle_jax.errors import MOST_TIMES, PuzzleError, check_range
from puzzle_jax.progress import Advance, progress
from puzzle_jax.runs import locked, open_run
from puzzle_jax.train.checkpoints import Checkpoints, abstract_state
from puzzle_jax.train.metrics import MetricsLog
from puzzle_jax.train.prefetch import Batches, Positioned, in_turn, prefetched
from puzzle_jax.train.step import Step, TrainState

CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation/"
"""Prefix of the names of an evaluation's values in the metrics."""


@dataclass(frozen=True)
class LoopSettings:
    """Length of a run and the intervals of evaluations, checkpoints and logging, in steps.

    Attributes:
      steps: number of steps in the run.
      evaluate_every: steps between evaluations; 0 evaluates only after the last step.
      save_every: steps between checkpoints; one is always written after the last step and when a signal ends the run.
      log_every: steps between lines of metrics; every skipped step is logged as well.
      max_skipped: consecutive steps without a finite loss and gradient after which the run fails.
      keep_last, keep_best: checkpoints to keep: the newest, and those with the lowest value of the job's best metric.
    """

    steps: int = 1000
    evaluate_every: int = 0
    save_every: int = 100
    log_every: int = 10
    max_skipped: int = 10
    keep_last: int = 2
    keep_best: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_range(f"loop.{name}", value, 0 if name in ("evaluate_every", "keep_best") else 1, MOST_TIMES)


@dataclass
class Job:
    """A training job, as the loop runs it.

    Attributes:
      initial: makes the state before the first step, placed on its devices; called once, also when a run is resumed, to
        know what to restore.
      step: the step function, such as one from `make_step`.
      fixed: arrays that a step reads and does not change.
      batches: iterator over the batches of the steps; its state is saved with the parameters.
      identity: JSON values that identify the run: its recipe and a fingerprint of its data. A directory with a run of
        other values is refused. Settings that change no bit of the result (such as `save_every`) are better left out.
      place: puts a batch on the devices; called in the thread that makes batches.
      evaluate: computes named values of a state, deterministically.
      best: name of the evaluation's value to minimise; it also decides which checkpoints are kept.
      name: name of the work, shown beside the progress bar.
      tokens_per_step: positions that a step processes, for the displayed rate; 0 where the step reports rates itself.
      ahead: whether batches are made ahead, in a thread. False where a step decides what comes next, as in
        reinforcement learning; the data's state is then saved as it is after the step.
    """

    initial: Callable[[], TrainState]
    step: Step
    fixed: object
    batches: Batches
    identity: Mapping[str, object]
    place: Callable[[Any], object] = lambda batch: batch
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None
    best: str | None = None
    name: str = "training"
    tokens_per_step: int = 0
    ahead: bool = True


@dataclass(frozen=True)
class Trained:
    """Outcome of a run.

    Attributes:
      state: state after the last step that was made.
      step: number of that step.
      resumed_from: step of the checkpoint that this process started from; 0 if there was none.
      preempted: whether a signal ended the run before its last step; the command's exit code is 0 even then.
      metrics: metrics of the last logged step.
      best_step, best_metric: step and metric of the best checkpoint, where the job names a metric.
    """

    state: TrainState
    step: int
    resumed_from: int
    preempted: bool
    metrics: Mapping[str, int | float | None]
    best_step: int | None
    best_metric: float | None


def train(job: Job, settings: LoopSettings, directory: Path, console: Console) -> Trained:
    """Runs a job to its end in its run directory, continuing from where an earlier process stopped.

    Raises:
      PuzzleError: the directory holds something else, another run, or more steps than `settings.steps`; another process
        is using it; the data ran out; too many consecutive steps were not finite; a file cannot be written.
    """
    first = jax.process_index() == 0
    if first:
        open_run(directory, job.identity)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run directory")
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(locked(directory))
        checkpoints = stack.enter_context(open_checkpoints(directory, job.identity, settings))
        state, start = _begin(job, checkpoints, console)
        if start > settings.steps:
            raise PuzzleError(f"{directory} is at step {start}, but loop.steps is {settings.steps}")
        log = stack.enter_context(MetricsLog(directory, start, console)) if first else None
        stop = stack.enter_context(stop_signals())
        run = _Run(job, settings, checkpoints, log, stop, int(state.skipped))
        if start < settings.steps:
            ahead = stack.enter_context(prefetched(job.batches, job.place)) if job.ahead else None
            batches = ahead or in_turn(job.batches, job.place)
            run.advance = stack.enter_context(progress(console, job.name, settings.steps))
            if start == 0 and settings.evaluate_every:
                run.evaluate_first(state)
            state = run.steps_from(start, state, batches)
        checkpoints.finish()
        best = checkpoints.best
    step = int(state.step)
    if run.preempted:
        console.print(f"  stopped at step {step} of {settings.steps}; the same command goes on", highlight=False)
    best_step, best_metric = (best.step, best.metric) if best else (None, None)
    return Trained(state, step, start, run.preempted, log.last if log else {}, best_step, best_metric)


def open_checkpoints(directory: Path, identity: Mapping[str, object], settings: LoopSettings) -> Checkpoints:
    """The checkpoints of the run in `directory`."""
    keep = {"keep_last": settings.keep_last, "keep_best": settings.keep_best}
    return Checkpoints(directory / CHECKPOINTS, identity=identity, **keep)


def _begin(job: Job, checkpoints: Checkpoints, console: Console) -> tuple[TrainState, int]:
    """Returns the state to continue from and its step, and sets the data to the same position."""
    fresh = job.initial()
    abstract = abstract_state(fresh)
    if not checkpoints.holds_any:
        return fresh, 0
    del fresh  # frees its memory for the restored state
    restored = checkpoints.restore(abstract)
    assert restored is not None
    for message in restored.passed_over:
        console.print(f"  passed over: {message}", highlight=False)
    job.batches.set_state(restored.record.data)
    console.print(f"  going on from step {restored.record.step}", highlight=False)
    return restored.state, restored.record.step


@dataclass
class _Run:
    """The steps of one process."""

    job: Job
    settings: LoopSettings
    checkpoints: Checkpoints
    log: MetricsLog | None
    stop: threading.Event
    skipped: int
    advance: Advance = lambda amount, total=None, /, *, note="": None
    preempted: bool = False
    _reported: int = 0
    _before: tuple[int, Mapping[str, ArrayLike]] | None = None
    _since: tuple[int, float] = field(default_factory=lambda: (0, time.monotonic()))

    def evaluate_first(self, state: TrainState) -> None:
        """Evaluates the state before the first step and logs the result as step 0."""
        if self.job.evaluate is None:
            return
        found = self._evaluate(state)
        if self.log is not None:
            self.log.write(0, {f"{EVALUATION}{name}": float(value) for name, value in found.items()})

    def steps_from(self, start: int, state: TrainState, batches: Iterator[Positioned]) -> TrainState:
        """Runs the steps after `start`; each is reported while the next one runs, or when that one raises."""
        self._since = (start, time.monotonic())
        try:
            return self._steps(start, state, batches)
        except BaseException:
            if self._before is not None:
                with contextlib.suppress(Exception):  # the first error says what is wrong
                    self._report(*self._before, due=True)
            raise

    def _steps(self, start: int, state: TrainState, batches: Iterator[Positioned]) -> TrainState:
        last = self.settings.steps
        for number in range(start + 1, last + 1):
            taken = next(batches, None)
            if taken is None:
                raise PuzzleError(f"the data ended after {number - 1} of {last} steps")
            batch, position = taken
            state, metrics = self.job.step(state, self.job.fixed, batch)
            before, self._before = self._before, (number, metrics)
            if before is not None:
                self._report(*before)
            stopping = self._stopping(number)
            evaluating = self.job.evaluate is not None and _due(number, self.settings.evaluate_every, last)
            saving = stopping or _due(number, self.settings.save_every, last)
            if evaluating or saving:
                found = self._evaluate(state) if evaluating else {}
                self._before = None
                metric = self._report(number, metrics, found)
                if saving or self._is_best(metric):
                    if self.log is not None:
                        self.log.sync()  # a restored run finds the lines of all steps up to its own
                    data = position if self.job.ahead else self.job.batches.get_state()
                    self.checkpoints.save(number, state, data=data, metric=metric)
                self._since = (number, time.monotonic())
            if stopping:
                self.preempted = number < last
                break
        return state

    def _report(
        self,
        number: int,
        metrics: Mapping[str, ArrayLike],
        evaluation: Mapping[str, float] | None = None,
        *,
        due: bool = False,
    ) -> float | None:
        """Waits for a step, counts it and logs it if due; returns the job's best metric if the step was evaluated.

        Raises PuzzleError when too many consecutive steps were skipped.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.advance(number - self._reported, note=self._note(number, values))
        self._reported = number
        self.skipped = self.skipped + 1 if values["skipped"] else 0
        evaluation = evaluation or {}
        if self.log is not None and (
            due or evaluation or self.skipped or _due(number, self.settings.log_every, self.settings.steps)
        ):
            steps, now = number - self._since[0], time.monotonic()
            values |= {f"{EVALUATION}{name}": float(value) for name, value in evaluation.items()}
            values["seconds_per_step"] = (now - self._since[1]) / max(steps, 1)
            self._since = (number, now)
            self.log.write(number, values)
        if self.skipped >= self.settings.max_skipped:
            raise PuzzleError(
                f"{self.job.name} stopped: the loss or its gradient was not finite in {self.skipped} steps in a row, "
                f"up to step {number}; look at their data, or start again with a lower learning_rate"
            )
        metric = None if self.job.best is None else evaluation.get(self.job.best)
        return float(metric) if metric is not None and math.isfinite(metric) else None

    def _note(self, number: int, values: Mapping[str, float]) -> str:
        """A step's loss, reward, KL and tokens per second, as shown beside the progress bar."""
        names = ["loss", "reward", *(name for name in values if name.split("_")[-1] == "kl")]
        shown = [f"{name} {values[name]:.4g}" for name in names if name in values]
        steps, seconds = number - self._since[0], time.monotonic() - self._since[1]
        rated = (name for name in values if name.endswith("tokens_per_second"))
        rates = {name.removesuffix("_per_second"): values[name] for name in rated}
        if self.job.tokens_per_step and steps > 0 and seconds > 0:
            rates["tokens"] = self.job.tokens_per_step * steps / seconds
        shown += [f"{rate:,.0f} {name.replace('_', ' ')}/s" for name, rate in rates.items()]
        return ", ".join(shown)

    def _evaluate(self, state: TrainState) -> Mapping[str, float]:
        assert self.job.evaluate is not None
        values = self.job.evaluate(state)
        if self.job.best is not None and self.job.best not in values:
            raise PuzzleError(f"best is {self.job.best!r}, but an evaluation gives {', '.join(sorted(values))}")
        return values

    def _is_best(self, metric: float | None) -> bool:
        if metric is None or not self.settings.keep_best:
            return False
        best = self.checkpoints.best
        return best is None or best.metric is None or metric < best.metric

    def _stopping(self, number: int) -> bool:
        """Returns whether to stop after this step; several processes decide together, every `log_every` steps."""
        if jax.process_count() == 1:
            return self.stop.is_set()
        if number % self.settings.log_every:
            return False
        return bool(multihost_utils.process_allgather(np.asarray(self.stop.is_set())).any())


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; once it is set, SIGINT raises KeyboardInterrupt.

    Previous handlers are restored on exit. Only the main thread can install handlers; in others nothing sets the event.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _due(number: int, every: int, last: int) -> bool:
    return number == last or (every > 0 and number % every == 0)
