"""Export of models as Hugging Face checkpoints.

`export_child` cuts a child out of its parent's files: rows of the router and of every expert tensor are taken
by expert, everything else is copied, and no byte is decoded or rounded on the way. `save_checkpoint` writes a
parameter tree. Both write beside the goal and rename, so that a run that dies leaves no half checkpoint, and
neither touches a directory that it did not make.

A child that plain `gpt_oss` cannot say carries its code: two files with which
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads it, and one for mlx-lm.
Left out: uploads, and re-quantising experts that are packed already.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import puzzle_jax
from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf import mxfp4
from puzzle_jax.convert_hf.config_json import MODEL_FILE, is_plain, write_config
from puzzle_jax.convert_hf.kv_scales import planned_kv_scales
from puzzle_jax.convert_hf.load import Description, describe_checkpoint
from puzzle_jax.convert_hf.table import Form, TensorSpec, checkpoint_tensors
from puzzle_jax.convert_hf.table import Path as ParamPath
from puzzle_jax.convert_hf.tensor_files import SHARD_BYTES, PlannedTensor, write_tensors
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.spec import Params

PROVENANCE = "provenance.json"
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)
REMOTE_CODE = ("configuration_gpt_oss_puzzle.py", "modeling_gpt_oss_puzzle.py", MODEL_FILE)


def export_child(
    parent: Path | str,
    out: Path | str,
    config: ModelConfig,
    kept: Sequence[Sequence[int]],
    *,
    provenance: Mapping[str, Any],
    dense_delta: Params | None = None,
    kv_scales: KVScales | None = None,
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the checkpoint of a child that keeps some of its parent's experts.

    Args:
      parent: the parent's checkpoint directory.
      out: the directory to make.
      config: the child.
      kept: per layer, ids of the parent's experts in the child's order.
      provenance: what to record in provenance.json beside the ids.
      dense_delta: trained values in place of the parent's (see `model.child.Child`).
      kv_scales: of the child's FP8 cache (`generate.calibrate`); by default the parent's, if it has any.
      replace: an earlier child at `out` may be replaced.
      shard_bytes: largest size of one safetensors file.

    Raises `PuzzleError` where `out` holds something else, `CheckpointError` for a damaged parent and
    `ConfigError` where child and parent do not fit; nothing is written then.
    """
    parent, out = Path(parent), Path(out)
    _refuse_overwriting(out, replace, parent)
    description = describe_checkpoint(parent)
    _check_fit(description.config, config, kept)
    delta = {path: leaf for path, leaf in _leaves(dense_delta) if leaf is not None}
    plan = _child_plan(description, config, kept, delta)
    plan += planned_kv_scales(description.kv_scales if kv_scales is None else kv_scales)
    record = {
        **provenance,
        "puzzle_jax": puzzle_jax.__version__,
        "kept_experts": [[int(expert) for expert in layer] for layer in kept],
        "windows": [block.window for block in config.blocks],
        "trained": sorted({_dotted(path) for path in delta}),
    }
    files = {name: (parent / name).read_bytes() for name in CARRIED if (parent / name).is_file()}
    files[PROVENANCE] = _json_bytes(record)
    _write(out, config, description.config_json, description.form, plan, files, replace, shard_bytes)


