"""Operations that the model is built from, each with a plain reference next to its fast implementations.

Every operation is a package: `__init__.py` is its api and picks an implementation, `reference.py` is the obviously
correct one. Kernels need only jax and numpy, and know nothing about models or files.
"""
