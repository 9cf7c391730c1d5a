"""Hugging Face checkpoints of gpt-oss models, in and out; see `load`, `export`, `config_json` and `table`."""

from puzzle_jax.convert_hf.config_json import is_plain, parse_config, write_config
from puzzle_jax.convert_hf.export import export_child, save_checkpoint
from puzzle_jax.convert_hf.load import Checkpoint, load_checkpoint, read_config
from puzzle_jax.convert_hf.table import bytes_by_part, checkpoint_tensors, expert_bytes, tensor_bytes

__all__ = [
    "Checkpoint",
    "bytes_by_part",
    "checkpoint_tensors",
    "expert_bytes",
    "export_child",
    "is_plain",
    "load_checkpoint",
    "parse_config",
    "read_config",
    "save_checkpoint",
    "tensor_bytes",
    "write_config",
]
