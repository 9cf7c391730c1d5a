"""What an architecture costs, as sums over its sub-blocks: bytes, KV-cache bytes, and seconds in each
scenario.

Costs add over sub-blocks, which is what lets a linear program weigh them (Puzzle, arXiv 2411.19146, section
4). The bytes are exact, from the table of checkpoint tensors. Seconds come from a provider: `roofline`
(arithmetic on hardware constants), `measured` (our own blocks timed on the devices present), or a costs.json
of the same form that was timed elsewhere.

    seconds of a batch = prefill of all its inputs + output_tokens * one decode step of the whole batch
    tokens per second  = batch * output_tokens / seconds

Left out: batches that change while they run, and what no sub-block owns (scheduling, host time).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from puzzle_jax.config import BlockConfig, ModelConfig, cache_slots
from puzzle_jax.convert_hf.table import Form, bytes_by_part
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.model.spec import count_params
from puzzle_jax.search.library import Number
from puzzle_jax.search.scenario import Scenario
from puzzle_jax.search.space import Space

Architecture = tuple[BlockConfig, ...]


@dataclass(frozen=True)
class Seconds:
    """Time of one part of the model for a scenario's whole batch.

    Attributes:
      prefill_seconds: all inputs of the batch.
      decode_seconds: one step, the mean over the output positions.
      prefill_spread, decode_spread: interquartile range over the median where it was measured, else 0.
    """

    prefill_seconds: Number
    decode_seconds: Number
    prefill_spread: Number = 0.0
    decode_spread: Number = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or not isfinite(value) or value < 0:
                raise ConfigError(f"{field.name} is {value!r}, but must be a finite number of at least 0")


@dataclass(frozen=True)
class Times:
    """Seconds of every distinct sub-block in one scenario, and of the rest (embedding, head, sampling)."""

    experts: Mapping[int, Seconds]
    attention: Mapping[int | None, Seconds]
    fixed: Seconds


@runtime_checkable
class Provider(Protocol):
    """Where seconds come from."""

    @property
    def name(self) -> str: ...

    def device(self, scenario: Scenario) -> str:
        """What the seconds are of."""
        ...

    def times(
        self,
        config: ModelConfig,
        scenario: Scenario,
        form: Form,
        counts: Sequence[int],
        windows: Sequence[int | None],
    ) -> Times:
        """Seconds of the mixture with each expert count and of attention with each window.

        `form` is that of the checkpoint whose experts are read.
        """
        ...


@dataclass(frozen=True)
class ExpertCosts:
    """A layer's mixture with one expert count.

    Attributes:
      weight_bytes: experts and router in the checkpoint.
      parameters: experts and router.
      seconds: by scenario name.
    """

    weight_bytes: int
    parameters: int
    seconds: Mapping[str, Seconds]


@dataclass(frozen=True)
class AttentionCosts:
    """A layer's attention with one window.

    Attributes:
      kv_bytes: of one request at its end, by scenario name.
      seconds: by scenario name.
    """

    kv_bytes: Mapping[str, int]
    seconds: Mapping[str, Seconds]


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
      device: what the seconds are of.
      scenarios: the deployments.
      layers: one entry per layer.
      fixed: seconds of what all architectures share, by scenario name.
      shared_bytes, shared_parameters: of what all architectures share (attention, norms, embedding, head).
    """

    provider: str
    device: str
    scenarios: tuple[Scenario, ...]
    layers: tuple[LayerCosts, ...]
    fixed: Mapping[str, Seconds]
    shared_bytes: int
    shared_parameters: int

    def experts_of(self, layer: int, block: BlockConfig) -> ExpertCosts:
        return _entry(self.layers[layer].experts, block.num_experts, f"layer {layer}", "expert count")

    def attention_of(self, layer: int, block: BlockConfig) -> AttentionCosts:
        return _entry(self.layers[layer].attention, block.window, f"layer {layer}", "window")

    def expert_bytes(self, blocks: Architecture) -> int:
        """Bytes of all experts and routers in the checkpoint, exact."""
        return sum(self.experts_of(layer, block).weight_bytes for layer, block in self._layers(blocks))

    def weight_bytes(self, blocks: Architecture) -> int:
        """Bytes of all tensors of the checkpoint, exact."""
        return self.shared_bytes + self.expert_bytes(blocks)

    def parameters(self, blocks: Architecture) -> int:
        """Number of parameters, exact."""
        experts = sum(self.experts_of(layer, block).parameters for layer, block in self._layers(blocks))
        return self.shared_parameters + experts

    def kv_bytes(self, blocks: Architecture, scenario: str | None = None) -> int:
        """KV-cache bytes of one request at its end."""
        name = self.scenario(scenario).name
        return sum(self.attention_of(layer, block).kv_bytes[name] for layer, block in self._layers(blocks))

    def prefill_seconds(self, blocks: Architecture, scenario: str | None = None) -> float:
        """Seconds until a whole batch has its first token."""
        return self._sum(blocks, self.scenario(scenario).name, "prefill_seconds")

    def decode_seconds(self, blocks: Architecture, scenario: str | None = None) -> float:
        """Seconds of one step that gives every request of the batch one token."""
        return self._sum(blocks, self.scenario(scenario).name, "decode_seconds")

    def request_seconds(self, blocks: Architecture, scenario: str | None = None) -> float:
        """Seconds from prompts to last tokens of one batch."""
        chosen = self.scenario(scenario)
        decode_seconds = self._sum(blocks, chosen.name, "decode_seconds")
        return self._sum(blocks, chosen.name, "prefill_seconds") + chosen.output_tokens * decode_seconds

    def tokens_per_second(self, blocks: Architecture, scenario: str | None = None) -> float:
        """Generated tokens per second of a batch."""
        chosen = self.scenario(scenario)
        return chosen.batch * chosen.output_tokens / self.request_seconds(blocks, chosen.name)

    def seconds_by_part(self, blocks: Architecture, scenario: str | None = None) -> dict[str, float]:
        """`request_seconds` as a sum over attention, experts and the rest, in prefill and in decoding."""
        chosen = self.scenario(scenario)
        parts = {
            "attention": [self.attention_of(i, block).seconds[chosen.name] for i, block in self._layers(blocks)],
            "experts": [self.experts_of(i, block).seconds[chosen.name] for i, block in self._layers(blocks)],
            "embedding and head": [self.fixed[chosen.name]],
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

    def _sum(self, blocks: Architecture, scenario: str, field: str) -> float:
        total = getattr(self.fixed[scenario], field)
        for layer, block in self._layers(blocks):
            total += getattr(self.experts_of(layer, block).seconds[scenario], field)
            total += getattr(self.attention_of(layer, block).seconds[scenario], field)
        return total

    def to_json(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "device": self.device,
            "scenarios": [scenario.to_json() for scenario in self.scenarios],
            "shared_bytes": self.shared_bytes,
            "shared_parameters": self.shared_parameters,
            "fixed": _seconds_to_json(self.fixed),
            "layers": [
                {
                    "experts": {
                        str(count): {
                            "weight_bytes": costs.weight_bytes,
                            "parameters": costs.parameters,
                            "seconds": _seconds_to_json(costs.seconds),
                        }
                        for count, costs in layer.experts.items()
                    },
                    "attention": {
                        "full" if window is None else str(window): {
                            "kv_bytes": dict(costs.kv_bytes),
                            "seconds": _seconds_to_json(costs.seconds),
                        }
                        for window, costs in layer.attention.items()
                    },
                }
                for layer in self.layers
            ],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Costs:
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError where the form is another."""
        return Costs(
            provider=value["provider"],
            device=value["device"],
            scenarios=tuple(Scenario(**scenario) for scenario in value["scenarios"]),
            layers=tuple(
                LayerCosts(
                    experts={
                        int(count): ExpertCosts(
                            costs["weight_bytes"], costs["parameters"], _seconds_from_json(costs["seconds"])
                        )
                        for count, costs in layer["experts"].items()
                    },
                    attention={
                        None if window == "full" else int(window): AttentionCosts(
                            dict(costs["kv_bytes"]), _seconds_from_json(costs["seconds"])
                        )
                        for window, costs in layer["attention"].items()
                    },
                )
                for layer in value["layers"]
            ),
            fixed=_seconds_from_json(value["fixed"]),
            shared_bytes=value["shared_bytes"],
            shared_parameters=value["shared_parameters"],
        )


def compute_costs(
    space: Space,
    scenarios: Sequence[Scenario],
    form: Form,
    provider: Provider,
    progress: Callable[[str], None] | None = None,
) -> Costs:
    """Costs of every alternative of a space.

    Args:
      space: the alternatives.
      scenarios: deployments with distinct names.
      form: of the checkpoint, which decides the bytes of the experts.
      provider: gives the seconds.
      progress: called with a scenario's name before its seconds are asked for.
    """
    names = [scenario.name for scenario in scenarios]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"scenarios need distinct names and at least one, but are {names}")
    config = space.parent
    # The parent's own count has costs even where it is no alternative: targets are relative to it.
    counts_of = [{b.num_experts, *space.expert_counts(layer)} for layer, b in enumerate(config.blocks)]
    counts = sorted(set.union(*counts_of))
    windows = sorted({w for layer in space.windows for w in layer}, key=lambda w: (w is None, w))
    times: dict[str, Times] = {}
    for scenario in scenarios:
        if progress:
            progress(scenario.name)
        times[scenario.name] = provider.times(config, scenario, form, counts, windows)
    sizes = {count: _mixture_size(config, count, form) for count in counts}
    smallest = config.with_blocks(tuple(BlockConfig(counts[0]) for _ in config.blocks))
    return Costs(
        provider=provider.name,
        device=", ".join(dict.fromkeys(provider.device(scenario) for scenario in scenarios)),
        scenarios=tuple(scenarios),
        layers=tuple(
            LayerCosts(
                experts={
                    count: ExpertCosts(*sizes[count], {name: times[name].experts[count] for name in names})
                    for count in sorted(counts_of[layer], reverse=True)
                },
                attention={
                    window: AttentionCosts(
                        {s.name: kv_bytes(config, window, s) for s in scenarios},
                        {name: times[name].attention[window] for name in names},
                    )
                    for window in space.windows[layer]
                },
            )
            for layer in range(space.num_layers)
        ),
        fixed={name: times[name].fixed for name in names},
        shared_bytes=bytes_by_part(smallest, form).total - config.num_layers * sizes[counts[0]][0],
        shared_parameters=count_params(smallest) - config.num_layers * sizes[counts[0]][1],
    )


def kv_bytes(config: ModelConfig, window: int | None, scenario: Scenario) -> int:
    """KV-cache bytes of one layer for one request at its end."""
    slots = cache_slots(window, scenario.context_tokens)
    return slots * 2 * config.kv_width * scenario.kv_bytes_per_value


def read_costs(path: Path) -> Costs:
    """Reads a costs.json, ours or one that was timed elsewhere; raises `PuzzleError` where it is none."""
    try:
        return Costs.from_json(json.loads(Path(path).read_text()))
    except PuzzleError as error:
        raise PuzzleError(f"{path}: {error}") from error
    except KeyError as error:
        raise PuzzleError(f"{path} has no field {error.args[0]!r} where costs need it") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PuzzleError(f"{path} cannot be read as costs: {error}") from error


def _mixture_size(config: ModelConfig, count: int, form: Form) -> tuple[int, int]:
    """Bytes and parameters of one layer's experts and router."""
    one, two = (config.with_blocks((BlockConfig(c), *config.blocks[1:])) for c in (count, 2 * count))
    layer = bytes_by_part(one, form).layers[0]
    return layer.experts + layer.router, count_params(two) - count_params(one)


def _seconds_to_json(seconds: Mapping[str, Seconds]) -> dict[str, dict[str, float]]:
    return {
        name: {field.name: getattr(value, field.name) for field in fields(Seconds)} for name, value in seconds.items()
    }


def _seconds_from_json(value: Mapping[str, Any]) -> dict[str, Seconds]:
    return {name: Seconds(**seconds) for name, seconds in value.items()}


def _entry(table: Mapping[Any, Any], key: Any, owner: str, what: str) -> Any:
    if key not in table:
        known = ", ".join("full" if k is None else str(k) for k in table)
        raise ConfigError(f"{owner} has no {what} {'full' if key is None else key!r}; known: {known}")
    return table[key]
