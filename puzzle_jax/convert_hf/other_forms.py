"""Recognises models in forms that are not read, so that they are not taken for damage, and says what to do about each.

The forms are a name of the Hugging Face hub in place of a directory, an adapter, GGUF files, pickled weights, OpenAI's
own form, an Orbax checkpoint, the hub's cache, and a directory that holds checkpoints instead of being one. Only names
are looked at; no file is opened. Nothing here imports JAX.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from puzzle_jax.errors import CheckpointError, shown

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ORBAX_HF, ORBAX_PARAMS = "hf", "params"
"""Where an Orbax checkpoint of ours keeps the files of a Hugging Face directory, and the parameters."""

_HUB_URL = re.compile(r"(?:https?:/+(?:www\.)?huggingface\.co/|hf:/+(?:models/)?)([\w.-]+/[\w.-]+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLED = re.compile(r"pytorch_model.*\.bin|.*\.(pth|pt|ckpt)")
_ORIGINAL = {"original", "metal"}
_ORBAX_TREE = {"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"}
_SHOWN = 3


def check_form(path: Path, *, weights: bool = True) -> None:
    """Raises `CheckpointError`, with one sentence that explains what to do, where `path` is no Hugging Face directory.

    A directory that has config.json and weights passes, however damaged they may be; without `weights`, so does one
    that has config.json alone.
    """
    reason = _of_directory(path, weights) if os.path.isdir(path) else _of_name(path)
    if reason:
        raise CheckpointError(f"{path if str(path).isprintable() else shown(str(path))} {reason}")


def original_form(source: Path) -> str:
    """The message about a config.json that is in OpenAI's own form."""
    above = source.absolute().parent.parent
    if os.path.isfile(above / CONFIG):
        return f"{source} is in OpenAI's own form; give {above}, which holds the Hugging Face form"
    return f"{source} is in OpenAI's own form; give the Hugging Face form, which is beside a model's folder original/"


def _of_name(path: Path) -> str:
    if os.path.isfile(path):
        if path.suffix == ".gguf":
            return f"is a GGUF file; {_GGUF}"
        if _PICKLED.fullmatch(path.name):
            return f"is a file of pickled weights; {_TO_SAFETENSORS}"
        return "is a file; give the directory that holds it"
    text = str(path)
    url = _HUB_URL.match(text)
    if url or (_HUB_ID.fullmatch(text) and not os.path.exists(path.parts[0])):
        name = url[1] if url else text
        local = name.rpartition("/")[2]
        return (
            f"is not a directory; for the model of that name on the Hugging Face hub, run `hf download {name} "
            f"--local-dir {local} --exclude 'original/*' --exclude 'metal/*'` (a command of the package "
            f"huggingface_hub) and give {local}"
        )
    return "is not a directory"


def _of_directory(path: Path, weights: bool) -> str:
    try:
        names = set(os.listdir(path))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if adapters := {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"} & names:
        return (
            f"holds an adapter ({min(adapters)}); merge it into its base model (`merge_and_unload` of the package "
            "peft), save that, and give the directory of the merged model"
        )
    if CONFIG not in names and ORBAX_HF in names and os.path.isdir(path / ORBAX_HF):
        command = f"puzzle convert_hf export --checkpoint {path} --out DIR"
        return f"is an Orbax checkpoint; run `{command}` and give DIR"
    if CONFIG not in names and (names & _ORBAX_TREE or names == {ORBAX_PARAMS}):
        return "is an Orbax tree without a config.json; give the directory that `puzzle_jax.convert_hf import` made"
    if CONFIG in names and not weights:
        return ""
    if any(os.path.isfile(path / name) for name in (SINGLE, INDEX)):
        return ""
    if shards := sorted(name for name in names if _SHARD.fullmatch(name)):
        return f"holds {shards[0]}, but no {INDEX}, which says what each of the shards holds; download it again"
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        return f"holds a GGUF file ({gguf[0]}), but no {SINGLE}; {_GGUF}"
    if pickled := sorted(name for name in names if _PICKLED.fullmatch(name)):
        return f"holds neither {SINGLE} nor {INDEX}, but pickled weights ({pickled[0]}); {_TO_SAFETENSORS}"
    if "snapshots" in names:
        found = _checkpoints(path / "snapshots")
        return "is the cache of the Hugging Face hub; give " + (found or "one of the directories in snapshots/")
    if names & _ORIGINAL or path.name in _ORIGINAL:
        return "holds OpenAI's own form of a model; give the Hugging Face form, which is beside original/ and metal/"
    if CONFIG not in names and (found := _checkpoints(path)):
        return f"is no checkpoint; give {found}"
    return f"holds neither {SINGLE} nor {INDEX}" if weights else ""


_GGUF = "give the Hugging Face directory that it was made from, with config.json and model.safetensors"
_TO_SAFETENSORS = "load the model with transformers and save it with `save_pretrained`, which writes safetensors"


def _checkpoints(directory: Path) -> str:
    """The first sub-directories that hold a checkpoint, as a choice; empty where none does."""
    try:
        below = sorted(entry.path for entry in os.scandir(directory) if os.path.isfile(Path(entry.path, CONFIG)))
    except OSError:
        return ""
    return " or ".join(below[:_SHOWN])
