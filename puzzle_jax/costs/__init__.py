"""Costs of an architecture in a deployment: bytes, and seconds that are computed, measured, or read from a file."""