def save_checkpoint(
    out: Path | str,
    config: ModelConfig,
    params: Params,
    *,
    config_base: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
    form: Form = "mxfp4",
    kv_scales: KVScales | None = None,
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a parameter tree as a checkpoint.

    Args:
      out: the directory to make.
      config: the model.
      params: its weights, in the structure of `model.spec`.
      config_base: a config.json whose other keys (token ids and the like) are kept; may be empty.
      extra_files: further files by name: tokenizer, chat template, provenance.
      form: "mxfp4" packs dense experts and writes packed ones as they are; "bf16" unpacks and rounds.
      kv_scales: of an FP8 cache (`generate.calibrate`).
      replace: an earlier checkpoint of ours (one with a provenance.json) at `out` may be replaced.
      shard_bytes: largest size of one safetensors file.

    Raises `PuzzleError` where `out` holds something else, or where values are not finite.
    """
    out = Path(out)
    _refuse_overwriting(out, replace)
    source = _ParamsSource(params)
    plan = [_planned(spec, lambda spec=spec: source.read(spec)) for spec in checkpoint_tensors(config, form)]
    plan += planned_kv_scales(kv_scales)
    _write(out, config, dict(config_base), form, plan, dict(extra_files or {}), replace, shard_bytes)


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


def _child_plan(
    parent: Description, config: ModelConfig, kept: Sequence[Sequence[int]], delta: dict[ParamPath, Any]
) -> list[PlannedTensor]:
    """The child's tensors, each read from the parent's file or from the trained values when its turn comes."""
    table = checkpoint_tensors(config, parent.form)
    strange = set(delta) - {spec.path for spec in table if not spec.by_expert}
    if strange:
        names = ", ".join(sorted(map(_dotted, strange)))
        raise ConfigError(f"the trained values hold {names}, but only dense parameters can be exported on a child")
    plan = []
    for spec in table:
        stored = parent.tensors[spec.name]
        if spec.path in delta:
            plan.append(_planned(spec, lambda spec=spec: _to_stored(spec, delta[spec.path])))
        elif spec.by_expert and spec.layer is not None:
            ids = np.asarray(kept[spec.layer])
            plan.append(_planned(spec, lambda spec=spec, stored=stored, ids=ids: _as_spec(spec, stored.read()[ids])))
        else:
            plan.append(_planned(spec, lambda spec=spec, stored=stored: _as_spec(spec, stored.read())))
    return plan


def _planned(spec: TensorSpec, read: Callable[[], np.ndarray]) -> PlannedTensor:
    return PlannedTensor(spec.name, spec.dtype, spec.shape, read, with_previous=spec.path[-1] == "scales")


def _as_spec(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """An array in the table's type: bytes and BF16 as they are, wider floats rounded to BF16."""
    return array if spec.dtype == "U8" else array.astype(ml_dtypes.bfloat16, copy=False)


def _to_stored(spec: TensorSpec, leaf: Any) -> np.ndarray:
    """A parameter in the orientation and type of its tensor."""
    array = np.asarray(leaf)
    return _as_spec(spec, array.T if spec.transposed else array)


class _ParamsSource:
    """Tensors of a parameter tree; keeps the matrix encoded last, since its scales follow its blocks."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.encoded: tuple[ParamPath, dict[str, np.ndarray]] = ((), {})

    def read(self, spec: TensorSpec) -> np.ndarray:
        half = spec.path[-1] if spec.path[-1] in ("blocks", "scales") else None
        path = spec.path if half is None else spec.path[:-1]
        node: Any = self.params
        for key in path:
            node = node[key]
        if isinstance(node, MXFP4):
            packed = {"blocks": np.asarray(node.blocks), "scales": np.asarray(node.scales)}
            if half is None:
                return mxfp4.decode(packed["blocks"], packed["scales"], ml_dtypes.bfloat16)
            return packed[str(half)]
        if half is None:
            return _to_stored(spec, node)
        if self.encoded[0] != path:
            blocks, scales = mxfp4.encode(np.asarray(node))
            self.encoded = (path, {"blocks": blocks, "scales": scales})
        return self.encoded[1][str(half)]


def _leaves(tree: Any, path: ParamPath = ()) -> Iterator[tuple[ParamPath, Any]]:
    if isinstance(tree, Mapping):
        for name, node in tree.items():
            yield from _leaves(node, (*path, name))
    elif isinstance(tree, (list, tuple)):
        for index, node in enumerate(tree):
            yield from _leaves(node, (*path, index))
    else:
        yield path, tree


def _dotted(path: ParamPath) -> str:
    return ".".join(map(str, path))


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(
    out: Path,
    config: ModelConfig,
    base: dict[str, Any],
    form: Form,
    plan: Sequence[PlannedTensor],
    files: Mapping[str, bytes],
    replace: bool,
    shard_bytes: int,
) -> None:
    files = {**files, "config.json": _json_bytes(write_config(config, base, form=form))}
    if not is_plain(config):
        remote = resources.files("puzzle_jax.convert_hf") / "remote"
        files |= {name: (remote / name).read_bytes() for name in REMOTE_CODE}
    with _fresh_directory(out, replace) as partial:
        write_tensors(partial, plan, shard_bytes=shard_bytes)
        for name, content in files.items():
            (partial / name).write_bytes(content)


def _refuse_overwriting(out: Path, replace: bool, parent: Path | None = None) -> None:
    if parent is not None and out.resolve() == parent.resolve():
        raise PuzzleError(f"{out} is the parent itself; choose another directory")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / PROVENANCE).is_file():
        raise PuzzleError(f"{out} exists and holds something else; choose another directory or empty it")
    if not replace:
        raise PuzzleError(f"{out} holds an earlier child; choose another directory or allow replacing it")


@contextmanager
def _fresh_directory(out: Path, replace: bool) -> Iterator[Path]:
    """A new directory beside `out` that takes its place when the block ends well and disappears when it does
    not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (out.parent / f".{out.name}.{os.getpid()}.{kind}" for kind in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _refuse_overwriting(out, replace)
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
