"""Rewards of answers, computed in separate processes."""
