"""A pool whose best child keeps the floors by measured KLs, found by tightening the integer program's limits.

The pool of the integer program is run whole. If none of its children keeps every floor, the limits that the nearest one
violates are lowered by bound over measured KL, the program is solved again, and its solutions join the pool, up to
`ROUNDS` times. If still none does, the nearest child is the best, and its `violated` names the floors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from puzzle_jax.search.refine.accept import Pool
from puzzle_jax.search.solve.floors import Floor, tightened
from puzzle_jax.search.solve.problem import Candidate

ROUNDS = 3
"""The most times that limits are tightened."""


def pool_within(
    pool: Pool,
    floors: Sequence[Floor],
    solve: Callable[[Sequence[Floor]], Sequence[Candidate]],
    measure: Callable[[Sequence[Candidate]], Pool],
) -> Pool:
    """A pool with children that keep the floors, if tightened limits lead to some.

    Args:
      pool: the pool of the floors as they are.
      floors: the floors that its candidates were chosen by.
      solve: returns the integer program's solutions under some floors; none if it has none.
      measure: runs candidates whole, on the same traces as the pool.
    """
    for number in range(1, ROUNDS + 1):
        best = pool.candidates[pool.best]
        if best.meets_target or pool.floors is None:
            break
        floors = tightened(floors, pool.floors, best.measured_kl)
        known = {(candidate.blocks, candidate.kept) for candidate in pool.candidates}
        found = [c for c in solve(floors) if (c.blocks, c.kept) not in known]
        if not found:
            break
        named = [replace(c, name=f"{c.name}, floors tightened {number}x") for c in found]
        pool = measure([*pool.candidates, *named])
    return pool
