"""Refinement by gradients: children that the integer program makes from the experts' values at random children nearby.

Every step draws children around the present one: each expert has a logit, 1 if it is kept and -1 if not, plus logistic
noise (the difference of two Gumbel variables), and the integer program keeps the experts with the largest sum of logits
that the target allows, whatever its limits are. Noise comes in antithetic pairs. At each of these children, one
backward pass values the experts that it lacks (`search.refine.gradients`): the value of an expert is the mean
first-order fall of the KL per token if it were given back. Means over steps fade by `decay`.

The program then chooses the experts with the largest sum of values. Values are first-order, so several trust regions
are tried: a bonus for what the present child does, from a large one to none. These children are run whole on a sample
of the calibration traces, and the best becomes the present child. The last few present children are the proposal, of
which validation traces choose one; as for every proposal, confirmation traces decide whether it is accepted.

The noise, its pairs and the descent on true KL are from RCO (arXiv 2605.00649), which has one budget, logits moved by
straight-through gradients, and masks that scale the gates of experts chosen without regard to what is pruned. Here
limits are those of the target, a child routes again as it does when it is cut, and logits are in nats per token.

Left out: windows, which stay the child's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from jaxtyping import Bool, Float

from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.traces import Trace
from puzzle_jax.processes.published import decided
from puzzle_jax.search.recipe import GradientSettings
from puzzle_jax.search.refine.accept import Pool
from puzzle_jax.search.refine.gradients import addition_effects
from puzzle_jax.search.score.alternatives import expert_mask
from puzzle_jax.search.score.replace_one import ReplaceOne
from puzzle_jax.search.score.whole_children import Measurements
from puzzle_jax.search.solve.problem import Candidate, Problem, Scores
from puzzle_jax.search.space import ExpertChoice, Space

BONUSES = (2.0, 1.0, 0.5, 0.2, 0.0)
"""Bonuses for what the present child does, as multiples of the mean size of an expert's value."""

PROPOSED = 4
"""The most children of a descent that are run on the validation traces."""

Masks = Bool[np.ndarray, "layers experts"]
Values = Float[np.ndarray, "layers experts"]


