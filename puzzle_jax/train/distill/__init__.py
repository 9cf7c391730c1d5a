"""Distillation of a child on its parent's answers."""
