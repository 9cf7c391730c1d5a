"""Traces as training data."""
