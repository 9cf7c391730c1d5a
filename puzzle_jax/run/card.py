"""The model card of the checkpoint that a run ends with: what it was made from, how, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from puzzle_jax.convert_hf.configuration.config_json import is_plain
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import PROVENANCE
from puzzle_jax.convert_hf.model_card import FILE, model_card
from puzzle_jax.files import Json, read_object, read_text, write_beside
from puzzle_jax.report.comparison import ComparisonTable

_FENCE = "---\n"


def write_child(directory: Path, parent: Path, evaluation: Path, name: str) -> None:
    """Writes the model card of a child, with its results from an evaluation.json.

    Args:
      directory: the child's checkpoint.
      parent: the parent's checkpoint, whose own card names its licence and base model.
      evaluation: path of the evaluation.json.
      name: name of the child in that file.
    """
    record, description = read_object(directory / PROVENANCE), describe_checkpoint(directory)
    content = read_object(evaluation)
    table = ComparisonTable(content, (content["reference"], name))
    known = card_fields(parent)
    of_parent = describe_checkpoint(parent)
    card = model_card(
        description.config,
        description.form,
        parent=of_parent.config,
        unquantized=(of_parent.unquantized, description.unquantized),
        kept=record["kept_experts"],
        record=record,
        results=f"{table.verdict(name)}\n\n{table.section().markdown()}",
        base_model=str(known.get("base_model") or parent.resolve().name),
        licence=known.get("license"),
        plain=is_plain(description.config),
        padded=False,
        kv_scales=description.kv_scales is not None,
    )
    write_beside(directory / FILE, card)


def card_fields(directory: Path) -> Mapping[str, Json]:
    """The fields of the YAML header of a checkpoint's card; empty where it has no card or no such header."""
    path = directory / FILE
    if not path.is_file():
        return {}
    text = read_text(path)
    head, fence, _ = text.removeprefix(_FENCE).partition(f"\n{_FENCE}")
    if not text.startswith(_FENCE) or not fence:
        return {}
    try:
        found = yaml.safe_load(head)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
