"""Hugging Face checkpoints of gpt-oss models, in and out: `load`, `export`, `describe`, `config_json` and `table`."""
