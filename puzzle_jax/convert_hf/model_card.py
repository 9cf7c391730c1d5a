"""The README.md of an exported child: what was cut, what is known about its quality, and how to serve it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import cache
from pathlib import Path

import jinja2

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.configuration.config_json import family_of
from puzzle_jax.convert_hf.table import Form, parameters, tensor_bytes
from puzzle_jax.files import Json

FILE = "README.md"
_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


def model_card(
    child: ModelConfig,
    form: Form,
    *,
    parent: ModelConfig,
    kept: Sequence[Sequence[int]],
    record: Mapping[str, Json],
    unquantized: tuple[Container[str], Container[str]] = (frozenset(), frozenset()),
    results: str = "",
    base_model: str | None = None,
    licence: str | None = None,
    **serving: bool,
) -> bytes:
    """The card of a child.

    Args:
      child: the model before any padding.
      form: how its matrices are stored.
      parent: the model that it was cut from.
      kept: ids of the kept experts per layer.
      record: its provenance; "parent" names the parent, "predicted" and "measured" are shown as they are.
      unquantized: modules that parent and child store in BF16 although the form is "fp8".
      results: measurements in markdown, shown in place of those in the record.
      base_model, licence: the parent's, as the metadata of a card names them; None leaves them out.
      serving: three flags: "plain", whether it has its family's plain model type; "padded", whether every layer is
        padded to the same number of experts; and "kv_scales", whether it carries scales of an FP8 cache.
    """
    family, (before, after) = family_of(parent), unquantized
    titles = {"measured": "Measured", "predicted": "Predicted by the search, not measured"}
    trained = list(record.get("trained", ()))
    return (
        _template()
        .render(
            name=Path(str(record.get("parent", f"a {family.name} model"))).name,
            record=record,
            family=family,
            form=form,
            sizes=[
                ("parameters", parameters(parent), parameters(child)),
                ("bytes of tensors", tensor_bytes(parent, form, before), tensor_bytes(child, form, after)),
            ],
            head={key: value for key, value in (("base_model", base_model), ("license", licence)) if value},
            results=results,
            trained_experts=any(name.split(".")[-1].startswith(("gate_up", "down")) for name in trained),
            trained=_parts(trained),
            layers=list(zip(map(len, kept), parent.blocks, child.blocks, strict=True)),
            scores=[(title, record[key]) for key, title in titles.items() if record.get(key)],
            **serving,
        )
        .encode()
    )


def _parts(trained: Sequence[str]) -> str:
    """The parts of a model that these parameters belong to, in words."""
    return ", ".join(sorted({_part(name.split(".")) for name in trained}))


def _part(path: Sequence[str]) -> str:
    if path[-1].endswith("norm"):
        return "norms"
    if path[-1].startswith(("gate_up", "down")):
        return "experts"
    return "routers" if path[-1].startswith("router") else path[-2] if len(path) > 1 else path[0]


@cache
def _template() -> jinja2.Template:
    return jinja2.Template(_TEMPLATE.read_text(), keep_trailing_newline=True)
