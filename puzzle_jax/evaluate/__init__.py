"""Evaluation of models: accuracy and tokens per effort, throughput per scenario."""
