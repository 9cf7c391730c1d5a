"""Generation by continuous batching over per-layer caches, its traces, and the calibration of FP8 caches."""

from puzzle_jax.generate.engine import Engine, Event, Generated, GenerateOptions, Request, generate
from puzzle_jax.generate.sampling import Sampling

__all__ = ["Engine", "Event", "GenerateOptions", "Generated", "Request", "Sampling", "generate"]
