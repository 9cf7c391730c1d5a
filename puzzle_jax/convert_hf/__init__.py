"""Import and export of Hugging Face checkpoints: `load`, `export`, `describe`, `config_json` and `table`."""
