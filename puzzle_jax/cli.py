"""The command line: `puzzle <verb>`, with the same verbs as `python -m puzzle_jax.<verb>`.

Whatever a user can mend ends as one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from puzzle_jax.commands import did_you_mean, say
from puzzle_jax.errors import shown

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
        verb = shown(arguments[0])
        say(f"puzzle: verb is {verb}, but must be one of {', '.join(VERBS)}{did_you_mean(arguments[0], VERBS)}")
        return 2
    module = importlib.import_module(f"puzzle_jax.{arguments[0]}.__main__")
    return module.main(arguments[1:])
