"""Roofline estimate of an architecture's speed in a deployment, and of its speed-up over another.

    tokens per second = max over batches of  batch output_tokens / (prefill + output_tokens decode step)

over powers of two, their midpoints and the largest batch that memory and the engine allow, or at the scenario's own
batch. Only config.json is needed: no weights, no accelerator, no JAX.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from puzzle_jax.config import ModelConfig, cache_bytes
from puzzle_jax.convert_hf.table import Form, bytes_by_part
from puzzle_jax.costs.roofline import PARTS, PartSeconds, Roofline
from puzzle_jax.costs.scenario import Scenario, candidate_batches
from puzzle_jax.errors import ConfigError
from puzzle_jax.files import Json


@dataclass(frozen=True)
class Architecture:
    """A model without weights: its configuration, and how its experts are stored."""

    config: ModelConfig
    form: Form


@dataclass(frozen=True)
class Estimate:
    """An architecture in a scenario at its best batch.

    Attributes:
      throughput: generated tokens per second of all devices.
      largest_batch: largest batch that fits; the scenario's own if it gives one.
      prefill_seconds: seconds to prefill all prompts of the batch.
      decode_seconds: seconds of one decoding step, the mean over output positions.
      memory_bytes, room_bytes: bytes of weights and caches on all devices, and the room for them.
      breakdown: seconds by part, under "prefill" and "decode".
    """

    throughput: float
    batch: int
    largest_batch: int
    prefill_seconds: float
    decode_seconds: float
    memory_bytes: int
    room_bytes: int
    breakdown: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Comparison:
    """A model beside a baseline."""

    scenario: Scenario
    model: Estimate
    baseline: Estimate

    @property
    def speedup(self) -> float:
        return self.model.throughput / self.baseline.throughput

    def as_json(self) -> dict[str, Json]:
        """Keys of the model are plain, those of the baseline begin with "baseline_"."""
        return {
            "scenario": asdict(self.scenario),
            "speedup": self.speedup,
            **asdict(self.model),
            **{f"baseline_{name}": value for name, value in asdict(self.baseline).items()},
        }


def compare(
    model: Architecture, baseline: Architecture, scenario: Scenario, roofline: Roofline | None = None
) -> Comparison:
    """Estimates both architectures in one scenario, each at its own best batch. Raises as `estimate` does."""
    roofline = roofline or Roofline()
    return Comparison(scenario, estimate(model, scenario, roofline), estimate(baseline, scenario, roofline))


def estimate(architecture: Architecture, scenario: Scenario, roofline: Roofline | None = None) -> Estimate:
    """Returns the estimate of an architecture in a scenario.

    Raises `ConfigError` if not even one request or the given batch fits, or if the scenario does not fit the model.
    """
    sizes, roofline = _sizes(architecture, scenario), roofline or Roofline()
    room = roofline.room_bytes(scenario)
    at_most = scenario.batch or roofline.max_batch(scenario)
    largest = scenario.largest_batch(**sizes, room=room, at_most=at_most)
    if largest < (scenario.batch or 1):
        needed = scenario.memory_bytes(**sizes, batch=scenario.batch or 1)
        raise ConfigError(
            f"scenario {scenario.name!r} with {scenario.batch or 1} request(s) needs {needed / 1e9:.1f} GB on "
            f"{scenario.devices} x {roofline.device(scenario)}, but there is room for {max(room, 0) / 1e9:.1f} GB"
        )
    batches = (scenario.batch,) if scenario.batch else candidate_batches([largest])
    seconds = {batch: model_seconds(architecture, scenario.at(batch), roofline) for batch in batches}

    def rate(batch: int) -> float:
        total = seconds[batch].total()
        return batch * scenario.output_tokens / (total.prefill_seconds + scenario.output_tokens * total.decode_seconds)

    best = max(batches, key=rate)
    total = seconds[best].total()
    return Estimate(
        throughput=rate(best),
        batch=best,
        largest_batch=largest,
        prefill_seconds=total.prefill_seconds,
        decode_seconds=total.decode_seconds,
        memory_bytes=scenario.memory_bytes(**sizes, batch=best),
        room_bytes=room,
        breakdown={"prefill": dict(seconds[best].prefill), "decode": dict(seconds[best].decode)},
    )


def model_seconds(architecture: Architecture, scenario: Scenario, roofline: Roofline) -> PartSeconds:
    """Seconds of all layers and the rest, by part, at the scenario's batch."""
    config = architecture.config
    steps = roofline.steps(config, scenario, architecture.form)
    found = [(steps.rest(), 1)]
    found += [(steps.experts(n), times) for n, times in Counter(block.num_experts for block in config.blocks).items()]
    found += [(steps.attention(w), times) for w, times in Counter(block.window for block in config.blocks).items()]

    def total(of: str) -> dict[str, float]:
        return {part: sum(times * getattr(seconds, of).get(part, 0.0) for seconds, times in found) for part in PARTS}

    return PartSeconds(total("prefill"), total("decode"))


def _sizes(architecture: Architecture, scenario: Scenario) -> dict[str, int]:
    """Byte counts under the argument names of `Scenario.memory_bytes`."""
    config, sizes = architecture.config, bytes_by_part(architecture.config, architecture.form)
    experts = sum(layer.experts + layer.router for layer in sizes.layers)
    kv = cache_bytes(config, scenario.context_tokens, scenario.kv_bytes_per_value)
    return {"dense": sizes.total - experts, "experts": experts, "kv": kv}
