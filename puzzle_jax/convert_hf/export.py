"""Export of models as Hugging Face checkpoints.

`export_child` cuts a child out of its parent's files: the kept experts' rows of the router and of every expert tensor
are copied, as is everything else; MXFP4 and FP8 are not decoded, and nothing is rounded but float16 and float32, to
bfloat16. Only trained parameters are written from arrays; trained experts of an MXFP4 parent are packed one by one by
`mxfp4.encode`, which is lossless for values on its grid (`train.fake_quant`). Trained matrices of an FP8 parent are
written in bfloat16, since packing them would round what was learned, and named in `modules_to_not_convert`; so are
those that runtimes fuse with them (q, k and v; all experts of a layer), rounded from their values. `save_checkpoint`
writes a parameter tree. Both hold one piece of one tensor at a time, write through `tensors.writer`, so that a killed
run leaves nothing that loads (and an `export_child` can be resumed), and touch no directory that they did not make.

A child that its family's plain model type cannot describe carries its code: two files with which
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads it, and one for mlx-lm. Alternatively,
where routers have biases, it is padded to its largest layer's number of experts, a form that every loader of the family
reads but that saves no memory.
Left out: uploads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

import puzzle_jax
from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.convert_hf.configuration.config_json import family_of, is_plain, write_config
from puzzle_jax.convert_hf.configuration.quantization import Modules
from puzzle_jax.convert_hf.describe import PROVENANCE, Description, describe_checkpoint
from puzzle_jax.convert_hf.kv_scales import planned_kv_scales
from puzzle_jax.convert_hf.model_card import FILE as CARD
from puzzle_jax.convert_hf.model_card import model_card
from puzzle_jax.convert_hf.pieces import Pieces, Rows, expert_of
from puzzle_jax.convert_hf.table import Form, ParamPath, TensorSpec, checkpoint_tensors, dotted
from puzzle_jax.convert_hf.tensors.composed import StackedExperts
from puzzle_jax.convert_hf.tensors.finite import all_finite
from puzzle_jax.convert_hf.tensors.planned import copied, made
from puzzle_jax.convert_hf.tensors.writer import SHARD_BYTES, Plan, PlannedTensor, naming_target, write_checkpoint
from puzzle_jax.errors import CheckpointError, ConfigError, PuzzleError
from puzzle_jax.files import Json, read_bytes
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.child import delta_leaves
from puzzle_jax.model.spec import EXPERT_MATRICES, Params, subtree

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "USAGE_POLICY",
    "LICENSE",
)
"""Files that children take over from their parent."""
OF_A_CHILD = (CARD, PROVENANCE)
"""Records of a child's origin, which are kept in an Orbax checkpoint of it."""


class Origin(NamedTuple):
    """The first parent of a child that is trained further as a model of its own.

    Attributes:
      kept: per layer, ids of the first parent's experts that the child keeps.
      trained: parameters that had been trained since the first parent, by their paths in the tree.
    """

    config: ModelConfig
    kept: Sequence[Sequence[int]]
    trained: Sequence[str]


