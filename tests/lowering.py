"""Lowers programs in one MLIR context per thread.

JAX makes a context for every program and loads all of its dialects into it, which takes a quarter of the time of
compiling a program of one operation. A context only holds types and attributes, which are shared between programs
where they are equal, so the programs stay the same.
"""

import threading

from jax._src.interpreters import mlir

_made = threading.local()


def reuse_contexts() -> None:
    """Takes effect from now on, and does nothing where JAX no longer has the function."""
    make = getattr(mlir, "make_ir_context", None)
    if make is None:
        return

    def context():
        if not hasattr(_made, "context"):
            _made.context = make()
        return _made.context

    mlir.make_ir_context = context
