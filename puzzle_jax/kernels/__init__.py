"""Operations that the model is made of, each with a plain reference beside its fast implementations.

Every operation is a folder: `__init__.py` is its api and picks an implementation, `reference.py` is the obviously
correct one. Only jax and numpy are needed here; kernels know no models and no files.
"""
