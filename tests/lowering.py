"""Programs are lowered in one MLIR context for each thread.

JAX makes a context for every program and loads all of its dialects into it, which takes a quarter of the time in which
a program of one operation is compiled. A context only holds types and attributes, which equal ones of other programs
share, so that programs are the same.
"""

import threading

from jax._src.interpreters import mlir

_made = threading.local()


def reuse_contexts() -> None:
    """From now on; where JAX has no such function any more, nothing is different."""
    make = getattr(mlir, "make_ir_context", None)
    if make is None:
        return

    def context():
        if not hasattr(_made, "context"):
            _made.context = make()
        return _made.context

    mlir.make_ir_context = context
