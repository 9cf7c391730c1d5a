"""Other ways to choose an architecture for the same target, from the same scores and costs, to compare with.

    uniform       the same number of experts in every layer and the same window on every full layer; of each layer's
                  expert sets of that number the one of least score, so it is the strongest of its kind
    experts_only  the integer program, with the parent's windows
    windows_only  the integer program, with all experts kept
    greedy        repeatedly the change of least score per reduction of the excess over the limits, until there is none
    random        a random architecture within the target
    max_params    the integer program with most parameters in place of least score (uses no scores)

A baseline that finds nothing within the target returns the nearest architecture that it finds (least summed relative
excess over the limits, then least score) and names the limits that it violates, so that a table can show them.
"""

from __future__ import annotations

import random as random_numbers
from itertools import product

import numpy as np

from puzzle_jax.errors import ConfigError
from puzzle_jax.program.library import Library, Limit, Program, lookup
from puzzle_jax.program.solve import elastic_solve
from puzzle_jax.search.solve.problem import (
    PARAMETERS,
    SCORE,
    Candidate,
    Problem,
    attention_group,
    experts_group,
    window_name,
)

Choice = dict[str, str]

BASELINES = ("uniform", "experts_only", "windows_only", "greedy", "random", "max_params")

# A relief below this comes from the rounding of sums and is no progress.
_ROUNDING = 1e-9


def all_baselines(problem: Problem, *, seed: int = 0, method: str | None = None) -> dict[str, Candidate]:
    """Every baseline by name."""
    return {
        "uniform": uniform(problem, method=method),
        "experts_only": experts_only(problem),
        "windows_only": windows_only(problem),
        "greedy": greedy(problem),
        "random": random(problem, seed=seed),
        "max_params": max_params(problem),
    }


def uniform(problem: Problem, *, method: str | None = None) -> Candidate:
    """The best architecture with one expert count for all layers and one window for all full-attention layers.

    Args:
      problem: provides the counts and windows to try: those that all (full-attention) layers offer.
      method: ranking rule whose expert sets are taken; by default, and where it offers none, each layer's set of least
        score.
    """
    table = _Table(problem)
    found = _uniform_choices(problem, method)
    best = min(found.values(), key=lambda choice: (table.excess(table.totals(choice)), table.score(choice)))
    return problem.assess("uniform", best)


def uniform_candidates(problem: Problem, *, method: str | None = None) -> list[Candidate]:
    """All uniform architectures, named by expert count and window."""
    return [problem.assess(name, choice) for name, choice in _uniform_choices(problem, method).items()]


def _uniform_choices(problem: Problem, method: str | None) -> dict[str, Choice]:
    space = problem.space
    counts = set.intersection(*(set(space.expert_counts(layer)) for layer in range(space.num_layers)))
    full = [layer for layer, windows in enumerate(space.windows) if len(windows) > 1]
    windows = (
        [w for w in space.windows[full[0]] if all(w in space.windows[layer] for layer in full)] if full else [None]
    )
    found: dict[str, Choice] = {}
    for count, window in product(sorted(counts, reverse=True), windows):
        choice = {"shared": ""}
        for layer in range(space.num_layers):
            offered = zip(problem.scores.experts[layer], space.expert_choices[layer], strict=True)
            sets = sorted(((score, c) for score, c in offered if c.count == count), key=lambda pair: pair[0])
            ranked = [c for _, c in sets if method is not None and method in c.method.split("+")]
            choice[experts_group(layer)] = (ranked or [c for _, c in sets])[0].name
            choice[attention_group(layer)] = window_name(window if layer in full else space.windows[layer][0])
        found[f"{count} experts, window {window_name(window)}"] = choice
    if not found:
        raise ConfigError("no expert count is offered in all layers, but uniform pruning needs one")
    return found


def experts_only(problem: Problem) -> Candidate:
    """The best choice of experts with the parent's windows."""
    return _pinned(problem, "experts_only", [attention_group(layer) for layer in range(problem.space.num_layers)])


def windows_only(problem: Problem) -> Candidate:
    """The best choice of windows with the parent's experts."""
    return _pinned(problem, "windows_only", [experts_group(layer) for layer in range(problem.space.num_layers)])


