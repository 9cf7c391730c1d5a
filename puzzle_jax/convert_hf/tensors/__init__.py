"""Tensors in files: read, written, hashed, packed; none of it imports JAX."""
