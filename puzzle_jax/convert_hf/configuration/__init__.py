"""config.json of gpt-oss checkpoints, in and out."""
