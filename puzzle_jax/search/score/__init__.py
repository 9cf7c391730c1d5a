"""Scores of alternatives: the loss that each one costs."""