@dataclass(frozen=True)
class Descent:
    """Descents from children of one search.

    Attributes:
      space: the alternatives of the search, whose expert counts are offered.
      problem: makes the integer program of a space and its scores.
      run: makes the runner of a child, whose windows it has.
      traces: calibration traces.
      measure: returns the KL of candidates on traces, which the name identifies.
      validate: returns the KL of candidates on the validation traces.
      settings: steps and sizes.
      seed: random seed.
    """

    space: Space
    problem: Callable[[Space, Scores], Problem]
    run: Callable[[Candidate], ReplaceOne]
    traces: Sequence[Trace]
    measure: Callable[[Sequence[Candidate], Sequence[Trace], str], Measurements]
    validate: Callable[[Sequence[Candidate]], Measurements]
    settings: GradientSettings
    seed: int = 0

    def __call__(self, child: Candidate) -> Pool | None:
        """The last children of a descent from `child`, run on the validation traces; None if no step found a better
        one."""
        random = np.random.default_rng(self.seed)
        run, found = self.run(child), [child]
        falls, tokens = np.zeros((2, *self.masks(child).shape))
        for step in range(self.settings.steps):
            more_falls, more_tokens = self._falls(run, found[-1], self._sample(random, self.settings.traces), random)
            falls = self.settings.decay * falls + more_falls
            tokens = self.settings.decay * tokens + more_tokens
            near = [found[-1], *self.around(found[-1], falls / np.maximum(tokens, 1.0))]
            compared = self._sample(random, self.settings.compared)
            if len(near) > 1:
                scores = self.measure(near, compared, f"descent {self.seed} {step}").scores
                best = int(np.argmin([score.kl for score in scores]))
                if best:
                    found.append(replace(near[best], score=max(0.0, found[-1].score + scores[best].kl - scores[0].kl)))
        proposed = found[1:][-PROPOSED:]
        return Pool(proposed, *self.validate(proposed)) if proposed else None

    def values(self, child: Candidate) -> Values:
        """Every expert's value at random children near one, in nats per token; higher is better."""
        random = np.random.default_rng(self.seed)
        falls, tokens = self._falls(self.run(child), child, self._sample(random, self.settings.traces), random)
        return falls / np.maximum(tokens, 1.0)

    def masks(self, child: Candidate) -> Masks:
        """Experts that a child keeps."""
        experts = self.space.parent.blocks[0].num_experts
        return np.stack([expert_mask(choice, experts) for choice in child.choices])

    def project(self, child: Candidate, values: Values) -> Candidate:
        """The child with the windows of `child` and the largest sum of values of kept experts that meets the target.

        Costs depend on how many experts a layer keeps, so the best set of each offered number is the one with the
        largest values, and the integer program chooses the numbers. Where the target cannot be met with these windows,
        raises `InfeasibleError`; the windows of a child that meets it always can.
        """
        choices, lost = [], []
        for layer, offered in enumerate(self.space.expert_choices):
            order = np.argsort(-values[layer], kind="stable")
            counts = sorted({choice.count for choice in offered}, reverse=True)
            choices.append(tuple(ExpertChoice(n, tuple(sorted(order[:n].tolist())), "gradients") for n in counts))
            lost.append(tuple(float(values[layer, order[n:]].sum()) for n in counts))
        # More than any choice of experts can gain, so that windows stay.
        other = 1.0 + 2.0 * float(np.abs(values).sum())
        windows = tuple(
            tuple(dict.fromkeys((own[0], block.window)))
            for own, block in zip(self.space.windows, child.blocks, strict=True)
        )
        of_windows = tuple(
            tuple(0.0 if window == block.window else other for window in of_layer)
            for of_layer, block in zip(windows, child.blocks, strict=True)
        )
        problem = self.problem(Space(self.space.parent, tuple(choices), windows), Scores(tuple(lost), of_windows))
        return replace(problem.solve()[0], name="gradients", score=child.score)

    def around(self, child: Candidate, values: Values) -> list[Candidate]:
        """Distinct children other than `child` that the program chooses by the values, the nearest first."""
        mask, size = self.masks(child), float(np.abs(values).mean())
        signs, known = np.where(mask, 1.0, -1.0), {child.kept}
        found = []
        for each in decided(lambda: [self.project(child, values + b * size * signs).to_json() for b in BONUSES]):
            candidate = Candidate.from_json(each)
            if candidate.kept not in known:
                found.append(candidate)
                known.add(candidate.kept)
        return found

    def noisy(self, child: Candidate, random: np.random.Generator) -> Iterator[Values]:
        """Yields random logits of children near `child`, in pairs whose noise has opposite signs."""
        signs = np.where(self.masks(child), 1.0, -1.0)
        while True:
            noise = self.settings.noise * random.logistic(size=signs.shape)
            yield signs + noise
            yield signs - noise

    def _falls(
        self, run: ReplaceOne, child: Candidate, traces: Sequence[Trace], random: np.random.Generator
    ) -> tuple[Values, Values]:
        """Falls of the KL by giving each expert to children that lack it, and the tokens over which these are sums."""
        falls = np.zeros(self.masks(child).shape)
        tokens, noisy = np.zeros_like(falls), self.noisy(child, random)
        for batch in micro_batches(traces, longest=max(len(t.prompt) + len(t.completion) for t in self.traces)):
            real = int((batch.ids >= 0).sum())  # the rows after these are padding
            logits = list(islice(noisy, real))
            kept = decided(lambda logits=logits: [self.project(child, each).kept for each in logits])
            masks = np.repeat(self.masks(child)[None], len(batch.ids), axis=0)
            for row, of_child in enumerate(kept):
                for layer, of_layer in enumerate(of_child):
                    masks[row, layer] = np.isin(np.arange(masks.shape[2]), of_layer)
            _, effects = addition_effects(run, batch, masks)
            lengths = np.array([len(traces[number].completion) if number >= 0 else 0 for number in batch.ids])
            falls -= effects.sum(axis=0)
            tokens += (~masks * lengths[:, None, None]).sum(axis=0)
        return falls, tokens

    def _sample(self, random: np.random.Generator, most: int) -> list[Trace]:
        return [self.traces[number] for number in random.permutation(len(self.traces))[:most]]
