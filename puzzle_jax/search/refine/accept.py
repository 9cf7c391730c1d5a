"""The steps after the integer program: choosing by real KL, and two refinements that must be confirmed.

    pool      every solution of the integer program, and some baselines, are run whole on traces that were not used for
              scoring, and the one of which the lowest KL is expected is taken (`refine.expected`)
    rescore   all alternatives are rescored around the child, the integer program is solved with those scores, and its
              pool is run likewise
    swap      experts that the child keeps are swapped for experts that it lost, in one layer or in several

A refined child replaces the one before only if its KL on confirmation traces, which were used for neither proposing nor
choosing, is lower by more than two standard errors of the paired difference, and if it keeps every floor (a limit on
the KL of a group of traces) that the one before kept. The scores that proposed it are biased in its favour: an
iteration that is accepted on its own traces lowers the KL there and may raise it elsewhere. Both refinements continue
from the child accepted last, and each ends with its first refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from puzzle_jax.evaluate.statistics import weighted_mean
from puzzle_jax.search.refine.expected import expected_kls
from puzzle_jax.search.score.measurements import Score
from puzzle_jax.search.score.whole_children import Measurements
from puzzle_jax.search.solve.floors import MeasuredFloors
from puzzle_jax.search.solve.problem import Candidate
from puzzle_jax.search.space import ExpertChoice

STANDARD_ERRORS = 2.0
"""Number of standard errors by which a refinement must lower the KL."""

PerTrace = Float[np.ndarray, "traces"]


@dataclass(frozen=True)
class Difference:
    """KL of one child minus that of another on the same traces, in nats per token.

    Attributes:
      mean: negative where the first is better.
      se: standard error over traces.
    """

    mean: float
    se: float

    @staticmethod
    def between(one: PerTrace, other: PerTrace, tokens: Int[np.ndarray, "traces"]) -> Difference:
        """The difference of values that are each the mean over a trace of `tokens` tokens."""
        return Difference(*weighted_mean(one - other, tokens))

    @property
    def proves_better(self) -> bool:
        return self.mean < -STANDARD_ERRORS * self.se


@dataclass(frozen=True)
class Pool:
    """Children run whole on the same traces.

    Attributes:
      candidates: the children, each with its predicted KL.
      scores: each child's means.
      kl: KL per token of each child on every trace.
      tokens: completion tokens of every trace.
      floors: limits on the KL of groups of these traces; None without any. The candidates know their KLs there.
    """

    candidates: Sequence[Candidate]
    scores: Sequence[Score]
    kl: Float[np.ndarray, "children traces"]
    tokens: Int[np.ndarray, "traces"]
    floors: MeasuredFloors | None = None

    @staticmethod
    def measured(candidates: Sequence[Candidate], found: Measurements, floors: MeasuredFloors | None) -> Pool:
        """The pool of candidates with their measurements; `violated` of each names the floors that do not hold."""
        if floors is not None:
            kls = [floors.kls(kl) for kl in found.kl]
            pairs = zip(candidates, kls, strict=True)
            candidates = [replace(c, measured_kl=of_c, violated=floors.words(of_c)) for c, of_c in pairs]
        return Pool(candidates, *found, floors)

    @cached_property
    def expected(self) -> Float[np.ndarray, "children"]:
        """The KL to expect of each child on other traces, by its prediction and its measurement together."""
        return expected_kls([candidate.score for candidate in self.candidates], self.kl, self.tokens)

    @property
    def best(self) -> int:
        """The candidate with the lowest expected KL among those that keep all floors; if none does, the one that
        violates them least."""

        def order(number: int) -> tuple[float, float]:
            floors, candidate = self.floors, self.candidates[number]
            excess = 0.0 if floors is None else floors.excess(candidate.measured_kl)
            return excess, float(self.expected[number])

        return min(range(len(self.candidates)), key=order)

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's correlation of predicted and real KL; None if either does not vary."""
        predicted, real = [c.score for c in self.candidates], [score.kl for score in self.scores]
        if len(set(predicted)) < 2 or len(set(real)) < 2:
            return None
        from scipy.stats import spearmanr  # takes half a second to import

        return float(spearmanr(predicted, real)[0])  # pyright: ignore[reportArgumentType]

    def to_json(self) -> list[dict[str, Any]]:
        """Every candidate with its real and its expected KL, and the amount by which its real KL exceeds the chosen
        one's, which is negative where it is lower."""
        return [
            {
                **candidate.to_json(),
                "validation": asdict(score),
                "expected": float(expected),
                "above_best": asdict(Difference.between(kl, self.kl[self.best], self.tokens)),
            }
            for candidate, score, kl, expected in zip(self.candidates, self.scores, self.kl, self.expected, strict=True)
        ]


