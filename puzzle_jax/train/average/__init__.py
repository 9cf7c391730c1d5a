"""The average of two policies' weights."""
