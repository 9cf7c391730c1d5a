"""Import and export of Hugging Face gpt-oss checkpoints: `load`, `export`, `describe`, `config_json` and `table`."""
