"""A search at the smallest size: its parent and the settings of its command line."""

from pathlib import Path

from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.search.__main__ import main
from puzzle_jax.search.pipeline import STAGE_NAMES
from puzzle_jax.tasks.chat.embedded import chat_files
from tests.support import chat_config, random_params

SETTINGS = [
    *("--traces.tasks", '["chain"]', "--traces.calibration", "3", "--traces.validation", "2"),
    *("--traces.confirmation", "2", "--traces.heldout", "2"),
    *("--traces.max_tokens", "{low: 5, medium: 6, high: 7}", "--traces.batch_size", "9"),
    *("--space.fractions", "[1, 0.75, 0.5]", "--space.windows", "[24]"),
    *("--scenario.name", "chat", "--scenario.input_tokens", "40", "--scenario.output_tokens", "8"),
    *("--scenario.batch", "3", "--scenario.hardware", "h100", "--costs", "roofline"),
    *("--target.max_expert_bytes_ratio", "0.8", "--target.min_speedup", "1.0"),
    *("--solve.solutions", "3", "--evaluate.problems", "2", "--evaluate.rounds", "2"),
    *("--score.tokens_per_batch", "256"),
]
TIMELESS = ("--evaluate.rounds", "0")
"""Leaves out measured speeds, so that running the search again gives the same files."""


def save_parent(out: Path, seed: int = 0) -> None:
    config = chat_config()
    save_checkpoint(out, config, random_params(config, seed), config_base={}, extra_files=chat_files())


def search(parent: Path, run: Path, *arguments: str) -> int:
    """Exit code of a stage if the first argument names one, and of a whole search otherwise."""
    stage = [arguments[0]] if arguments and arguments[0] in STAGE_NAMES else []
    return main([*stage, "--parent", str(parent), "--run", str(run), *SETTINGS, *arguments[len(stage) :]])
