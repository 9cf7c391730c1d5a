"""The README.md of an exported child: what was cut, what is known of its quality, how to serve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.convert_hf.table import Form, parameters, tensor_bytes

FILE = "README.md"

_PLAIN = """Every layer has the same number of experts and the windows alternate as in gpt-oss, so every runtime that
serves gpt-oss serves it: transformers, vLLM, llama.cpp (after conversion), mlx-lm."""
_PADDED = """Experts that were cut are there as zeros that the router never chooses, so every runtime that serves
gpt-oss serves it; this copy saves neither memory nor, in most runtimes, time."""
_PUZZLE = """Layers differ in experts and windows. transformers loads it with `trust_remote_code=True`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
```

The two Python files beside the weights are that code; read them before you trust them."""
_SCALES = """It carries scales for an FP8 key-value cache (`self_attn.k_scale`, `self_attn.v_scale`); runtimes
use them with an FP8 cache only, in vLLM with `--kv-cache-dtype fp8`."""

_BYTES = {
    False: "Kept experts keep their bytes",
    True: "Kept experts keep their bytes, but for those that were trained and packed again",
}


def model_card(
    child: ModelConfig,
    form: Form,
    *,
    parent: ModelConfig,
    kept: Sequence[Sequence[int]],
    record: Mapping[str, Any],
    plain: bool,
    padded: bool,
    kv_scales: bool,
) -> bytes:
    """The card of a child.

    Args:
      child: what it is, before any padding.
      form: how its experts are stored.
      parent: what it was cut from.
      kept: ids of the kept experts per layer.
      record: its provenance; "parent" names the parent, "predicted" and "measured" are shown as they are.
      plain: whether it is written as `gpt_oss`.
      padded: whether it is padded to the parent's experts.
      kv_scales: whether it carries scales of an FP8 cache.
    """
    name = Path(str(record.get("parent", "a gpt-oss model"))).name
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# A child of {name}",
        f"Cut by puzzle_jax {record['puzzle_jax']} after Puzzle for mixture-of-experts models (arXiv 2602.11937).",
        _sizes(parent, child, form),
        "## What was cut",
        f"{_BYTES[_trained_experts(record)]}; `provenance.json` lists their ids.",
        _layers(parent, child, kept),
    ]
    if record.get("trained"):
        parts.append(f"Trained after the cut: {', '.join(record['trained'])}.")
    parts.append("## How it scored")
    scored = [
        f"{title}:\n\n{_values(record[key])}"
        for key, title in (("measured", "Measured"), ("predicted", "Predicted by the search, not measured"))
        if record.get(key)
    ]
    parts += scored or ["Nothing was recorded. `puzzle evaluate` compares it with its parent."]
    parts += ["## How to serve it", _PADDED if padded else _PLAIN if plain else _PUZZLE]
    if kv_scales:
        parts.append(_SCALES)
    return ("\n\n".join(parts) + "\n").encode()


def _trained_experts(record: Mapping[str, Any]) -> bool:
    return any(name.split(".")[-1].startswith(("gate_up", "down")) for name in record.get("trained", ()))


def _sizes(parent: ModelConfig, child: ModelConfig, form: Form) -> str:
    rows = [("parameters", parameters), ("bytes of tensors", lambda config: tensor_bytes(config, form))]
    lines = [
        f"| {title} | {count(parent):,} | {count(child):,} ({count(child) / count(parent):.0%}) |"
        for title, count in rows
    ]
    return "\n".join(["| | parent | child |", "|---|---:|---:|", *lines])


def _layers(parent: ModelConfig, child: ModelConfig, kept: Sequence[Sequence[int]]) -> str:
    def window(block: BlockConfig) -> str:
        return "full" if block.window is None else str(block.window)

    lines = ["| layer | experts kept | attention window |", "|---:|---:|---|"]
    for layer, (before, after, ids) in enumerate(zip(parent.blocks, child.blocks, kept, strict=True)):
        was = "" if before.window == after.window else f" (was {window(before)})"
        lines.append(f"| {layer} | {len(ids)} of {before.num_experts} | {window(after)}{was} |")
    return "\n".join(lines)


def _values(values: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in values.items())])
