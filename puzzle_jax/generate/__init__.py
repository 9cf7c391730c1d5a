"""Batched generation over per-layer caches."""

from puzzle_jax.generate.engine import Generated, Request, generate

__all__ = ["Generated", "Request", "generate"]
