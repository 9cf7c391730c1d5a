"""Costs of an architecture in a deployment: bytes, and seconds by arithmetic, by measurement, or from elsewhere."""
