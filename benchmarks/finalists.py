"""The finalist that is chosen after a number of steps, its cost, and the cost of windows that are data.

    python benchmarks/finalists.py [--steps 25 50 100] [--windows] -- --run RUN --finalists count=4,...

What follows `--` are arguments of `puzzle search`, of a search whose stage `solve` and training traces are there. For
each number of steps all finalists are trained anew. `--windows` compares the step that all finalists share, whose
differing windows are data, with a step compiled for the first finalist alone. CPU seconds are those of all threads.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.search.__main__ import SEARCH
from puzzle_jax.search.context import Search
from puzzle_jax.search.finalists.stage import contest_of, contestants, trainer
from puzzle_jax.settings import verbs
from puzzle_jax.train.distill.objectives import Fixed
from puzzle_jax.train.traces.batches import TraceBatches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="*", default=[])
    parser.add_argument("--windows", action="store_true", help="time both kinds of steps")
    parser.add_argument("search", nargs="+", help="arguments of puzzle search, after --")
    options = parser.parse_args()
    enable_compilation_cache()
    console = Console(width=150)
    recipe = verbs.parse(SEARCH, options.search)
    if options.windows:
        compare_windows(Search(recipe, Console(quiet=True)), console)
    for steps in options.steps:
        search = Search(replace(recipe, finalists=replace(recipe.finalists, steps=steps)), Console(quiet=True))
        with tempfile.TemporaryDirectory() as kept:
            begun = time.perf_counter()
            contest, cpu = timed(partial(contest_of, search, Path(kept)))
            wall = time.perf_counter() - begun
        console.print(contest.table())
        console.print(f"{steps} steps: {wall:.0f} s, {cpu:.0f} CPU seconds")


def compare_windows(search: Search, console: Console) -> None:
    """Times compiling and steps, in turns, of the shared step and of one for a single child."""
    found = contestants(search)
    shared, alone = trainer(search, found), trainer(search, found[:1])
    child = search.child(found[0])
    table = Table("windows", "compiling, CPU s", "a step, CPU s", "a step, s")
    states, seconds = {}, {}
    for name, one in (("data", shared), ("compiled in", alone)):
        batches = TraceBatches(one._examples, one._data, search.parent.chat.pad_id)
        state, fixed, batch = one._fresh(one._base), Fixed(one._base, child.view), next(batches)
        compiled, seconds[name] = timed(lambda one=one, s=state, f=fixed, b=batch: one._step.lower(s, f, b).compile())
        states[name] = [compiled, state, fixed, batch, [], []]
    for _ in range(12):
        for entry in states.values():
            compiled, state, fixed, batch, cpus, walls = entry

            def step(compiled=compiled, state=state, fixed=fixed, batch=batch):
                return jax.block_until_ready(compiled(state, fixed, batch))

            ((entry[1], _), wall), cpu = timed(lambda step=step: timed(step, time.perf_counter))
            cpus.append(cpu)
            walls.append(wall)
    for name, (_, _, _, _, cpus, walls) in states.items():
        table.add_row(name, f"{seconds[name]:.1f}", f"{median(cpus):.3f}", f"{median(walls):.3f}")
    console.print(table)


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> tuple[Any, float]:
    """The result of the work, and the seconds that it took."""
    start = clock()
    return work(), clock() - start


if __name__ == "__main__":
    main()
