"""Accuracy and tokens per effort, throughput per scenario."""
