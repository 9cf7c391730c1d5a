"""What a child is made for: deployments, and what it must reach in them relative to its parent.

Left out: batches swept by the program, tensor and expert parallelism, and absolute targets (seconds,
gigabytes).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from puzzle_jax.errors import ConfigError


@dataclass(frozen=True)
class Scenario:
    """One way in which the model is used.

    Attributes:
      name: letters, digits, "-" and "_".
      input_tokens: prompt length of every request.
      output_tokens: generated tokens of every request.
      batch: requests that run together.
      kv_bytes_per_value: of the cache: 4 (float32), 2 (bfloat16) or 1 (FP8).
      hardware: a name of `roofline.HARDWARE`, or "local" for the devices present.
      devices: number of devices that share the work.
    """

    name: str
    input_tokens: int
    output_tokens: int
    batch: int
    kv_bytes_per_value: int = 2
    hardware: str = "local"
    devices: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ConfigError(f"scenario name is {self.name!r}, but must be of letters, digits, '-' and '_'")
        for field in ("input_tokens", "output_tokens", "batch", "devices"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{field} of scenario {self.name!r} is {value!r}, but must be a whole number of at least 1"
                )
        if self.kv_bytes_per_value not in (1, 2, 4):
            raise ConfigError(
                f"kv_bytes_per_value of scenario {self.name!r} is {self.kv_bytes_per_value!r}, but must be 1, 2 or 4"
            )
        if not isinstance(self.hardware, str) or not self.hardware:
            raise ConfigError(f"hardware of scenario {self.name!r} is {self.hardware!r}, but must be a name")

    @property
    def context_tokens(self) -> int:
        """Positions of a request at its end."""
        return self.input_tokens + self.output_tokens

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """What the child must reach relative to its parent; None is no limit.

    Attributes:
      max_expert_bytes_ratio: bytes of experts and routers over the parent's, in (0, 1].
      min_speedup: tokens per second over the parent's, at least 1, in every scenario.
      max_kv_bytes_ratio: KV-cache bytes of a request at its end over the parent's, in (0, 1], in every
      scenario.
    """

    max_expert_bytes_ratio: int | float | None = None
    min_speedup: int | float | None = None
    max_kv_bytes_ratio: int | float | None = None

    def __post_init__(self) -> None:
        for field in ("max_expert_bytes_ratio", "max_kv_bytes_ratio"):
            value = getattr(self, field)
            if value is not None and not (_is_number(value) and 0 < value <= 1):
                raise ConfigError(f"{field} is {value!r}, but must be above 0 and at most 1 (1 is the parent's)")
        if self.min_speedup is not None and not (_is_number(self.min_speedup) and self.min_speedup >= 1):
            raise ConfigError(f"min_speedup is {self.min_speedup!r}, but must be at least 1 (1 is the parent's)")
        if all(value is None for value in asdict(self).values()):
            raise ConfigError(
                "the target is empty, but needs max_expert_bytes_ratio, min_speedup or max_kv_bytes_ratio: "
                "without a limit the best child is the parent"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