def greedy(problem: Problem) -> Candidate:
    """Starts from the parent and, while any change relieves the excess, makes the one of least score per relief."""
    table = _Table(problem)
    choice = _parent_choice(problem)
    totals = table.totals(choice)
    while (excess := table.excess(totals)) > 0:
        steps = []
        for group, alternatives in problem.library.items():
            own = table.numbers[group, choice[group]]
            for name in alternatives:
                other = table.numbers[group, name]
                relief = excess - table.excess(totals + other[1:] - own[1:])
                if relief > _ROUNDING:
                    harm = other[0] - own[0]
                    steps.append((harm / relief if harm > 0 else harm, group, name))
        if not steps:
            break
        _, group, name = min(steps)
        choice[group] = name
        totals = table.totals(choice)
    return problem.assess("greedy", choice)


def random(problem: Problem, *, seed: int = 0, draws: int = 2000) -> Candidate:
    """The first of up to `draws` random architectures that meets the target.

    If none does, the last one is changed at random, and changes that relieve its excess are kept.
    """
    source = random_numbers.Random(seed)
    table = _Table(problem)
    options = {group: list(alternatives) for group, alternatives in problem.library.items()}
    choice: Choice = {}
    excess = np.inf
    for _ in range(draws):
        choice = {group: source.choice(names) for group, names in options.items()}
        excess = table.excess(table.totals(choice))
        if excess == 0:
            break
    for _ in range(draws if excess else 0):
        group = source.choice(list(options))
        changed = {**choice, group: source.choice(options[group])}
        relieved = table.excess(table.totals(changed))
        if relieved < excess:
            choice, excess = changed, relieved
    return problem.assess("random", choice)


def max_params(problem: Problem) -> Candidate:
    """The architecture with the most parameters within the target."""
    library = {
        group: {name: {**numbers, "fewer": -numbers[PARAMETERS]} for name, numbers in alternatives.items()}
        for group, alternatives in problem.library.items()
    }
    return problem.assess("max_params", elastic_solve(Program(library, "fewer", problem.limits)).choice)


def _pinned(problem: Problem, name: str, groups: list[str]) -> Candidate:
    """The integer program's solution with some groups fixed to the parent's."""
    parent = _parent_choice(problem)
    library: Library = {
        group: {parent[group]: alternatives[parent[group]]} if group in groups else alternatives
        for group, alternatives in problem.library.items()
    }
    return problem.candidate(name, elastic_solve(Program(library, SCORE, problem.limits)))


def _parent_choice(problem: Problem) -> Choice:
    """The parent's choice, with the most experts that the space offers."""
    choice = {"shared": ""}
    for layer, (choices, windows) in enumerate(zip(problem.space.expert_choices, problem.space.windows, strict=True)):
        choice[experts_group(layer)] = max(choices, key=lambda c: c.count).name
        choice[attention_group(layer)] = window_name(windows[0])
    return choice


class _Table:
    """Scores and limited sums of every alternative as floats, for heuristics that try many choices."""

    def __init__(self, problem: Problem):
        program = problem.program
        keys = [SCORE, *(limit.key for limit in program.all_limits)]
        self.numbers = {
            (group, name): np.array([float(lookup(numbers, key)) for key in keys])
            for group, alternatives in problem.library.items()
            for name, numbers in alternatives.items()
        }
        # All limits of a target are upper bounds; they are raised slightly so that rounding of a sum violates none.
        self.bounds = np.array([limit.bound * (1 + 1e-12) for limit in program.all_limits])
        columns = iter(range(len(self.bounds)))
        always = [next(columns) for limit in program.limits if isinstance(limit, Limit)]
        # For each disjunction, the columns of every set of limits; limits that always hold are one of a single set.
        self.sets = [[always]]
        for disjunction in program.disjunctions:
            self.sets.append([[next(columns) for _ in limits] for limits in disjunction.sets.values()])

    def score(self, choice: Choice) -> float:
        return float(sum(self.numbers[item][0] for item in choice.items()))

    def totals(self, choice: Choice) -> np.ndarray:
        return np.sum([self.numbers[item][1:] for item in choice.items()], axis=0)

    def excess(self, totals: np.ndarray) -> float:
        """Summed relative excess over the limits; for a disjunction that over the set with the least excess."""
        over = np.maximum(totals / self.bounds - 1, 0)
        return float(sum(min(over[columns].sum() for columns in sets) for sets in self.sets))
