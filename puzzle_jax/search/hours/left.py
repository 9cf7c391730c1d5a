"""Time left of a running search: the roofline's seconds for its settings, corrected by what its stages took.

The roofline of the devices present predicts how stages compare; how fast they really are is learnt from every stage
that has run. Later ones count more, since their programs are more like those that are still to come.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from puzzle_jax.convert_hf.table import Form
from puzzle_jax.costs.hardware import HARDWARE, Hardware, hardware_named
from puzzle_jax.generate.traces import Trace
from puzzle_jax.numeric import Number
from puzzle_jax.search.artifacts import TRACES
from puzzle_jax.search.context import Search
from puzzle_jax.search.hours.work import SearchTime
from puzzle_jax.search.recipe import TRACE_SETS, TraceSettings

_OF_A_STAGE = {"trace": ("load", "trace"), "score": ("lens", "score")}
"""Entries of `SearchTime.seconds` that make up a stage of the pipeline, where that is not the entry of its name."""

_STAGES = ("trace", "rank", "score", "solve", "finalists", "refine", "assemble", "evaluate")

_OLDER = 0.5
"""Weight of the stages before, relative to the latest stage."""


_SHORT_SECONDS = 300.0  # below this, much of a stage may have been compiling


class TimeLeft:
    """Predicted seconds of stages, and measured seconds of those that have run.

    Args:
      predicted: seconds by stage, in the order in which they run; stages that are not named take none.
    """

    def __init__(self, predicted: Mapping[str, Number]) -> None:
        self.left = dict(predicted)
        self._predicted = self._measured = 0.0

    def finished(self, stage: str, seconds: float | None) -> float | None:
        """Seconds that the stages after this one will take; None while nothing is known, or when no stage is left.

        `seconds` is what the stage took, None if it was skipped.
        """
        expected = self.left.pop(stage, 0.0)
        if seconds is not None and expected > 0:
            self._predicted = _OLDER * self._predicted + expected
            self._measured = _OLDER * self._measured + seconds
        remaining = sum(self.left.values())
        return remaining * self._measured / self._predicted if self._predicted and remaining else None


class Reported:
    """The time left as a search reports it. Stages of a few minutes, most of which may have gone into compiling, do not
    predict those to come; a search that has no others needs no forecast.
    """

    def __init__(self, known: Callable[[], TimeLeft]) -> None:
        """`known` returns the time left before anything has run; it is called when first needed."""
        self._known = known
        self._stages: list[tuple[str, float | None]] = []
        self._left: TimeLeft | None = None

    def finished(self, stage: str, seconds: float | None) -> str:
        """The text to add to the line of a stage that took so many seconds, or was skipped (None)."""
        measured = seconds is not None and seconds >= _SHORT_SECONDS
        self._stages.append((stage, seconds if measured else None))
        if self._left is None and not measured:
            return ""
        news = self._stages[-1:]
        if self._left is None:
            self._left, news = self._known(), self._stages
        found = [self._left.finished(*each) for each in news][-1]
        return "" if found is None else f", about {spoken(found)} left"


def time_left_of(search: Search) -> TimeLeft:
    """The time left of a search on the devices present."""
    return TimeLeft(by_stage(work_of(search, present_hardware())))


def work_of(search: Search, hardware: Hardware) -> SearchTime:
    """The work of a search, with the lengths of its traces if it has them."""
    recipe, lengths = search.recipe, {}
    sets = {name: search.traces(name) for name in TRACE_SETS if (search.run / TRACES[name].path).exists()}
    if recipe.traces.file is not None and sets:
        recipe = replace(recipe, traces=_given(recipe.traces, sets))
    limits = recipe.traces.max_tokens
    traces = [trace for trace in sets.get("calibration", ()) if trace.effort in limits]
    if traces:
        lengths["prompt_tokens"] = round(fmean(len(trace.prompt) for trace in traces))
        lengths["answer_share"] = min(1.0, fmean(len(trace.completion) / limits[trace.effort] for trace in traces))
    form: Form = "mxfp4" if search.parent.packed else "bf16"
    return SearchTime(search.parent.config, recipe, form, hardware, stored=search.parent.description.form, **lengths)


def _given(settings: TraceSettings, sets: Mapping[str, Sequence[Trace]]) -> TraceSettings:
    """Settings that would ask for as many traces as were given, limited to the longest of each effort."""
    limits: dict[str, int] = {}
    for trace in itertools.chain.from_iterable(sets.values()):
        limits[trace.effort] = max(limits.get(trace.effort, 1), len(trace.completion))
    asked = len(limits) * max(1, len(settings.tasks))
    counts = {name: -(-len(traces) // asked) for name, traces in sets.items() if traces}
    return replace(settings, efforts=tuple(limits), max_tokens=limits, **counts)


def by_stage(work: SearchTime) -> dict[str, Number]:
    """The roofline's seconds by stage of the pipeline."""
    parts = {stage: _OF_A_STAGE.get(stage, (stage,)) for stage in _STAGES if stage in work.seconds}
    return {stage: sum(work.seconds[part] for part in of) for stage, of in parts.items()}


def present_hardware() -> Hardware:
    """The entry of `costs.hardware` for the first device present, or a measurement of that device."""
    import jax

    words = jax.local_devices()[0].device_kind.lower().split()
    known = [hardware for name, hardware in HARDWARE.items() if name in words]
    return known[0] if known else hardware_named("local")


def spoken(seconds: float) -> str:
    """A duration in words, in at most two units.

    >>> spoken(42), spoken(400), spoken(9_000)
    ('1 min', '7 min', '2 h 30 min')
    """
    minutes = max(1, round(seconds / 60))
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
