"""The search as an integer program over each layer's expert set and window; turns solutions into architectures.

Every layer is two groups, one for its experts and one for its attention. Scores and costs add over groups, so the
product of a layer's alternatives is never listed. What all architectures share (embedding, head, sampling) is a group
with one alternative. The limits are the target's (`search.solve.constraints`) and are checked on exact sums; limits on
the KL of groups of traces (`search.solve.floors`) are limits on sums of scores by group ("kl.recall").

A scenario's numbers are named "request_seconds.chat", or "request_seconds.chat.16" for each batch on offer if its batch
is open. In that case the integer program chooses the batch too: the limits of one batch have to hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import Any

from puzzle_jax.config import BlockConfig
from puzzle_jax.costs.provider import Seconds
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.costs.table import Architecture, Costs, seconds_key
from puzzle_jax.errors import ConfigError, InfeasibleError
from puzzle_jax.numeric import Number
from puzzle_jax.program.explain import Conflict, InfeasibleProgram
from puzzle_jax.program.library import Disjunction, Library, Limit, Program, Solution
from puzzle_jax.program.solve import assess, solve
from puzzle_jax.search.solve.constraints import Constraint, constraints_by_batch, constraints_of, request_seconds
from puzzle_jax.search.solve.floors import ABOVE_MEAN, Floor, floor_numbers, shared_numbers
from puzzle_jax.search.space import ExpertChoice, Space

SCORE, EXPERT_BYTES, PARAMETERS = "score", "expert_bytes", "parameters"


@dataclass(frozen=True)
class Scores:
    """The loss that each alternative causes when it alone replaces the parent's sub-block; 0 for the parent's own.

    Attributes:
      experts: per layer, one number per expert choice of the space.
      attention: per layer, one number per window of the space.
      groups: the same on the traces of limited groups alone, by name of the group.
    """

    experts: tuple[tuple[float, ...], ...]
    attention: tuple[tuple[float, ...], ...]
    groups: Mapping[str, Scores] = field(default_factory=dict)

    @property
    def typical(self) -> float:
        """The sum, over the program's groups, of the mean size of their alternatives' scores."""
        return sum(sum(map(abs, row)) / len(row) for row in (*self.experts, *self.attention))


@dataclass(frozen=True)
class Candidate:
    """An architecture with its predicted score and costs.

    Attributes:
      name: how it was found.
      blocks: per layer, expert count and window.
      choices: per layer, the experts that stay.
      score: sum of its alternatives' scores.
      costs: sums by key ("expert_bytes", "parameters", "kv_bytes.<scenario>", "memory_bytes.<scenario>",
        "prefill_seconds.<scenario>", "decode_seconds.<scenario>", "request_seconds.<scenario>", and "kl.<group>" for
        groups whose KL is limited).
      batches: requests that run together, by scenario.
      violated: limits of the target that it violates, in words.
      status: status of the integer program's solution; "given" if none was solved.
      gap: relative gap of the integer program's solution.
      measured_kl: KL on validation traces by limited group, and over all tokens ("*"); empty without such limits, or if
        it was not run.
    """

    name: str
    blocks: Architecture
    choices: tuple[ExpertChoice, ...]
    score: float
    costs: Mapping[str, Number]
    batches: Mapping[str, int]
    violated: tuple[str, ...]
    status: str
    gap: float | None
    measured_kl: Mapping[str, float] = field(default_factory=dict)

    @property
    def meets_target(self) -> bool:
        return not self.violated

    @property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        return tuple(choice.kept for choice in self.choices)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "score": self.score,
            "costs": dict(self.costs),
            "batches": dict(self.batches),
            "missed": list(self.violated),
            "status": self.status,
            "gap": self.gap,
            **({"measured_kl": dict(self.measured_kl)} if self.measured_kl else {}),
            "layers": [
                {
                    "num_local_experts": b.num_experts,
                    "sliding_window": b.window,
                    "method": c.method,
                    "kept": list(c.kept),
                }
                for b, c in zip(self.blocks, self.choices, strict=True)
            ],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Candidate:
        """The inverse of `to_json`."""
        layers = value["layers"]
        return Candidate(
            name=value["name"],
            blocks=tuple(BlockConfig(x["num_local_experts"], x["sliding_window"]) for x in layers),
            choices=tuple(ExpertChoice(len(x["kept"]), tuple(x["kept"]), x["method"]) for x in layers),
            score=value["score"],
            costs=value["costs"],
            batches=value["batches"],
            violated=tuple(value["missed"]),
            status=value["status"],
            gap=value["gap"],
            measured_kl=value.get("measured_kl", {}),
        )


@dataclass(frozen=True)
class Problem:
    """A space with scores, costs, a target, and limits on the KL of groups of traces, whose scores `scores.groups` must
    have. Raises `ConfigError` if they do not fit together."""

    space: Space
    scores: Scores
    costs: Costs
    target: Target
    floors: tuple[Floor, ...] = ()

    def __post_init__(self) -> None:
        self.target.check_scenarios([scenario.name for scenario in self.costs.scenarios])
        self._check(self.scores)
        for floor in self.floors:
            if floor.group not in self.scores.groups:
                raise ConfigError(f"the KL of {floor.group} is limited, but the scores are not known for it")
            self._check(self.scores.groups[floor.group])

    def _check(self, scores: Scores) -> None:
        for name, alternatives in (("experts", self.space.expert_choices), ("attention", self.space.windows)):
            numbers = getattr(scores, name)
            if [len(x) for x in numbers] != [len(x) for x in alternatives]:
                raise ConfigError(
                    f"scores.{name} has {[len(x) for x in numbers]} numbers per layer, "
                    f"but the space has {[len(x) for x in alternatives]} alternatives"
                )
            for layer, row in enumerate(numbers):
                if not all(isfinite(number) for number in row):
                    raise ConfigError(f"scores.{name} of layer {layer} are {list(row)}, but must be finite")

    @cached_property
    def library(self) -> Library:
        """The alternatives in the form that integer programs take."""
        costs = self.costs
        groups: dict[str, dict[str, dict[str, Any]]] = {
            "shared": {
                "": {
                    SCORE: 0.0,
                    EXPERT_BYTES: 0,
                    PARAMETERS: costs.shared_parameters,
                    "kv_bytes": {scenario.name: 0 for scenario in costs.scenarios},
                    "memory_bytes": self._by_batch(lambda scenario, _: scenario.replicas * costs.shared_bytes),
                    **self._seconds(costs.fixed),
                    **shared_numbers(self.floors, self.scores.typical),
                }
            }
        }
        for layer, (choices, windows) in enumerate(zip(self.space.expert_choices, self.space.windows, strict=True)):
            groups[experts_group(layer)] = {
                choice.name: self._expert_numbers(layer, index, choice) for index, choice in enumerate(choices)
            }
            groups[attention_group(layer)] = {
                window_name(window): self._attention_numbers(layer, index, window)
                for index, window in enumerate(windows)
            }
        return groups

    def _expert_numbers(self, layer: int, index: int, choice: ExpertChoice) -> dict[str, Any]:
        costs = self.costs.experts_of(layer, BlockConfig(choice.count))
        return {
            SCORE: self.scores.experts[layer][index],
            EXPERT_BYTES: costs.weight_bytes,
            PARAMETERS: costs.parameters,
            "kv_bytes": {scenario.name: 0 for scenario in self.costs.scenarios},
            "memory_bytes": self._by_batch(lambda scenario, _: scenario.expert_copies * costs.weight_bytes),
            **self._seconds(costs.seconds),
            **self._kl(lambda scores: scores.experts[layer][index]),
        }

    def _attention_numbers(self, layer: int, index: int, window: int | None) -> dict[str, Any]:
        costs = self.costs.attention_of(layer, BlockConfig(1, window))
        return {
            SCORE: self.scores.attention[layer][index],
            EXPERT_BYTES: 0,
            PARAMETERS: 0,
            "kv_bytes": dict(costs.kv_bytes),
            "memory_bytes": self._by_batch(lambda scenario, batch: batch * costs.kv_bytes[scenario.name]),
            **self._seconds(costs.seconds),
            **self._kl(lambda scores: scores.attention[layer][index]),
        }

    def _kl(self, of: Callable[[Scores], float]) -> dict[str, dict[str, float]]:
        """An alternative's numbers for floors."""
        return floor_numbers(self.floors, of(self.scores), {n: of(scores) for n, scores in self.scores.groups.items()})

    def _by_batch(self, value: Callable[[Scenario, int], Number]) -> dict[str, Any]:
        """Numbers by scenario, or by scenario and batch if the batch is open."""
        return {
            scenario.name: value(scenario, scenario.batch)
            if scenario.batch is not None
            else {str(batch): value(scenario, batch) for batch in self.costs.offered_batches(scenario.name)}
            for scenario in self.costs.scenarios
        }

    def _seconds(self, seconds: Mapping[str, Seconds]) -> dict[str, Any]:
        """Seconds of prefill, of one decoding step and of a whole request."""

        def of(scenario: Scenario, batch: int) -> Seconds:
            return seconds[seconds_key(scenario, batch)]

        return {
            "prefill_seconds": self._by_batch(lambda scenario, batch: of(scenario, batch).prefill_seconds),
            "decode_seconds": self._by_batch(lambda scenario, batch: of(scenario, batch).decode_seconds),
            "request_seconds": self._by_batch(lambda scenario, batch: request_seconds(scenario, of(scenario, batch))),
        }

    @cached_property
    def constraints(self) -> tuple[Constraint, ...]:
        """The constraints that must hold whichever batches are chosen."""
        on_costs = constraints_of(self.target, self.costs, self.space.parent.blocks)
        return (*on_costs, *(floor.constraint(self.scores.typical) for floor in self.floors))

    @cached_property
    def constraints_by_batch(self) -> Mapping[str, Mapping[int, tuple[Constraint, ...]]]:
        """By scenario with an open batch, the constraints of each batch, of which one batch's must hold."""
        return constraints_by_batch(self.target, self.costs, self.space.parent.blocks)

    @cached_property
    def limits(self) -> tuple[Limit | Disjunction, ...]:
        """The limits of `constraints`, and for each open batch the disjunction of `constraints_by_batch`."""
        batches = [
            Disjunction(scenario, {str(batch): tuple(c.limit for c in at_batch) for batch, at_batch in batches.items()})
            for scenario, batches in self.constraints_by_batch.items()
        ]
        return (*(constraint.limit for constraint in self.constraints), *batches)

    @cached_property
    def program(self) -> Program:
        return Program(self.library, SCORE, self.limits)

    def solve(
        self, *, num_solutions: int = 1, min_distance: int = 1, time_limit: Number = 30.0, gap: Number = 1e-4
    ) -> list[Candidate]:
        """The best architectures; see `program.solve`.

        Raises `InfeasibleError`, saying which parts of the target conflict and what could be reached.
        """
        options: dict[str, Any] = {"min_distance": min_distance, "time_limit": time_limit, "gap": gap}
        try:
            solutions = solve(self.program, num_solutions=num_solutions, **options)
        except InfeasibleProgram as error:
            raise self._explain(error.conflicts) from error
        return [self.candidate(f"solution {i + 1}", solution) for i, solution in enumerate(solutions)]

    def by_reach(self, count: int, *, time_limit: Number = 30.0, gap: Number = 1e-4) -> list[Candidate]:
        """The best architectures that differ in which layers see less than in the parent, at most `count` of them.

        Which narrower window a layer has makes no other pattern. Fewer are returned if the target allows no more.
        Raises `InfeasibleError` as `solve` does.
        """
        classes = {
            attention_group(layer): {window_name(window): window == block.window for window in windows}
            for layer, (windows, block) in enumerate(zip(self.space.windows, self.space.parent.blocks, strict=True))
        }
        try:
            found = solve(self.program, num_solutions=count, time_limit=time_limit, gap=gap, classes=classes)
        except InfeasibleProgram as error:
            raise self._explain(error.conflicts) from error
        return [self.candidate(f"pattern {i + 1}", solution) for i, solution in enumerate(found)]

    def candidate(self, name: str, solution: Solution) -> Candidate:
        """Converts a solution to an architecture."""
        choices, windows = [], []
        for layer in range(self.space.num_layers):
            chosen = solution.choice[experts_group(layer)]
            choices.append(next(c for c in self.space.expert_choices[layer] if c.name == chosen))
            chosen = solution.choice[attention_group(layer)]
            windows.append(next(w for w in self.space.windows[layer] if window_name(w) == chosen))
        blocks = tuple(BlockConfig(c.count, w) for c, w in zip(choices, windows, strict=True))
        return Candidate(
            name=name,
            blocks=blocks,
            choices=tuple(choices),
            score=solution.score,
            costs={k: total for k, total in solution.costs.items() if k != SCORE and k.split(".")[0] != ABOVE_MEAN},
            batches={scenario.name: self._batch(scenario, solution.choice) for scenario in self.costs.scenarios},
            violated=tuple(self._violated(limit, solution.costs[limit.key]) for limit in solution.violated),
            status=solution.status,
            gap=solution.gap,
        )

    def assess(self, name: str, choice: Mapping[str, str]) -> Candidate:
        """Converts a given choice for every group to an architecture."""
        return self.candidate(name, assess(self.program, choice))

    def parent(self) -> Candidate:
        """The parent itself. Raises `ConfigError` if its expert counts are not in the space."""
        choice = {"shared": ""}
        for layer, block in enumerate(self.space.parent.blocks):
            whole = [c.name for c in self.space.expert_choices[layer] if c.count == block.num_experts]
            if not whole:
                raise ConfigError(f"layer {layer} lacks the parent's {block.num_experts} experts")
            choice[experts_group(layer)] = whole[0]
            choice[attention_group(layer)] = window_name(block.window)
        return self.assess("parent", choice)

    def _batch(self, scenario: Scenario, choice: Mapping[str, str]) -> int:
        """The batch with the most tokens per second among those at which a choice meets the target; if none does, among
        those that fit in memory; if none fits, the smallest."""
        if scenario.batch is not None:
            return scenario.batch
        met = {
            batch: [c.limit.is_met(self.program.totals(choice, c.limit.key)) for c in constraints]
            for batch, constraints in self.constraints_by_batch[scenario.name].items()
        }
        useful = [batch for batch, limits in met.items() if all(limits)]
        useful = useful or [batch for batch, (fits, *_) in met.items() if fits]

        def seconds_per_request(batch: int) -> float:
            return float(self.program.totals(choice, f"request_seconds.{seconds_key(scenario, batch)}")) / batch

        return min(useful, key=seconds_per_request) if useful else min(met)

    @cached_property
    def _constraint_of(self) -> Mapping[Limit, Constraint]:
        by_batch = [at_batch for batches in self.constraints_by_batch.values() for at_batch in batches.values()]
        return {constraint.limit: constraint for group in (self.constraints, *by_batch) for constraint in group}

    def _violated(self, limit: Limit, value: float) -> str:
        constraint = self._constraint_of[limit]
        return f"{constraint.name} is {constraint.reached(value)}, asked for {constraint.asked}"

    def _explain(self, conflicts: Sequence[Conflict]) -> InfeasibleError:
        """Explains conflicts, naming each part of the target once, at the batch that comes nearest to it."""
        by_name: dict[tuple[str, str], list[Conflict]] = {}
        for conflict in conflicts:
            constraint = self._constraint_of[conflict.limit]
            by_name.setdefault((constraint.name, constraint.asked), []).append(conflict)

        def nearest(found: list[Conflict], value: Callable[[Conflict], float | None]) -> str | None:
            known = [(conflict.limit, total) for conflict in found if (total := value(conflict)) is not None]
            if not known:
                return None
            limit, total = min(known, key=lambda pair: pair[1] / float(pair[0].bound))
            return f"{self._constraint_of[limit].name} {self._constraint_of[limit].reached(total)}"

        asked = [f"{name} {value}" for name, value in by_name]
        alone = [nearest(found, lambda conflict: conflict.alone) for found in by_name.values()]
        together = [said for found in by_name.values() if (said := nearest(found, lambda c: c.given_others))]
        text = f"the target cannot be met: {' and '.join(asked)}"
        text += f"; the best reachable by itself is {', '.join(map(str, alone))}"
        if together and together != alone:
            text += f"; with everything else asked for, it is {', or '.join(together)}"
        return InfeasibleError(text)


def experts_group(layer: int) -> str:
    return f"layer {layer} experts"


def attention_group(layer: int) -> str:
    return f"layer {layer} attention"


def window_name(window: int | None) -> str:
    return "full" if window is None else str(window)
