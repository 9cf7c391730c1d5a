"""The integer program: one alternative per group of any library, under limits. It knows no model and no JAX."""
