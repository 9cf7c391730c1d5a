"""The command line: `puzzle <verb>`, with the same verbs as `python -m puzzle_jax.<verb>`.

Whatever a user can mend ends as one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from puzzle_jax.errors import PuzzleError

VERBS = {
    "search": "from a trained parent to the child that serves a deployment best",
    "generate": "streams a model's answer to the terminal",
    "evaluate": "models side by side: accuracy, tokens and speed per effort, and the frontier of both",
    "convert_hf": "checkpoints: inspect, verify, import to Orbax, export to Hugging Face",
    "train": "distillation of a child on its parent's answers; pretraining of the embedded parent",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `puzzle_jax.<verb>`; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: puzzle VERB [OPTIONS]\n")
        for verb, what in VERBS.items():
            print(f"  {verb:<11} {what}")
        return 0 if arguments else 2
    if arguments[0] not in VERBS:
        print(f"puzzle: verb is {arguments[0]!r}, but must be one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"puzzle_jax.{arguments[0]}.__main__")
    return module.main(arguments[1:])


def guarded(program: str, run: Callable[[], None], interrupted: str = "finished stages are kept") -> int:
    """Runs a command; user errors become one sentence and exit code 2, an interrupt 130 and what `interrupted` says."""
    try:
        run()
    except PuzzleError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; {interrupted}", file=sys.stderr)
        return 130
    return 0


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/puzzle_jax."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "puzzle_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
