"""Puzzle for mixture-of-experts models in JAX: a trained parent in, a faster child for a deployment out."""

__version__ = "0.4.0"
