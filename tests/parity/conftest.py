"""transformers stays offline and keeps remote code away from the user's cache."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="puzzle_jax_remote_code_")
