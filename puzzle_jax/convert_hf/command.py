"""The verbs for checkpoints: `puzzle convert_hf inspect | verify | import | export`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from puzzle_jax.consoles import plain_console
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.other_forms import ORBAX_HF
from puzzle_jax.errors import MOST_SEED, MOST_TOGETHER, PuzzleError, check_range
from puzzle_jax.progress import progress


@dataclass(frozen=True)
class InspectSettings:
    """The model to inspect.

    Attributes:
      path: a checkpoint directory or a config.json.
      json: prints JSON instead of tables.
    """

    path: Path
    json: bool = False


@dataclass(frozen=True)
class VerifySettings:
    """Two checkpoints to compare.

    Attributes:
      first, second: checkpoint directories.
      rows: number of sequences of random tokens.
      length: tokens in each sequence.
      seed: seed of the random tokens.
      json: prints JSON instead of tables.
    """

    first: Path
    second: Path
    rows: int = 2
    length: int = 256
    seed: int = 0
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "length"):
            check_range(name, getattr(self, name), 1, MOST_TOGETHER)
        check_range("seed", self.seed, 0, MOST_SEED)


@dataclass(frozen=True)
class ImportSettings:
    """One import.

    Attributes:
      path: a checkpoint directory.
      out: directory to create.
      experts: "stored" keeps experts as they are, "dense" decodes packed ones to bfloat16.
    """

    path: Path
    out: Path
    experts: Literal["stored", "dense"] = "stored"


@dataclass(frozen=True)
class ExportSettings:
    """One export.

    Attributes:
      checkpoint: an Orbax checkpoint, or a directory to repack.
      out: directory to create; a killed repacking resumes when it is run again.
      form: how experts are stored; by default as in the checkpoint.
      pad_experts: pads all layers to the same number of experts with zeros, for any loader of gpt_oss. Other families
        have no biases of routers, which this needs.
    """

    checkpoint: Path
    out: Path
    form: Literal["mxfp4", "bf16"] | None = None
    pad_experts: bool = False


def run_inspect(settings: InspectSettings) -> None:
    """Prints a summary of a model."""
    from puzzle_jax.convert_hf.inspect import inspect, show

    found = inspect(settings.path)
    if settings.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        show(found, plain_console())


def run_verify(settings: VerifySettings) -> int:
    """Prints how two checkpoints differ; returns 1 where they are not the same function."""
    layers = describe_checkpoint(settings.first).config.num_layers
    describe_checkpoint(settings.second)
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
        print(json.dumps({"same_function": found.same_function, **asdict(found)}, indent=2))
    else:
        show(found, (str(settings.first), str(settings.second)), plain_console())
    return 0 if found.same_function else 1


def run_import(settings: ImportSettings) -> None:
    """Writes an Orbax checkpoint."""
    described = describe_checkpoint(settings.path)
    from puzzle_jax.convert_hf.export import CARRIED, OF_A_CHILD, carried_files
    from puzzle_jax.convert_hf.load import load_checkpoint
    from puzzle_jax.convert_hf.orbax_tree import refuse_existing, save_params

    refuse_existing(settings.out)

    with progress(plain_console(stderr=True), "reading tensors", len(described.tensors)) as advance:
        checkpoint = load_checkpoint(settings.path, experts=settings.experts, on_tensor=lambda *_: advance(1))
    save_params(settings.out, checkpoint, carried_files(settings.path, (*CARRIED, *OF_A_CHILD)))


def run_export(settings: ExportSettings) -> None:
    """Writes a Hugging Face directory."""
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
        checkpoint = opened.checkpoint
        save_checkpoint(
            settings.out,
            checkpoint.config,
            checkpoint.params,
            config_base=checkpoint.config_json,
            extra_files=opened.files,
            form=settings.form or checkpoint.form,
            kv_scales=checkpoint.kv_scales,
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
