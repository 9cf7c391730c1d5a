"""Traces as data that training reads."""
