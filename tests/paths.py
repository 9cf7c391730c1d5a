"""Where the checkout is; imports nothing else, for programs without JAX."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""
