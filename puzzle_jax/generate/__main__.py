"""`puzzle generate`, which is `python -m puzzle_jax.generate`: an answer on the terminal."""

from __future__ import annotations

import sys
from functools import partial

from puzzle_jax.settings.verbs import Verb, run_table

VERBS = {
    "": Verb(
        name="generate",
        summary="Streams a model's answer to the terminal, the analysis dimmed.",
        settings="puzzle_jax.generate.command:GenerateSettings",
        run="puzzle_jax.generate.command:run",
        shown=("model", "effort", "max_tokens", "temperature", "top_p", "seed", "cache_dtype"),
        example='--model DIR --effort high "How many r are in strawberry?"',
        positional=("prompt",),
    ),
}  # fmt: skip


main = partial(run_table, "generate", VERBS)

if __name__ == "__main__":
    sys.exit(main())
