"""Refinement of the integer program's child, where a lower KL is confirmed."""
