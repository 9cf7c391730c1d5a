"""Reading and writing config.json of gpt-oss checkpoints."""
