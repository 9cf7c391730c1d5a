"""Computes the costs of everything that a search offers: exact bytes, from the table of checkpoint tensors, and a
provider's seconds for every distinct sub-block, scenario and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

from puzzle_jax.config import BlockConfig, ModelConfig, cache_slots
from puzzle_jax.convert_hf.table import Form, TensorSpec, checkpoint_tensors
from puzzle_jax.costs.provider import Memory, Provider, Times
from puzzle_jax.costs.scenario import Scenario, candidate_batches
from puzzle_jax.costs.table import AttentionCosts, Costs, ExpertCosts, LayerCosts, seconds_key
from puzzle_jax.errors import ConfigError


@dataclass(frozen=True)
class Offer:
    """Alternatives for every layer of a parent: expert counts, and windows, where None means full attention."""

    config: ModelConfig
    counts: Sequence[Sequence[int]]
    windows: Sequence[Sequence[int | None]]


def compute_costs(
    offer: Offer, scenarios: Sequence[Scenario], form: Form, provider: Provider, memory: Memory | None = None
) -> Costs:
    """Computes the costs of every alternative of an offer, in scenarios with distinct names.

    Seconds come from `provider`; `memory` bounds the batch of a scenario that leaves it open.

    Raises `ConfigError` if a batch is open and no `memory` is given, or if not even one request fits into memory.
    """
    names = [scenario.name for scenario in scenarios]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"scenarios need distinct names and at least one, but are {names}")
    config = offer.config
    # The parent's own count has costs even if it is not offered: targets are relative to it.
    counts_of = [{b.num_experts, *counts} for b, counts in zip(config.blocks, offer.counts, strict=True)]
    counts = sorted(set.union(*counts_of))
    windows = sorted({w for layer in offer.windows for w in layer}, key=lambda w: (w is None, w))
    sizes = {count: mixture_size(config, count, form) for count in counts}
    shared_bytes, shared_parameters = shared_size(config, form)

    def fitting(scenario: Scenario) -> tuple[int, ...]:
        """Candidate batches, up to the largest that the parent and the smallest architecture leave room for."""
        if memory is None:
            raise ConfigError(f"scenario {scenario.name!r} leaves its batch open, but no memory is known to bound it")
        slots = [[kv_bytes(config, window, scenario) for window in layer] for layer in offer.windows]
        largest = [
            scenario.largest_batch(
                dense=shared_bytes,
                experts=sum(sizes[which(counts)][0] for counts in counts_of),
                kv=sum(map(which, slots)),
                room=memory.room_bytes(scenario),
                at_most=memory.max_batch(scenario),
            )
            for which in (max, min)
        ]
        if not max(largest):
            raise ConfigError(
                f"scenario {scenario.name!r} has room for {max(memory.room_bytes(scenario), 0) / 1e9:.1f} GB, "
                "but not even the smallest architecture fits with one request"
            )
        return candidate_batches(largest)

    batches = {scenario.name: fitting(scenario) for scenario in scenarios if scenario.batch is None}
    times: dict[str, Times] = {}
    for scenario in scenarios:
        for batch in batches.get(scenario.name, (scenario.batch,)):
            assert batch is not None
            key = seconds_key(scenario, batch)
            times[key] = provider.times(config, scenario.at(batch), form, counts, windows)
    return Costs(
        provider=provider.name,
        device=", ".join(dict.fromkeys(provider.device(scenario) for scenario in scenarios)),
        scenarios=tuple(scenarios),
        layers=tuple(
            LayerCosts(
                experts={
                    count: ExpertCosts(*sizes[count], {key: found.experts[count] for key, found in times.items()})
                    for count in sorted(counts_of[layer], reverse=True)
                },
                attention={
                    window: AttentionCosts(
                        {s.name: kv_bytes(config, window, s) for s in scenarios},
                        {key: found.attention[window] for key, found in times.items()},
                    )
                    for window in offer.windows[layer]
                },
            )
            for layer in range(config.num_layers)
        ),
        fixed={key: found.fixed for key, found in times.items()},
        shared_bytes=shared_bytes,
        shared_parameters=shared_parameters,
        batches=batches,
        room_bytes={name: memory.room_bytes(s) for s in scenarios if (name := s.name) in batches and memory},
    )


def kv_bytes(config: ModelConfig, window: int | None, scenario: Scenario) -> int:
    """KV-cache bytes of one layer for one request at its final length."""
    slots = cache_slots(window, scenario.context_tokens)
    return slots * 2 * config.kv_width * scenario.kv_bytes_per_value


def shared_size(config: ModelConfig, form: Form) -> tuple[int, int]:
    """Exact bytes and parameters of what all architectures share (attention, norms, embedding, head)."""

    def times(spec: TensorSpec) -> int:
        return 0 if spec.by_expert else 1 if spec.layer is None else config.num_layers

    return _size(config, config.experts_per_token, form, times)


def mixture_size(config: ModelConfig, count: int, form: Form) -> tuple[int, int]:
    """Exact bytes and parameters of one layer's experts and router."""
    return _size(config, count, form, lambda spec: int(spec.by_expert))


def _size(config: ModelConfig, count: int, form: Form, times: Callable[[TensorSpec], int]) -> tuple[int, int]:
    """Bytes and parameters of a model of one such layer, each tensor counted `times` times."""
    one = replace(config, blocks=(BlockConfig(count),))
    num_bytes = sum(times(spec) * spec.nbytes for spec in checkpoint_tensors(one, form))
    return num_bytes, sum(times(spec) * prod(spec.shape) for spec in checkpoint_tensors(one, "bf16"))
