"""Costs of an architecture as sums over its sub-blocks: bytes, KV-cache bytes, and seconds in each scenario.

Costs add up over sub-blocks, so that an integer program can choose among them (Puzzle, arXiv 2411.19146, section 4).
Bytes are exact, computed from the table of checkpoint tensors. Seconds come from a `provider`.

    seconds of a batch = prefill of all its inputs + output_tokens * one decode step of the whole batch
    tokens per second  = batch * output_tokens / seconds

A scenario with a given batch has one set of seconds, kept under its name. One that leaves its batch open has a set for
each of several batches, kept under "name.batch"; which is best depends on the architecture, and on the memory that it
leaves for caches.

Left out: batches that change while they run, and what no sub-block owns (scheduling, host time).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from puzzle_jax.codec import from_plain, to_plain
from puzzle_jax.config import BlockConfig, window_name
from puzzle_jax.costs.provider import Seconds
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.errors import ConfigError, PuzzleError, check_range, shown
from puzzle_jax.files import read_json

Architecture = tuple[BlockConfig, ...]
Key = TypeVar("Key", bound=int | str | None)
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class ExpertCosts:
    """Bytes and parameters of a layer's experts and router with one expert count; seconds by `seconds_key`."""

    weight_bytes: int
    parameters: int
    seconds: Mapping[str, Seconds]

    def __post_init__(self) -> None:
        _check_counts({"weight_bytes": self.weight_bytes, "parameters": self.parameters})


@dataclass(frozen=True)
class AttentionCosts:
    """A layer's attention with one window: KV-cache bytes of a request at its final length, by scenario name; seconds
    by `seconds_key`."""

    kv_bytes: Mapping[str, int]
    seconds: Mapping[str, Seconds]

    def __post_init__(self) -> None:
        _check_counts(self.kv_bytes, "kv_bytes.")


@dataclass(frozen=True)
class LayerCosts:
    """Costs of a layer's alternatives, by expert count and by window."""

    experts: Mapping[int, ExpertCosts]
    attention: Mapping[int | None, AttentionCosts]


