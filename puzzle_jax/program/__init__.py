"""The integer program: one alternative per group of any library, under limits. It needs neither a model nor JAX."""
