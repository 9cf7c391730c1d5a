"""The devices that a search, or training, runs on."""

from __future__ import annotations

from dataclasses import dataclass

from puzzle_jax.errors import MOST_TOGETHER, ConfigError, check_range


@dataclass(frozen=True)
class MeshSettings:
    """Devices that share the work.

    Attributes:
      data: shares of a batch's rows.
      sequence: shares of every row's positions; only training has this axis.
      model: shares of heads, experts and vocabulary.
      processes: that work together, as a rule one per host (`puzzle_jax.processes.distributed` says how they are
        started). The mesh spans the devices of all of them, each giving as many.
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
        """Raises ConfigError where the processes do not divide these devices evenly."""
        if self.devices % self.processes:
            raise ConfigError(
                f"mesh has {self.devices} devices (data x sequence x model), but must have a multiple of "
                f"mesh.processes ({self.processes})"
            )

    def check_spanned(self, section: str, rows: int, row_length: int) -> None:
        """Raises ConfigError where the processes, or rows of `section`, do not divide evenly over these devices."""
        self.check_over_processes()
        for name, value, axis in (("rows", rows, "data"), ("row_length", row_length, "sequence")):
            if value % getattr(self, axis):
                raise ConfigError(
                    f"{section}.{name} is {value}, but must be a multiple of mesh.{axis} ({getattr(self, axis)})"
                )

    def check_without(self, what: str, *axes: str) -> None:
        """Raises ConfigError for more than one on an axis, or of the processes, that something does not have."""
        for axis in axes:
            if getattr(self, axis) != 1:
                raise ConfigError(f"mesh.{axis} is {getattr(self, axis)}, but {what} is not shared along it (1)")