@dataclass(frozen=True)
class Costs:
    """Costs of every sub-block of a space.

    Attributes:
      provider: "roofline", "measured", or whatever made the file.
      device: device that the seconds are for.
      fixed: seconds of what all architectures share, by `seconds_key`.
      shared_bytes, shared_parameters: bytes and parameters of what all architectures share (attention, norms,
        embedding, head).
      batches: batches offered in each scenario that leaves its batch open, by scenario name.
      room_bytes: memory for weights and caches in each of these scenarios, by scenario name.
    """

    provider: str
    device: str
    scenarios: tuple[Scenario, ...]
    layers: tuple[LayerCosts, ...]
    fixed: Mapping[str, Seconds]
    shared_bytes: int
    shared_parameters: int
    batches: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    room_bytes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_counts({"shared_bytes": self.shared_bytes, "shared_parameters": self.shared_parameters})
        _check_counts(self.room_bytes, "room_bytes.")
        for name, batches in self.batches.items():
            _check_counts({str(place): batch for place, batch in enumerate(batches)}, f"batches.{name}.")
        for scenario in self.scenarios:
            for name in ("batches", "room_bytes"):
                if scenario.batch is None and not getattr(self, name).get(scenario.name):
                    raise ConfigError(
                        f"scenario {scenario.name!r} leaves its batch open, but the costs lack its {name}"
                    )

    def experts_of(self, layer: int, block: BlockConfig) -> ExpertCosts:
        return _entry(self.layers[layer].experts, block.num_experts, f"layer {layer}", "expert count")

    def attention_of(self, layer: int, block: BlockConfig) -> AttentionCosts:
        return _entry(self.layers[layer].attention, block.window, f"layer {layer}", "window")

    def expert_bytes(self, blocks: Architecture) -> int:
        """Exact bytes of all experts and routers in the checkpoint."""
        return sum(self.experts_of(layer, block).weight_bytes for layer, block in self._layers(blocks))

    def weight_bytes(self, blocks: Architecture) -> int:
        """Exact bytes of all tensors of the checkpoint."""
        return self.shared_bytes + self.expert_bytes(blocks)

    def parameters(self, blocks: Architecture) -> int:
        """Exact number of parameters."""
        experts = sum(self.experts_of(layer, block).parameters for layer, block in self._layers(blocks))
        return self.shared_parameters + experts

    def kv_bytes(self, blocks: Architecture, scenario: str | None = None) -> int:
        """KV-cache bytes of one request at its final length."""
        name = self.scenario(scenario).name
        return sum(self.attention_of(layer, block).kv_bytes[name] for layer, block in self._layers(blocks))

    def memory_bytes(self, blocks: Architecture, scenario: str | None = None, batch: int | None = None) -> int:
        """Bytes of weights, and of a batch's caches at their final length, on all devices."""
        chosen = self.scenario(scenario)
        return chosen.memory_bytes(
            dense=self.shared_bytes,
            experts=self.expert_bytes(blocks),
            kv=self.kv_bytes(blocks, chosen.name),
            batch=self._batch(blocks, chosen, batch),
        )

    def seconds_keys(self, scenarios: Sequence[Scenario]) -> list[str]:
        """The keys of these scenarios' seconds, at every batch that they offer."""
        return [seconds_key(s, batch) for s in scenarios for batch in self.offered_batches(s.name)]

    # `batch`, where it may be given: None means the scenario's own or, if that is open, the architecture's best one.

    def prefill_seconds(self, blocks: Architecture, scenario: str | None = None, batch: int | None = None) -> float:
        """Seconds until a whole batch has its first token."""
        return self._sum(blocks, self.scenario(scenario), batch, "prefill_seconds")

    def decode_seconds(self, blocks: Architecture, scenario: str | None = None, batch: int | None = None) -> float:
        """Seconds of one step that gives every request of the batch one token."""
        return self._sum(blocks, self.scenario(scenario), batch, "decode_seconds")

    def request_seconds(self, blocks: Architecture, scenario: str | None = None, batch: int | None = None) -> float:
        """Seconds from the prompts to the last tokens of one batch."""
        chosen = self.scenario(scenario)
        batch = self._batch(blocks, chosen, batch)
        decode_seconds = self._sum(blocks, chosen, batch, "decode_seconds")
        return self._sum(blocks, chosen, batch, "prefill_seconds") + chosen.output_tokens * decode_seconds

    def tokens_per_second(self, blocks: Architecture, scenario: str | None = None, batch: int | None = None) -> float:
        """Generated tokens per second of a batch."""
        chosen = self.scenario(scenario)
        batch = self._batch(blocks, chosen, batch)
        return batch * chosen.output_tokens / self.request_seconds(blocks, chosen.name, batch)

    def speed_error(self, blocks: Architecture, scenario: str | None = None, batch: int | None = None) -> float:
        """The relative standard error of `tokens_per_second`, as far as it comes from timing; 0 for other costs.

        Layers of the same kind share one measurement, and so its error.
        """
        chosen = self.scenario(scenario)
        batch = self._batch(blocks, chosen, batch)
        key, layers = seconds_key(chosen, batch), self._layers(blocks)
        parts = [self.experts_of(layer, block).seconds[key] for layer, block in layers]
        parts += [self.attention_of(layer, block).seconds[key] for layer, block in layers]
        times = Counter(parts)

        def error(field: str) -> float:
            return math.sqrt(sum((n / len(layers) * getattr(part, field)) ** 2 for part, n in times.items()))

        prefill = self._sum(blocks, chosen, batch, "prefill_seconds")
        total = self.request_seconds(blocks, chosen.name, batch)
        return (prefill * error("prefill_error") + (total - prefill) * error("decode_error")) / total

    def offered_batches(self, scenario: str | None = None) -> tuple[int, ...]:
        """The scenario's own batch, or those that it may choose from."""
        chosen = self.scenario(scenario)
        return self.batches[chosen.name] if chosen.batch is None else (chosen.batch,)

    def best_batch(self, blocks: Architecture, scenario: str | None = None) -> int:
        """The offered batch with the most tokens per second among those that fit into memory.

        Raises `ConfigError` if none fits.
        """
        chosen = self.scenario(scenario)
        if chosen.batch is not None:
            return chosen.batch
        room = self.room_bytes[chosen.name]
        offered = self.offered_batches(chosen.name)
        fitting = [batch for batch in offered if self.memory_bytes(blocks, chosen.name, batch) <= room]
        if not fitting:
            raise ConfigError(f"scenario {chosen.name!r} has room for {room:,} bytes, but not one batch fits")
        return max(fitting, key=lambda batch: self.tokens_per_second(blocks, chosen.name, batch))

    def seconds_by_part(
        self, blocks: Architecture, scenario: str | None = None, batch: int | None = None
    ) -> dict[str, float]:
        """`request_seconds` as a sum over attention, experts and the rest, in prefill and in decoding."""
        chosen = self.scenario(scenario)
        key = seconds_key(chosen, self._batch(blocks, chosen, batch))
        parts = {
            "attention": [self.attention_of(i, block).seconds[key] for i, block in self._layers(blocks)],
            "experts": [self.experts_of(i, block).seconds[key] for i, block in self._layers(blocks)],
            "embedding and head": [self.fixed[key]],
        }
        out = {}
        for part, seconds in parts.items():
            out[f"{part}, prefill"] = float(sum(s.prefill_seconds for s in seconds))
            out[f"{part}, decoding"] = float(chosen.output_tokens * sum(s.decode_seconds for s in seconds))
        return out

    def scenario(self, name: str | None = None) -> Scenario:
        """The scenario of that name; the first by default."""
        if name is None:
            return self.scenarios[0]
        return _entry({s.name: s for s in self.scenarios}, name, "costs", "scenario")

    def _layers(self, blocks: Architecture) -> list[tuple[int, BlockConfig]]:
        if len(blocks) != len(self.layers):
            raise ConfigError(f"{len(blocks)} blocks were given, but the costs are of {len(self.layers)} layers")
        return list(enumerate(blocks))

    def _batch(self, blocks: Architecture, scenario: Scenario, batch: int | None) -> int:
        return self.best_batch(blocks, scenario.name) if batch is None else batch

    def _sum(self, blocks: Architecture, scenario: Scenario, batch: int | None, field: str) -> float:
        key = seconds_key(scenario, self._batch(blocks, scenario, batch))
        total = getattr(_entry(self.fixed, key, "costs", "seconds of"), field)
        for layer, block in self._layers(blocks):
            total += getattr(self.experts_of(layer, block).seconds[key], field)
            total += getattr(self.attention_of(layer, block).seconds[key], field)
        return total

    def to_json(self) -> dict[str, Any]:
        """The content of costs.json."""
        layers = [
            {"experts": layer.experts, "attention": {window_name(w): costs for w, costs in layer.attention.items()}}
            for layer in self.layers
        ]
        return to_plain({**vars(self), "layers": layers})


