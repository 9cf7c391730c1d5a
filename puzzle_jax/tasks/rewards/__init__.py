"""Rewards of answers, given in processes of their own."""