def export_child(
    parent: Path | str,
    out: Path | str,
    config: ModelConfig,
    kept: Sequence[Sequence[int]],
    *,
    provenance: Mapping[str, Json],
    dense_delta: Params | None = None,
    kv_scales: KVScales | None = None,
    pad_experts: bool = False,
    replace: bool = False,
    origin: Origin | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the checkpoint of a child that keeps some of its parent's experts.

    A killed run resumes when it is called again with the same arguments.

    Args:
      parent: the parent's checkpoint directory.
      out: the directory to create.
      kept: per layer, ids of the parent's experts in the child's order.
      provenance: what to record in provenance.json beside the ids.
      dense_delta: trained values in place of the parent's (see `model.child.Child`): a tree in the parent's shapes, of
        NumPy or JAX arrays. Routers and experts are cut to `kept` here.
      kv_scales: scales of the child's FP8 cache (`generate.calibrate`); by default the parent's, if it has any. A
        child of a plain model type carries none, since some loaders refuse unknown names; they are in the record
        alone.
      pad_experts: gives every layer as many experts as the largest has; the added ones are zeros that are never
        chosen, and the child has its family's plain model type. Only for families with biases of routers.
      replace: whether an earlier child at `out` may be replaced.
      origin: the first parent, where `parent` is a child itself; record and card then refer to the first parent.
      shard_bytes: largest size of one safetensors file.

    Raises `PuzzleError` where `out` holds something else, `CheckpointError` for a damaged parent and
    `ConfigError` where child and parent do not fit, where trained values do not fit the parent or are not finite, or
    where padding does not make it plain; nothing is written then.
    """
    parent, out = Path(parent), Path(out)
    refuse_overwriting(out, replace, parent)
    description = describe_checkpoint(parent)
    _check_fit(description.config, config, kept)
    written = _padded(config) if pad_experts else config
    plain, form = is_plain(written), description.form
    scales = description.kv_scales if kv_scales is None else np.asarray(kv_scales, np.float32)
    delta = delta_leaves(description.config, dense_delta)
    trained = _unquantized(checkpoint_tensors(written, form, description.unquantized), delta)
    unquantized = description.unquantized | trained
    record = {
        **provenance,
        "puzzle_jax": puzzle_jax.__version__,
        "kept_experts": [[int(expert) for expert in layer] for layer in (origin.kept if origin else kept)],
        "windows": [block.window for block in config.blocks],
        "trained": sorted({*map(dotted, delta), *(origin.trained if origin else ())}),
    }
    if scales is not None:
        record["kv_scales"] = dict(zip("kv", scales.tolist(), strict=True))
        scales = None if plain else scales
    card = model_card(
        config,
        form,
        unquantized=(Modules() if origin else description.unquantized, unquantized),
        parent=origin.config if origin else description.config,
        kept=origin.kept if origin else kept,
        record=record,
        plain=plain,
        padded=pad_experts,
        kv_scales=scales is not None,
    )
    files = carried_files(parent)
    files |= {CARD: card, PROVENANCE: _json_bytes(record)}
    files |= _config_files(written, description.config_json, form, trained)
    sources = {source.file for stored in description.tensors.values() for source in stored.sources}
    identity = [
        [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(sources)],
        {dotted(path): _digest(path, leaf, kept) for path, leaf in delta.items()},
        None if scales is None else scales.tolist(),
    ]
    table = checkpoint_tensors(written, form, unquantized)
    tensors = _child_plan(description, table, kept, delta) + planned_kv_scales(scales)
    write_checkpoint(out, Plan(tensors, files, identity, shard_bytes), replace=lambda: _may_replace(out, replace))


def save_checkpoint(
    out: Path | str,
    config: ModelConfig,
    params: Params,
    *,
    config_base: Mapping[str, Json],
    extra_files: Mapping[str, bytes] | None = None,
    form: Form = "mxfp4",
    kv_scales: KVScales | None = None,
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a parameter tree as a checkpoint.

    Args:
      params: weights in the structure of `model.spec`; leaves may be functions without arguments that return them.
      config_base: a config.json whose other keys (token ids and the like) are kept; may be empty.
      extra_files: further files by name: tokenizer, chat template, provenance.
      form: "mxfp4" packs dense experts and writes packed ones as they are; "bf16" unpacks and rounds. "fp8" is refused.
      replace: whether an earlier checkpoint of ours (one with a provenance.json) at `out` may be replaced.

    The other arguments are those of `export_child`.

    Raises `PuzzleError` where `out` holds something else, or where values are not finite.
    """
    out = Path(out)
    refuse_overwriting(out, replace)
    if form == "fp8":
        raise ConfigError("form is fp8, but parameters are written as mxfp4 or bf16; matrices in FP8 are only copied")
    pieces = Pieces()

    @lru_cache(maxsize=1)  # the tensors of a parameter come one after the other
    def leaf(path: ParamPath) -> PyTree:
        found = subtree(params, path)
        return found() if callable(found) else found

    plan: list[PlannedTensor] = []
    for spec in checkpoint_tensors(config, form):
        plan += made(spec, pieces, partial(leaf, spec.parameter), None)
    files = dict(extra_files or {}) | _config_files(config, config_base, form)
    plan += planned_kv_scales(None if kv_scales is None else np.asarray(kv_scales, np.float32))
    write_checkpoint(out, Plan(plan, files, None, shard_bytes), replace=lambda: _may_replace(out, replace))


def _check_fit(parent: ModelConfig, child: ModelConfig, kept: Sequence[Sequence[int]]) -> None:
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
        if getattr(parent, name) != getattr(child, name):
            raise ConfigError(f"{name} is {getattr(child, name)} in the child, {getattr(parent, name)} in the parent")
    if not parent.num_layers == child.num_layers == len(kept):
        raise ConfigError(
            f"the parent has {parent.num_layers} layers, the child {child.num_layers}, "
            f"and kept experts are given for {len(kept)}"
        )
    for layer, ids in enumerate(kept):
        available, wanted = parent.blocks[layer].num_experts, child.blocks[layer].num_experts
        if len(set(ids)) != len(ids) or not all(0 <= expert < available for expert in ids):
            raise ConfigError(f"layer {layer} keeps {list(ids)}, but needs distinct ids below {available}")
        if len(ids) != wanted:
            raise ConfigError(f"layer {layer} keeps {len(ids)} experts, but the child has num_experts {wanted}")


def _padded(config: ModelConfig) -> ModelConfig:
    family, most = family_of(config), max(block.num_experts for block in config.blocks)
    filled = tuple(BlockConfig(most if block.num_experts else 0, block.window) for block in config.blocks)
    padded = config.with_blocks(filled)
    if filled != config.blocks and not config.variant.router_bias:
        raise ConfigError(
            f"experts cannot be padded, because routers of {family.name} have no bias that would keep the added ones "
            "from being chosen, and a row without one exceeds others for some tokens; export without padding, or "
            "search for a child with the same number of experts in all layers"
        )
    if not is_plain(padded):
        windows = [block.window for block in config.blocks]
        raise ConfigError(f"the child's windows are {windows}, but a padded child needs {family.plain_windows}")
    return padded


def _unquantized(table: Sequence[TensorSpec], delta: Mapping[ParamPath, Rows]) -> list[str]:
    """The modules that a child stores in BF16 because they were trained, or are fused with one that was."""
    modules = (s.modules for s in table if s.dtype == "F8_E4M3" and s.parameter in delta)
    return list(dict.fromkeys(chain.from_iterable(modules)))


def _child_plan(
    parent: Description,
    table: Sequence[TensorSpec],
    kept: Sequence[Sequence[int]],
    delta: Mapping[ParamPath, Rows],
) -> list[PlannedTensor]:
    """The child's tensors, each read from the parent's file or from the trained values when its turn comes."""
    plan = []
    trained = Pieces()
    for spec in table:
        stored, path = parent.tensors[spec.name], spec.parameter
        ids = tuple(kept[spec.layer]) if spec.by_expert and spec.layer is not None else None
        if path in delta:
            fused = isinstance(stored, StackedExperts) and stored.fused
            plan += made(spec, trained, partial(delta.__getitem__, path), ids, fused=fused)
        else:
            plan += copied(spec, stored, ids)
    return plan


def _digest(path: ParamPath, leaf: Rows, kept: Sequence[Sequence[int]]) -> str:
    """Hash of a trained array; of a stack of expert matrices, only the kept ones are hashed (all of a dense layer).

    Raises `ConfigError` where a value is not finite.
    """
    digest = hashlib.sha256()
    rows = (kept[int(path[1])] or None) if path[-1] in EXPERT_MATRICES else None
    for piece in [np.asarray(leaf)] if rows is None else (expert_of(leaf, expert) for expert in rows):
        if not all_finite(piece):
            raise ConfigError(f"the trained values of {dotted(path)} are not all finite numbers")
        digest.update(f"{piece.dtype}".encode())
        digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def carried_files(directory: Path, names: Sequence[str] = CARRIED) -> dict[str, bytes]:
    """The named files, as far as a checkpoint has them, with their contents."""
    return {name: read_bytes(directory / name, CheckpointError) for name in names if (directory / name).is_file()}


def _json_bytes(value: Json) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def config_bytes(data: Mapping[str, Json]) -> bytes:
    """A config.json's text; raises `CheckpointError` where a kept value is nested too deeply."""
    try:
        return _json_bytes(data)
    except RecursionError:
        raise CheckpointError("config.json holds a value that is nested too deeply to be written again") from None


def _config_files(
    config: ModelConfig, base: Mapping[str, Json], form: Form, unquantized: Sequence[str] = ()
) -> dict[str, bytes]:
    """config.json, and the code of a model that its family's plain model type cannot describe."""
    data = write_config(config, dict(base), form=form, unquantized=unquantized)
    files = {"config.json": config_bytes(data)}
    if not is_plain(config):
        remote = resources.files("puzzle_jax.convert_hf") / "remote"
        files |= {name: (remote / name).read_bytes() for name in family_of(config).remote_code}
    return files


def refuse_overwriting(out: Path, replace: bool = False, parent: Path | None = None) -> None:
    """Raises `PuzzleError` where something stands at `out` that may not be replaced."""
    with naming_target(out):
        if parent is not None and out.resolve() == parent.resolve():
            raise PuzzleError(f"{out} is the parent itself; choose another directory")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            _may_replace(out, replace)


def _may_replace(out: Path, replace: bool) -> bool:
    if not (out / PROVENANCE).is_file():
        raise PuzzleError(f"{out} exists and holds something else; choose another directory or empty it")
    if not replace:
        raise PuzzleError(f"{out} holds an earlier child; choose another directory or allow replacing it")
    return True
