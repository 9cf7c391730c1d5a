"""The command line: `puzzle <verb>`, with the same verbs as `python -m puzzle_jax.<verb>`.

Each verb's `__main__` holds the table of its subcommands; `settings.verbs` runs all of them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

from puzzle_jax.commands import did_you_mean, say
from puzzle_jax.errors import shown

VERBS = {
    "run": "the full pipeline in one command: from a parent to a trained, evaluated and exported child",
    "status": "how far a run has come",
    "search": "from a trained parent to the child that serves a deployment best; estimate: by arithmetic alone",
    "train": "traces, distill, distill-blocks, grpo, average, pretrain",
    "plan": "what search, distill and grpo need on every device, before there are devices",
    "evaluate": "models side by side: accuracy, tokens and speed per effort; caches: what an FP8 cache costs",
    "generate": "a model's answer on the terminal",
    "doctor": "versions, devices, and which kernel or XLA program serves each operation here",
    "convert_hf": "checkpoints: inspect, verify, import to Orbax, export to Hugging Face",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `puzzle_jax.<verb>`; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: puzzle VERB [OPTIONS]\n")
        for verb, what in VERBS.items():
            print(f"  {verb:<11} {what}")
        print("\npuzzle VERB --help shows a verb's options, puzzle --version the version.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"puzzle_jax {metadata.version('puzzle-jax')}")
        return 0
    if arguments[0] not in VERBS:
        verb = shown(arguments[0])
        say(f"puzzle: verb is {verb}, but must be one of {', '.join(VERBS)}{did_you_mean(arguments[0], VERBS)}")
        return 2
    module = importlib.import_module(f"puzzle_jax.{arguments[0]}.__main__")
    return module.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
