"""Reading and writing config.json, by family."""
