"""Reading, writing, hashing and packing tensors in files; nothing here imports JAX."""
