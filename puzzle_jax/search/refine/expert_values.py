"""Values of experts around a child, from gradients at random children nearby; swaps are proposed by them.

The removal error, by which swaps are proposed otherwise, is measured in the parent and says little about a child that
has lost half its experts. Here an expert's value is the mean first-order fall of the KL per token if it were given back
(`search.refine.gradients`) to children that lack it: every trace is run through a random child of its own near the
given one, so that experts that the child has are missing now and then, and all are valued in the same way.

A random child: each expert has a logit, 1 if it is kept and -1 if not, plus logistic noise (the difference of two
Gumbel variables), and the integer program keeps the experts with the largest sum of logits that the target allows,
whatever its limits are. Noise comes in antithetic pairs. Noise, pairs and the true KL are from RCO (arXiv 2605.00649),
which has one budget, moves logits by straight-through gradients, and lets masks scale the gates of experts that the
parent's router chose. Here a child routes again, as it does when it is cut, and one round of values is enough to
propose swaps, which exact scores then judge.

Left out: values of windows, which stay the child's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.traces import Trace
from puzzle_jax.processes.published import decided
from puzzle_jax.search.refine.gradients import addition_effects
from puzzle_jax.search.score.alternatives import expert_mask
from puzzle_jax.search.score.replace_one import ReplaceOne
from puzzle_jax.search.solve.problem import Candidate, Problem, Scores
from puzzle_jax.search.space import ExpertChoice, Space

MOST_TRACES = 216
"""The most traces, and so random children, that one round of values takes."""

NOISE = 0.8
"""Scale of the noise on logits of 1 and -1."""

Values = Float[np.ndarray, "layers experts"]


@dataclass(frozen=True)
class ExpertValues:
    """Values around children of one search.

    Attributes:
      space: the alternatives of the search, whose expert counts are offered.
      problem: makes the integer program of a space and its scores.
      run: makes the runner of a child, whose windows it has.
      traces: calibration traces.
      solver: options of `Problem.solve`.
      seed: random seed.
    """

    space: Space
    problem: Callable[[Space, Scores], Problem]
    run: Callable[[Candidate], ReplaceOne]
    traces: Sequence[Trace]
    solver: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __call__(self, child: Candidate) -> Values:
        """Every expert's value in nats per token; higher is better, and 0 for experts that were never missing."""
        random, run, mask = np.random.default_rng(self.seed), self.run(child), self.mask(child)
        traces = [self.traces[number] for number in random.permutation(len(self.traces))[:MOST_TRACES]]
        longest = max(len(trace.prompt) + len(trace.completion) for trace in self.traces)
        noisy, falls, tokens = self.noisy(mask, random), np.zeros(mask.shape), np.zeros(mask.shape)
        for batch in micro_batches(traces, longest=longest):
            masks = np.repeat(mask[None], len(batch.ids), axis=0)
            logits = list(islice(noisy, int((batch.ids >= 0).sum())))  # the rows after these are padding
            kept = decided(lambda logits=logits: [self.project(child, each).kept for each in logits])
            for row, of_child in enumerate(kept):
                masks[row] = [np.isin(np.arange(mask.shape[1]), of_layer) for of_layer in of_child]
            _, effects = addition_effects(run, batch, masks)
            lengths = np.array([len(traces[number].completion) if number >= 0 else 0 for number in batch.ids])
            falls -= effects.sum(axis=0)
            tokens += (~masks * lengths[:, None, None]).sum(axis=0)
        return falls / np.maximum(tokens, 1.0)

    def mask(self, child: Candidate) -> Bool[np.ndarray, "layers experts"]:
        """True for experts that a child keeps."""
        experts = self.space.parent.blocks[0].num_experts
        return np.stack([expert_mask(choice, experts) for choice in child.choices])

    def noisy(self, mask: Bool[np.ndarray, "layers experts"], random: np.random.Generator) -> Iterator[Values]:
        """Yields random logits of children near one, in pairs whose noise has opposite signs."""
        signs = np.where(mask, 1.0, -1.0)
        while True:
            noise = NOISE * random.logistic(size=signs.shape)
            yield signs + noise
            yield signs - noise

    def project(self, child: Candidate, logits: Values) -> Candidate:
        """The child with the windows of `child` and the largest sum of logits of kept experts that meets the target.

        Costs depend on how many experts a layer keeps, so the best set of each offered number is the one with the
        largest logits, and the integer program chooses the numbers. Raises `InfeasibleError` where the target cannot be
        met with these windows; with those of a child that meets it, it always can.
        """
        choices, lost = [], []
        for layer, offered in enumerate(self.space.expert_choices):
            order = np.argsort(-logits[layer], kind="stable")
            counts = sorted({choice.count for choice in offered}, reverse=True)
            choices.append(tuple(ExpertChoice(n, tuple(sorted(order[:n].tolist())), "gradients") for n in counts))
            lost.append(tuple(float(logits[layer, order[n:]].sum()) for n in counts))
        windows = tuple(
            tuple(dict.fromkeys((own[0], block.window)))
            for own, block in zip(self.space.windows, child.blocks, strict=True)
        )
        other = 1.0 + 2.0 * float(np.abs(logits).sum())  # more than any choice of experts gains, so that windows stay
        of_windows = tuple(
            tuple(0.0 if window == block.window else other for window in of_layer)
            for of_layer, block in zip(windows, child.blocks, strict=True)
        )
        problem = self.problem(Space(self.space.parent, tuple(choices), windows), Scores(tuple(lost), of_windows))
        return replace(problem.solve(**self.solver)[0], score=child.score)
