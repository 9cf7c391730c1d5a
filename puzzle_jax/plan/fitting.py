"""The smallest set of changes by which a search fits into its devices.

The figures that a plan compiled are scaled: weights are exact, caches grow with slots, contexts and the heads of a
device, hidden states and temporaries with the tokens of a batch and the alternatives that run together. Every
combination of changes is tried in this way, by arithmetic alone. Those without more devices come first, then those that
keep the length of answers, then those with the fewest kinds of changes, and of these the gentlest. The first that fits
is compiled, and the next one where the compiler disagrees.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from jax.sharding import AbstractMesh

from puzzle_jax.files import Json
from puzzle_jax.generate.batches import longest_batch
from puzzle_jax.generate.engine import own_context, slot_context
from puzzle_jax.model.weights import stays_packed, weight_bytes
from puzzle_jax.plan.compilers import compiler
from puzzle_jax.plan.record import Change, Usage, compiled
from puzzle_jax.plan.search import CALIBRATE, LENS, LOAD, RANK, SCORE, TRACE, PlannedSearch

_HALVINGS = 6
_TRIES = 3  # compiled, one after the other


class _Factors(NamedTuple):
    """Changes as powers of two, the gentlest kind first: experts packed, answers sampled together, alternatives that
    run together, tokens of a batch, lengths of answers, devices."""

    packed: int
    slots: int
    per_call: int
    tokens: int
    contexts: int
    devices: int

    @property
    def rank(self) -> tuple[int, ...]:
        return (self.devices, self.contexts, sum(map(bool, self)), *reversed(self))


def smallest_change(run: PlannedSearch, found: Mapping[str, Usage], limit: int) -> Change | None:
    """The change by which all stages fit; None where none of those tried is enough.

    Args:
      run: what was planned.
      found: what its programs need.
      limit: bytes of a device.
    """
    tried = 0
    for factors in sorted(_candidates(run, found, limit), key=lambda factors: factors.rank):
        changed = with_factors(run, factors)
        total = max(estimates(run, changed, found).values())
        if total > limit:
            continue
        settings = _settings(run, factors)
        if factors.devices:  # more than there are to compile for
            return Change("the smallest change that should be enough, by estimate", settings, total)
        failed = [stage for stage, usage in found.items() if usage.total > limit]
        total = max(usage.total for usage in compiled({s: changed.programs[s] for s in failed}).values())
        if total <= limit:
            return Change("the smallest change that is enough, as compiled", settings, total)
        tried += 1
        if tried == _TRIES:
            return None
    return None


def _candidates(run: PlannedSearch, found: Mapping[str, Usage], limit: int) -> Iterator[_Factors]:
    """Combinations of changes that bear on what does not fit."""
    failed = {stage for stage, usage in found.items() if usage.total > limit}
    traces, score = run.recipe.traces, run.recipe.score
    scored = bool(failed & {LENS, SCORE})
    ranges = _Factors(
        packed=int(run.stored_packed and not run.packed),
        slots=_halvings(traces.batch_size) if TRACE in failed else 0,
        per_call=_halvings(score.per_call) if scored else 0,
        tokens=_halvings(max(1, score.tokens_per_batch // run.longest)) if scored else 0,
        contexts=4,
        devices=4,
    )
    for powers in itertools.product(*(range(most + 1) for most in ranges)):
        yield _Factors(*powers)


def _halvings(value: int) -> int:
    return min(_HALVINGS, value.bit_length() - 1)


def _settings(run: PlannedSearch, factors: _Factors) -> dict[str, Json]:
    """Changed fields of the recipe."""
    recipe, found = run.recipe, {}
    if factors.packed:
        found["weights"] = "packed"
    for name, section, power in (
        ("traces.batch_size", recipe.traces, factors.slots),
        ("score.per_call", recipe.score, factors.per_call),
        ("score.tokens_per_batch", recipe.score, factors.tokens),
    ):
        if power:
            found[name] = getattr(section, name.partition(".")[2]) >> power
    if factors.contexts:
        found["traces.max_tokens"] = {
            effort: max(1, tokens >> factors.contexts) for effort, tokens in recipe.traces.max_tokens.items()
        }
    if factors.devices:
        found["mesh.model"] = recipe.mesh.model << factors.devices
    return found


def with_factors(run: PlannedSearch, factors: _Factors) -> PlannedSearch:
    """The search with these changes."""
    settings, recipe = _settings(run, factors), run.recipe
    for name, value in settings.items():
        section, _, inner = name.partition(".")
        changed = replace(getattr(recipe, section), **{inner: value}) if inner else value
        recipe = replace(recipe, **{section: changed})
    return replace(run, recipe=recipe)


def estimates(old: PlannedSearch, new: PlannedSearch, found: Mapping[str, Usage]) -> dict[str, int]:
    """Estimates the bytes that one device needs in every stage with other settings from what the old ones need."""
    cut = new.recipe.mesh.model / old.recipe.mesh.model  # how many times as many devices
    heads = cut if new.config.num_kv_heads % new.recipe.mesh.model == 0 else 1.0
    weights = _weights(new)
    slots = new.recipe.traces.batch_size / old.recipe.traces.batch_size
    contexts = _context(new) / _context(old)
    together = new.recipe.score.per_call / old.recipe.score.per_call
    tokens = {
        RANK: _tokens(new) / _tokens(old),
        CALIBRATE: _tokens(new) / _tokens(old),
        **dict.fromkeys((LENS, SCORE), _tokens(new, scored=True) / _tokens(old, scored=True)),
    }
    totals = {}
    for stage, usage in found.items():
        others = {name: size for name, size in usage.held.items() if name != "weights"}
        if stage == LOAD:
            held, temporaries = 0.0, usage.temporaries / cut
        elif stage == TRACE:
            scale = {"caches": slots * contexts / heads, "slots": slots, "group": contexts / heads}
            held = sum(size * scale[name] for name, size in others.items())
            temporaries = float(usage.temporaries)
        else:
            held = sum(size * (tokens[stage] if name in ("batch", "states") else 1.0) for name, size in others.items())
            more = together if stage in (LENS, SCORE) else 1.0
            temporaries = usage.temporaries * tokens[stage] * more / cut
        totals[stage] = round(weights + held + temporaries)
    return totals


def _weights(run: PlannedSearch) -> int:
    mesh = AbstractMesh((run.recipe.mesh.data, run.recipe.mesh.model), ("data", "model"))
    dtype, memory = compiler().dtype, run.device_memory
    setting = run.recipe.weights
    packed = stays_packed(setting, run.config, run.stored_packed, dtype=dtype, mesh=mesh, memory=memory)
    return weight_bytes(run.config, dtype, mesh, packed=packed)


def _context(run: PlannedSearch) -> int:
    return slot_context(own_context(run.longest, run.config))


def _tokens(run: PlannedSearch, scored: bool = False) -> int:
    """Tokens of the batch of the longest traces."""
    given = {"tokens_per_batch": run.recipe.score.tokens_per_batch} if scored else {}
    rows, length = longest_batch(run.longest, **given)
    return rows * length
