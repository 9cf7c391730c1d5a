"""`puzzle convert_hf`, or `python -m puzzle_jax.convert_hf`: commands for checkpoints.

`inspect` needs no weights; a damaged checkpoint is refused before JAX is imported.
"""

from __future__ import annotations

import sys
from functools import partial

from puzzle_jax.settings.verbs import Verb, run_table

VERBS = {
    "inspect": Verb(
        name="convert_hf inspect",
        summary="What a model is, from its config.json: layers, experts, windows, parameters, bytes.",
        settings="puzzle_jax.convert_hf.command:InspectSettings",
        run="puzzle_jax.convert_hf.command:run_inspect",
        shown=("json",),
        example="path/to/config.json",
        positional=("path",),
        computes=False,
    ),
    "verify": Verb(
        name="convert_hf verify",
        summary="Whether two checkpoints are the same function: tensors, then logits by layer.",
        settings="puzzle_jax.convert_hf.command:VerifySettings",
        run="puzzle_jax.convert_hf.command:run_verify",
        shown=("rows", "length", "seed", "json"),
        example="DIR_A DIR_B",
        positional=("first", "second"),
        computes=False,
    ),
    "import": Verb(
        name="convert_hf import",
        summary="From a Hugging Face directory to an Orbax checkpoint.",
        settings="puzzle_jax.convert_hf.command:ImportSettings",
        run="puzzle_jax.convert_hf.command:run_import",
        shown=("out", "experts"),
        example="DIR --out CHECKPOINT",
        positional=("path",),
        computes=False,
        interrupted="call it again",
    ),
    "export": Verb(
        name="convert_hf export",
        summary="From an Orbax checkpoint, or a directory to repack, to a Hugging Face directory.",
        settings="puzzle_jax.convert_hf.command:ExportSettings",
        run="puzzle_jax.convert_hf.command:run_export",
        shown=("checkpoint", "out", "form", "pad_experts"),
        example="--checkpoint CHECKPOINT --out DIR",
        computes=False,
        interrupted="call it again",
    ),
}  # fmt: skip


main = partial(run_table, "convert_hf", VERBS)

if __name__ == "__main__":
    sys.exit(main())
