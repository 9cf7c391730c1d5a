"""How long a search takes: the work that its settings ask for in each stage, at the roofline's speed.

    trace      prefill of all prompts and decoding of all answers, in slots that are always full
    rank       one pass over the calibration traces, with one expert more than the chosen ones
    lens       two passes over up to 96 traces to fit the maps; two more, and every alternative's own layer, to use them
    score      two passes over the scored traces, and for every alternative its own layer and those above it
    solve      whole children on the validation traces
    finalists  for every step of each a pass of the teacher and one of the student with its backward pass; the finalists
               on the validation traces, whole before training and trained after it
    refine     scoring again around a child, swaps of experts, whole children on validation and confirmation traces
    assemble   one pass for the scales of the FP8 cache, and writing the child
    evaluate   whole children on the held-out traces, and answers of every model

A pass is a prefill, with seconds from `costs.roofline` and its shares of the peaks. Answers are taken to be
`answer_share` of their limits long. The work of adaptive scoring and successive elimination depends on the scores that
they find; `SCORED_TRACES` is what it came to on the embedded parent.

Left out: compiling (minutes for each shape, once if a compilation cache is kept), and host work between device
programs, of which only the integer program's time limit is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rich.table import Table

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.table import Form, tensor_bytes
from puzzle_jax.costs.assumptions import Assumptions, default_assumptions
from puzzle_jax.costs.hardware import Hardware
from puzzle_jax.numeric import Number
from puzzle_jax.search.hours.passes import ModelTime
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.search.refine.expert_values import MOST_TRACES
from puzzle_jax.search.refine.gradients import FORWARDS
from puzzle_jax.search.score.measurements import METRICS
from puzzle_jax.search.score.space_scorer import LENS_TRACES, WINDOWS_FIRST
from puzzle_jax.search.space import candidate_counts, candidate_windows, restrict

SCORED_TRACES = 1.5
"""Mean number of traces on which the adaptive method scores an expert set, as a multiple of `score.first`."""

BACKWARD = 2.0
"""Work of a backward pass, as a multiple of the forward pass's."""

DISK_BYTES_PER_SECOND = 1e9
"""Speed of reading the parent and writing the child; a network file system may be slower."""

_HOST_BYTES = 3e9
"""Memory of Python, JAX with its compiler, and a tensor in transit; measured on checkpoints of real width."""

_TRACE_BYTES_PER_TOKEN = 4  # in parquet, compressed