def seconds_key(scenario: Scenario, batch: int) -> str:
    """The key of a scenario's seconds: its name, or "name.batch" if its batch is open."""
    return scenario.name if scenario.batch is not None else f"{scenario.name}.{batch}"


@dataclass(frozen=True)
class _Layer:
    """A layer of a costs.json: entries by expert count, and by window name."""

    experts: Mapping[int, object]
    attention: Mapping[str, object]


@dataclass(frozen=True)
class _Layers:
    """The part of a costs.json that is read entry by entry, so that a message names the entry."""

    layers: tuple[_Layer, ...]


def read_costs(path: Path) -> Costs:
    """Reads a costs.json, ours or one that was timed elsewhere.

    Raises `PuzzleError`, naming the file and the place in it, if it is not valid.
    """
    value = read_json(path)

    def layer_costs(number: int, layer: _Layer) -> LayerCosts:
        def entry(kind: type[Entry], name: str, costs: object) -> Entry:
            return from_plain(kind, costs, f"{path}: layer {number}, {name}", exact=True)

        return LayerCosts(
            {count: entry(ExpertCosts, f"expert count {count}", costs) for count, costs in layer.experts.items()},
            {
                _window(name, path): entry(AttentionCosts, f"window {name}", costs)
                for name, costs in layer.attention.items()
            },
        )

    layers = from_plain(_Layers, value, str(path)).layers
    known = {field.name: value[field.name] for field in fields(Costs) if field.name in value}
    known["layers"] = [layer_costs(number, layer) for number, layer in enumerate(layers)]
    return from_plain(Costs, known, str(path), exact=True)


def _window(name: str, path: Path) -> int | None:
    if name != "full" and not name.isdecimal():
        raise PuzzleError(f"{path}: a window is {shown(name)}, but must be full or a whole number")
    return None if name == "full" else int(name)


def _entry(table: Mapping[Key, Entry], key: Key, owner: str, what: str) -> Entry:
    if key not in table:
        known = ", ".join("full" if k is None else str(k) for k in table)
        raise ConfigError(f"{owner} has no {what} {'full' if key is None else repr(key)}; known: {known}")
    return table[key]


def _check_counts(values: Mapping[str, int], section: str = "") -> None:
    for name, value in values.items():
        check_range(f"{section}{name}", value, 0, 2**63, below=True)
