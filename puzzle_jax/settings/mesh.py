"""The devices that a search, or training, runs on."""

from __future__ import annotations

from dataclasses import dataclass

from puzzle_jax.errors import MOST_TOGETHER, ConfigError, check_range


@dataclass(frozen=True)
class MeshSettings:
    """Devices that share the work.

    Attributes:
      data: number of parts that the rows of a batch are split into.
      sequence: number of parts that the positions of every row are split into; only training has this axis.
      model: number of parts that heads, experts and vocabulary are split into.
      processes: number of processes that work together, usually one per host (`puzzle_jax.processes.distributed` says
        how they are started). The mesh spans the devices of all of them, the same number of each.
    """

    data: int = 1
    sequence: int = 1
    model: int = 1
    processes: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "sequence", "model", "processes"):
            check_range(f"mesh.{name}", getattr(self, name), 1, MOST_TOGETHER)

    @property
    def devices(self) -> int:
        return self.data * self.sequence * self.model

    def check_over_processes(self) -> None:
        """Raises ConfigError unless the devices divide evenly over the processes."""
        if self.devices % self.processes:
            raise ConfigError(
                f"mesh has {self.devices} devices (data x sequence x model), but must have a multiple of "
                f"mesh.processes ({self.processes})"
            )

    def check_spanned(self, section: str, rows: int, row_length: int) -> None:
        """Raises ConfigError unless devices divide evenly over processes, and rows of `section` over devices."""
        self.check_over_processes()
        for name, value, axis in (("rows", rows, "data"), ("row_length", row_length, "sequence")):
            if value % getattr(self, axis):
                raise ConfigError(
                    f"{section}.{name} is {value}, but must be a multiple of mesh.{axis} ({getattr(self, axis)})"
                )

    def check_without(self, what: str, *axes: str) -> None:
        """Raises ConfigError if one of `axes` (or "processes"), which `what` does not support, is not 1."""
        for axis in axes:
            if getattr(self, axis) != 1:
                raise ConfigError(f"mesh.{axis} is {getattr(self, axis)}, but {what} is not shared along it (1)")