@dataclass(frozen=True)
class SearchTime:
    """The work of a search on some hardware.

    Attributes:
      config: the parent's configuration.
      recipe: all settings; files that it names are not read.
      form: form in which experts are held in memory.
      stored: form in which the checkpoint, and so its child, stores experts; None means `form`.
      hardware: hardware of every device.
      prompt_tokens: length of a prompt.
      answer_share: mean length of an answer as a share of its limit. Prompts and answers that are together longer than
        the model's context are cut to it.
      assumptions: the roofline's assumptions.
    """

    config: ModelConfig
    recipe: Recipe
    form: Form
    hardware: Hardware
    prompt_tokens: int = 1024
    answer_share: Number = 0.5
    assumptions: Assumptions = field(default_factory=default_assumptions)
    stored: Form | None = None

    # How much there is to do ----------------------------------------------------------------------------------------

    def answers(self, problems: int) -> dict[str, int]:
        """Number of answers by effort, for the given number of problems of each task."""
        settings = self.recipe.traces
        limited = [effort for effort in settings.efforts if effort in settings.max_tokens] or settings.max_tokens
        return {effort: problems * max(1, len(settings.tasks)) for effort in limited}

    def answer_tokens(self, effort: str) -> Number:
        return max(1.0, self.answer_share * self.recipe.traces.max_tokens[effort])

    def trace_tokens(self, problems: int) -> Number:
        """Tokens of all traces of a set, prompts included."""
        return sum(
            count * (self.prompt_tokens + self.answer_tokens(effort))
            for effort, count in self.answers(problems).items()
        )

    @cached_property
    def alternatives(self) -> tuple[Number, Number]:
        """Alternatives of the whole space: those with fewer experts, per ranking rule, and with other windows."""
        config, settings = self.config, self.recipe.space
        experts = config.blocks[0].num_experts
        counts = candidate_counts(experts, config.experts_per_token, settings.fractions, settings.divisor)
        offered, windows = restrict(
            [counts] * config.num_layers, candidate_windows(config, settings.windows_for(config)), settings.restrict
        )
        own = [block.window for block in config.blocks]
        sets = sum(sum(count < experts for count in layer) for layer in offered)
        return sets, sum(len(set(each) - {w}) for each, w in zip(windows, own, strict=True))

    # Seconds of parts -----------------------------------------------------------------------------------------------

    @cached_property
    def _time(self) -> ModelTime:
        mesh = self.recipe.mesh
        return ModelTime(self.config, self.form, self.hardware, mesh.data, mesh.model, self.assumptions)

    def a_pass(self, problems: Number, more_experts: Number = 1.0) -> Number:
        """Seconds of one pass over a set of traces."""
        return sum(
            self._time.forward(self.prompt_tokens + self.answer_tokens(effort), count * problems, more_experts)
            for effort, count in self.answers(1).items()
        )

    def heads(self, problems: Number) -> Number:
        """Seconds of the output head on the answers of a set of traces."""
        return self._time.heads(
            problems * sum(count * self.answer_tokens(effort) for effort, count in self.answers(1).items())
        )

    def answering(self, problems: int) -> Number:
        """Seconds in which a model answers the given number of problems of each task."""
        slots = self.recipe.traces.batch_size
        return sum(
            self._time.answering(self.prompt_tokens, self.answer_tokens(effort), count, slots)
            for effort, count in self.answers(problems).items()
        )

    # Stages ---------------------------------------------------------------------------------------------------------

    @cached_property
    def seconds(self) -> dict[str, Number]:
        """Seconds of every stage."""
        recipe = self.recipe
        sets = recipe.trace_sets
        traces = recipe.traces.file is None
        load = tensor_bytes(self.config, self.stored or self.form) / DISK_BYTES_PER_SECOND
        children = 2 + len(recipe.evaluate.baselines)
        k = self.config.experts_per_token
        found = {
            "load": load,
            "trace": sum(map(self.answering, sets.values())) if traces else 0.0,
            "rank": self.a_pass(sets["calibration"], (k + 1) / k),
            "lens": self._lens(),
            "score": self._scoring(*self._exact_alternatives()),
            "solve": self._whole(recipe.solve.solutions + 3, sets["validation"]),
            **({"finalists": self._finalists()} if recipe.finalists.count else {}),
            "refine": self._refine(),
            "assemble": self.a_pass(sets["calibration"]) + load,
            "evaluate": self._whole(children, sets["heldout"]),
        }
        if recipe.traces.tasks:
            found["evaluate"] += children * self.answering(recipe.evaluate.problems)
        return found

    def _whole(self, children: int, problems: int) -> Number:
        return (children + 1) * (self.a_pass(problems) + self.heads(problems))

    def _problems(self, traces: Number) -> Number:
        """Converts traces to problems of every task, each asked at every effort; 0 if there is nothing to ask."""
        asked = sum(self.answers(1).values())
        return traces / asked if asked else 0.0

    @property
    def _calibration(self) -> int:
        return sum(self.answers(self.recipe.traces.calibration).values())

    def _lens(self) -> Number:
        settings = self.recipe.score
        if settings.method == "exact" or not settings.keep_sets:
            return 0.0
        problems = self._problems(min(LENS_TRACES, self._calibration))
        tokens = problems * self.trace_tokens(1)
        sets, windows = self.alternatives
        looked = sets * len(self.recipe.rank.rules) + windows
        square = self.config.hidden_size**2
        maps = self.config.num_layers * self._time.products(tokens, 2 * square)
        own_layer = self.a_pass(problems) / self.config.num_layers
        each = own_layer + self._time.products(tokens, square) + self.heads(problems)
        return 4 * self.a_pass(problems) + maps + looked * each

    def _exact_alternatives(self) -> tuple[Number, Number]:
        """Number of alternatives that are scored exactly, and the mean number of traces that each is scored on."""
        settings, (sets, windows) = self.recipe.score, self.alternatives
        rules = len(self.recipe.rank.rules)
        per_count = min(settings.keep_sets or rules, rules)
        if settings.method == "lens":
            return 0.0, 0.0
        alternatives, traces = sets * per_count + windows, self._calibration
        if settings.method == "exact" or not alternatives:
            return alternatives, traces
        of_sets = min(traces, SCORED_TRACES * settings.first)
        of_windows = min(traces, WINDOWS_FIRST * settings.first)
        return alternatives, (sets * per_count * of_sets + windows * of_windows) / alternatives

    def _scoring(self, alternatives: Number, traces: Number) -> Number:
        problems = self._problems(traces)
        layers = (self.config.num_layers + 1) / 2 / self.config.num_layers
        one = self.a_pass(problems)
        return 2 * one + alternatives * (layers * one + self.heads(problems)) if alternatives else 0.0

    def _finalists(self) -> Number:
        options, validation = self.recipe.finalists, self.recipe.traces.validation
        row = self._time.forward(options.row_length, options.rows) + self._time.heads(options.row_length * options.rows)
        after = 2 * (self.a_pass(validation) + self.heads(validation))
        steps = options.steps * (2 + BACKWARD) * row
        return options.count * (steps + after) + self._whole(options.count, validation)

    def _refine(self) -> Number:
        options, traces = self.recipe.refine, self.recipe.traces
        total = options.rounds * (self._scoring(*self._exact_alternatives()) + self.seconds_of_pool())
        if options.swaps and options.proposals:
            # All of a layer's swaps are scored on the first traces, a quarter of them on twice as many, and so on.
            swaps = self.config.num_layers * options.swaps**2
            first = min(self.recipe.score.first, self._calibration)
            total += self._scoring(swaps, 1.5 * first) + self._whole(options.proposals, traces.validation)
            if options.swaps_by == "gradients":
                drawn = self._problems(min(MOST_TRACES, self._calibration))
                # The parent's pass besides; the head's backward pass counts as two.
                total += (FORWARDS + 1) * self.a_pass(drawn) + 4 * self.heads(drawn)
        both = self._whole(2, traces.validation) + self._whole(2, traces.confirmation)
        return total + both * (options.rounds + bool(options.swaps))

    def seconds_of_pool(self) -> Number:
        """Seconds to run the integer program's solutions as whole children."""
        return self._whole(self.recipe.solve.solutions, self.recipe.traces.validation)

    # Disk and host --------------------------------------------------------------------------------------------------

    @property
    def disk_bytes(self) -> int:
        """Upper bound on the bytes of the run's directory; the child is at most as large as its parent."""
        traces = sum(map(self.trace_tokens, self.recipe.trace_sets.values()))
        return round(
            tensor_bytes(self.config, self.stored or self.form) + traces * _TRACE_BYTES_PER_TOKEN + self._table_bytes
        )

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory, without that of devices: the process, the largest tensor twice, score tables."""
        largest = 2 * self.config.vocab_size * self.config.hidden_size
        return round(_HOST_BYTES + 2 * largest + 2 * self._table_bytes)

    @property
    def _table_bytes(self) -> Number:
        return self._exact_alternatives()[0] * self._calibration * len(METRICS) * 8


def hours_table(seconds: Mapping[str, Number], devices: int, price: Number | None) -> Table:
    """A table of hours, device hours, and their price, by stage."""
    columns = ["stage", "hours", f"device hours ({devices})", *([] if price is None else ["price"])]
    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    rows: Sequence[tuple[str, Number]] = [*seconds.items(), ("total", sum(seconds.values()))]
    for name, value in rows:
        if name == "total":
            table.add_section()
        hours = value / 3600
        paid = [] if price is None else [f"{hours * devices * price:,.2f}"]
        table.add_row(name, f"{hours:,.2f}", f"{hours * devices:,.2f}", *paid)
    return table
