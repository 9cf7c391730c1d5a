"""Command line of checkpoints: `python -m puzzle_jax.convert_hf inspect | verify | import | export`.

`inspect` needs no weights; a damaged checkpoint is refused before JAX is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from puzzle_jax.commands import Parser, guarded
from puzzle_jax.consoles import plain_console
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.other_forms import ORBAX_HF
from puzzle_jax.errors import MOST_SEED, MOST_TOGETHER, PuzzleError, check_range
from puzzle_jax.progress import progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code: 2 for what the user can mend, 1 where `verify` finds a difference."""
    parser = Parser(prog="puzzle_jax.convert_hf", description="Checkpoints of gpt-oss models.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("inspect", help="what is this model, from its config.json")
    verb.add_argument("path", type=Path, help="a checkpoint directory or a config.json")
    verb.add_argument("--json", action="store_true", help="for programs")
    verb = verbs.add_parser("verify", help="whether two checkpoints are the same function")
    verb.add_argument("first", type=Path)
    verb.add_argument("second", type=Path)
    verb.add_argument("--rows", type=int, default=2, help="sequences of random tokens")
    verb.add_argument("--length", type=int, default=256, help="tokens in each")
    verb.add_argument("--seed", type=int, default=0, help="of the tokens")
    verb.add_argument("--json", action="store_true", help="for programs")
    verb = verbs.add_parser("import", help="to an Orbax checkpoint")
    verb.add_argument("path", type=Path, help="a checkpoint directory")
    verb.add_argument("--out", type=Path, required=True, help="directory to make")
    verb.add_argument("--experts", choices=("stored", "dense"), default="stored", help="dense: decoded to bfloat16")
    verb = verbs.add_parser("export", help="to a Hugging Face directory")
    verb.add_argument("--checkpoint", type=Path, required=True, help="an Orbax checkpoint, or a directory to repack")
    verb.add_argument("--out", type=Path, required=True, help="directory to make; a killed export goes on")
    verb.add_argument("--form", choices=("mxfp4", "bf16"), help="of the experts; by default as the checkpoint says")
    verb.add_argument(
        "--pad-experts", action="store_true", help="equal layers, filled with zeros, for any loader of gpt_oss"
    )
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    found = 0

    def run() -> None:
        nonlocal found
        settings = parser.parse_args(arguments)
        found = _VERBS[settings.verb](settings) or 0

    return guarded(" ".join([parser.prog, *arguments[:1]]), run, "call it again to go on") or found


def _inspect(settings: argparse.Namespace) -> None:
    from puzzle_jax.convert_hf.inspect import inspect, show

    found = inspect(settings.path)
    if settings.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        show(found, plain_console())


def _verify(settings: argparse.Namespace) -> int:
    layers = describe_checkpoint(settings.first).config.num_layers
    describe_checkpoint(settings.second)
    for name in ("rows", "length"):
        check_range(name, getattr(settings, name), 1, MOST_TOGETHER)
    check_range("seed", settings.seed, 0, MOST_SEED)
    from puzzle_jax.convert_hf.verify import show, verify

    with progress(plain_console(stderr=True), "comparing layers", layers + 1) as advance:
        found = verify(
            settings.first,
            settings.second,
            rows=settings.rows,
            length=settings.length,
            seed=settings.seed,
            on_layer=lambda: advance(1),
        )
    if settings.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        show(found, (str(settings.first), str(settings.second)), plain_console())
    return 0 if found.same_function else 1


def _import(settings: argparse.Namespace) -> None:
    described = describe_checkpoint(settings.path)
    from puzzle_jax.convert_hf.export import CARRIED, OF_A_CHILD, carried_files
    from puzzle_jax.convert_hf.load import load_checkpoint
    from puzzle_jax.convert_hf.orbax_tree import refuse_existing, save_params

    refuse_existing(settings.out)

    with progress(plain_console(stderr=True), "reading tensors", len(described.tensors)) as advance:
        checkpoint = load_checkpoint(settings.path, experts=settings.experts, on_tensor=lambda *_: advance(1))
    save_params(
        settings.out,
        checkpoint.config,
        checkpoint.params,
        config_json=checkpoint.config_json,
        files=carried_files(settings.path, (*CARRIED, *OF_A_CHILD)),
        kv_scales=checkpoint.kv_scales,
    )


def _export(settings: argparse.Namespace) -> None:
    if os.path.isdir(settings.checkpoint / ORBAX_HF):
        from puzzle_jax.convert_hf.export import refuse_overwriting, save_checkpoint
        from puzzle_jax.convert_hf.orbax_tree import open_params

        refuse_overwriting(settings.out)
        opened = open_params(settings.checkpoint)
        if opened.left_out:
            names = ", ".join(map(repr, opened.left_out))
            print(f"left out of {settings.out}, being no file of a checkpoint: {names}", file=sys.stderr)
        if settings.pad_experts:
            raise PuzzleError("pad-experts works on Hugging Face directories: export without it, then again with it")
        save_checkpoint(
            settings.out,
            opened.config,
            opened.params,
            config_base=opened.config_json,
            extra_files=opened.files,
            form=settings.form or opened.form,
            kv_scales=opened.kv_scales,
        )
        return
    described = describe_checkpoint(settings.checkpoint)
    if settings.form not in (None, described.form):
        raise PuzzleError(f"form is {settings.form}, but {settings.checkpoint} is repacked as it is, {described.form}")
    from puzzle_jax.convert_hf.export import export_child

    everything = [tuple(range(block.num_experts)) for block in described.config.blocks]
    export_child(
        settings.checkpoint,
        settings.out,
        described.config,
        everything,
        provenance={"parent": str(settings.checkpoint)},
        pad_experts=settings.pad_experts,
    )


_VERBS = {"inspect": _inspect, "verify": _verify, "import": _import, "export": _export}


if __name__ == "__main__":
    sys.exit(main())
