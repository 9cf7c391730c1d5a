"""Keeps transformers offline and its remote code out of the user's cache."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="puzzle_jax_remote_code_")