@dataclass(frozen=True)
class Attempt:
    """One attempt at a refinement.

    Attributes:
      step: name and number of the step.
      candidate: the child it proposed; None if it found no other.
      validation: difference from the child before, on the traces that chose the proposal.
      confirmation: the same difference, on traces that no choice depended on.
      broken: floors that held for the child before and do not for the proposal, in words.
    """

    step: str
    candidate: Candidate | None
    validation: Difference | None
    confirmation: Difference | None
    broken: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return self.confirmation is not None and self.confirmation.proves_better and not self.broken

    def __str__(self) -> str:
        if self.validation is None or self.confirmation is None:
            return f"{self.step}: nothing better was found"
        verdict = "accepted" if self.accepted else "refused"
        changes = (f"{d.mean:+.4f} ±{d.se:.4f}" for d in (self.validation, self.confirmation))
        because = f", since {'; '.join(self.broken)}" if self.broken else ""
        return "{}: KL {} on validation, {} on confirmation traces: {}{}".format(self.step, *changes, verdict, because)

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "accepted": self.accepted,
            "candidate": None if self.candidate is None else self.candidate.to_json(),
            "validation": None if self.validation is None else asdict(self.validation),
            "confirmation": None if self.confirmation is None else asdict(self.confirmation),
            **({"broken": list(self.broken)} if self.broken else {}),
        }


def refine(
    child: Candidate,
    rounds: int,
    rescore: Callable[[Candidate], Pool],
    proposals: int,
    swap: Callable[[Candidate], Pool | None],
    confirm: Callable[[Candidate, Candidate], tuple[Difference, Difference]],
    breaks: Callable[[Candidate, Candidate], tuple[str, ...]] = lambda new, old: (),
) -> tuple[Candidate, list[Attempt]]:
    """Tries to lower a child's KL; returns the last accepted child, its score changed by the confirmed differences, and
    all attempts.

    Args:
      rounds: the most rounds of rescoring.
      rescore: returns the pool that scores around a child lead to.
      proposals: the most proposals of swaps.
      swap: returns a pool of children that keep other experts; None if none seems better.
      confirm: returns the differences between a proposal and the child before, on validation and confirmation traces.
      breaks: returns the floors, in words, that held for the child before and do not for the proposal.
    """
    tried: list[Attempt] = []

    def attempts(step: str, most: int, propose: Callable[[Candidate], Pool | None]) -> None:
        nonlocal child
        for number in range(most):
            pool = propose(child)
            proposal = None if pool is None else pool.candidates[pool.best]
            if proposal is None or (proposal.blocks, proposal.kept) == (child.blocks, child.kept):
                tried.append(Attempt(f"{step} {number + 1}", None, None, None))
                return
            validation, confirmation = confirm(proposal, child)
            broken = breaks(proposal, child)
            tried.append(Attempt(f"{step} {number + 1}", proposal, validation, confirmation, broken))
            if not tried[-1].accepted:
                return
            # The gains that chose a proposal are biased, and those of many swaps do not add up, so the score is
            # updated by the confirmed difference.
            child = replace(proposal, score=child.score + confirmation.mean)

    attempts("rescore", rounds, rescore)
    attempts("swap", proposals, swap)
    return child, tried


@dataclass(frozen=True)
class Swap:
    """Other experts for one layer.

    Attributes:
      layer: index of the layer.
      choice: the experts that it keeps after the swap.
      gain: change of the child's KL by this swap alone, in nats per token; negative is better.
    """

    layer: int
    choice: ExpertChoice
    gain: float


def together(child: Candidate, swaps: Sequence[Swap]) -> list[Candidate]:
    """Children with the first swap, with the first two, four, eight and so on, and with all of them."""
    sizes = sorted({min(2**power, len(swaps)) for power in range(len(swaps).bit_length() + 1)} - {0})
    found = []
    for size in sizes:
        candidate = replace(child, name="swap")
        for swap in swaps[:size]:
            candidate = with_choice(candidate, swap.layer, swap.choice, candidate.score + swap.gain)
        found.append(candidate)
    return found


def swapped(choice: ExpertChoice, scores: Float[np.ndarray, "experts"], most: int) -> list[ExpertChoice]:
    """Expert sets that differ by one expert: by a ranking, one of the worst kept is swapped for one of the best lost.

    Args:
      choice: the experts that the layer keeps.
      scores: ranking scores of the layer's experts; higher is better.
      most: number of experts considered on either side; all pairs are returned.
    """
    order = np.argsort(-scores, kind="stable").tolist()
    kept = [expert for expert in reversed(order) if expert in choice.kept][:most]
    lost = [expert for expert in order if expert not in choice.kept][:most]
    return [
        ExpertChoice(choice.count, tuple(sorted({*choice.kept, new} - {old})), f"{choice.method}, {old} for {new}")
        for old, new in product(kept, lost)
    ]


def with_choice(candidate: Candidate, layer: int, choice: ExpertChoice, score: float) -> Candidate:
    """A candidate whose layer keeps other experts, but as many as before."""
    choices = tuple(choice if index == layer else own for index, own in enumerate(candidate.choices))
    return replace(candidate, choices=choices, score=score)
