"""Pretraining of a small parent."""
