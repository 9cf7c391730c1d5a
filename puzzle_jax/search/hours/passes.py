"""Roofline seconds of a whole model: passes over tokens, output heads, and answers.

`costs.roofline` has the seconds of a layer's sub-blocks in a scenario; here a scenario is made for each piece of work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.table import Form
from puzzle_jax.costs.assumptions import Assumptions, default_assumptions
from puzzle_jax.costs.hardware import Hardware
from puzzle_jax.costs.roofline import Roofline, Steps
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.numeric import Number


@dataclass(frozen=True)
class ModelTime:
    """A model on devices that work together.

    Attributes:
      config: the model's configuration.
      form: form in which experts are held in memory.
      hardware: hardware of every device.
      data, model: sizes of the mesh axes that shard rows, and that shard a layer's matrices.
      assumptions: the roofline's assumptions.
    """

    config: ModelConfig
    form: Form
    hardware: Hardware
    data: int = 1
    model: int = 1
    assumptions: Assumptions = field(default_factory=default_assumptions)

    @property
    def devices(self) -> int:
        return self.data * self.model

    def forward(self, length: Number, rows: Number, more_experts: Number = 1.0) -> Number:
        """Seconds to run all layers on `rows` rows of `length` tokens, with `more_experts` times the chosen experts."""
        return self._layers(self._steps(length, 1, rows), more_experts)[0]

    def heads(self, tokens: Number) -> Number:
        """Seconds of the output head at that many positions."""
        return self.products(tokens, self.config.hidden_size * self.config.vocab_size)

    def products(self, tokens: Number, weights: int) -> Number:
        """Seconds to multiply tokens with dense matrices of that many weights in total."""
        reached = self.assumptions.efficiency.dense
        return 2 * tokens * weights / (self.hardware.flops_per_second * reached.rate) / self.devices

    def answering(self, prompt: Number, outputs: Number, count: Number, slots: int) -> Number:
        """Seconds to generate `count` answers of `outputs` tokens, in slots that are always full."""
        steps = self._steps(prompt, outputs, min(slots, count))
        prefill, decode = self._layers(steps)
        rest = steps.rest().total()
        rounds = max(1.0, count / slots)
        return rounds * (prefill + rest.prefill_seconds + outputs * (decode + rest.decode_seconds))

    def _steps(self, inputs: Number, outputs: Number, batch: Number) -> Steps:
        """The steps of a scenario whose prompts and answers are cut to the model's context."""
        most = self.config.max_position
        tensor = math.gcd(self.model, self.config.num_kv_heads)
        outputs = min(max(1, round(outputs)), most - 1)
        scenario = Scenario(
            "work",
            min(max(1, round(inputs)), most - outputs),
            outputs,
            batch=max(1, round(batch)),
            devices=self.devices - self.devices % tensor,
            tensor_parallel=tensor,
        )
        return Roofline(self.hardware, self.assumptions).steps(self.config, scenario, self.form)

    def _layers(self, steps: Steps, more_experts: Number = 1.0) -> tuple[Number, Number]:
        """Seconds of all layers: for all prefills, and for one decoding step."""
        prefill = decode = 0.0
        for block in self.config.blocks:
            attention, experts = steps.attention(block.window).total(), steps.experts(block.num_experts).total()
            prefill += attention.prefill_seconds + more_experts * experts.prefill_seconds
            decode += attention.decode_seconds + experts.decode_seconds
        return prefill, decode
