"""Whatever is no Hugging Face directory is refused with one sentence that says what it is and what to do instead."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from puzzle_jax.convert_hf.describe import describe_checkpoint, read_config
from puzzle_jax.convert_hf.other_forms import check_form
from puzzle_jax.convert_hf.tensors.files import INDEX, SINGLE, open_tensors
from puzzle_jax.errors import CheckpointError
from tests.convert_hf.checkpoints import packable_config, rewrite, write_random

ORIGINAL = {
    **{"num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088},
    **{"initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1.0},
}


def said(path: Path | str, read=describe_checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(Path(path))
    message = str(caught.value)
    assert message.isprintable()
    return message


def directory(path: Path, *names: str) -> Path:
    """Makes a directory of empty files; a name that ends in a slash becomes a subdirectory."""
    path.mkdir()
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).mkdir() if name.endswith("/") else (path / name).touch()
    return path


@pytest.mark.parametrize(
    "given",
    [
        "openai/gpt-oss-20b",
        "https://huggingface.co/openai/gpt-oss-20b",
        "https://huggingface.co/openai/gpt-oss-20b/tree/main",
        "hf://openai/gpt-oss-20b",
    ],
)
@pytest.mark.parametrize("read", [describe_checkpoint, read_config, open_tensors])
def test_a_name_of_the_hub(tmp_path, monkeypatch, given, read):
    monkeypatch.chdir(tmp_path)
    command = "`hf download openai/gpt-oss-20b --local-dir gpt-oss-20b --exclude 'original/*' --exclude 'metal/*'`"
    message = said(given, read)
    assert command in message and message.endswith("and give gpt-oss-20b")


def test_a_mistyped_path_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert said("runs/child") == "runs/child is not a directory"
    assert said(tmp_path / "a" / "b") == f"{tmp_path}/a/b is not a directory"
    assert said("a\0b/c") == r"'a\x00b/c' is not a directory"
    assert said("x" * 5000).endswith("is not a directory")


HELD = {
    "adapter": (("adapter_config.json", "adapter_model.safetensors"), r"holds an adapter (adapter_config.json); merge"),
    "adapter beside weights": (("config.json", SINGLE, "adapter_config.json"), "holds an adapter"),
    "gguf": (("config.json", "gpt-oss-20b-Q4_K_M.gguf"), "holds a GGUF file (gpt-oss-20b-Q4_K_M.gguf)"),
    "pickled": (("config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"), "pickled weights"),
    "pth": (("config.json", "consolidated.00.pth"), "pickled weights (consolidated.00.pth)"),
    "only original": (("original/config.json", "original/model.safetensors"), "holds OpenAI's own form"),
    "metal": (("metal/model.bin",), "holds OpenAI's own form"),
    "orbax": (("hf/config.json", "params/_METADATA"), "is an Orbax checkpoint; run `puzzle convert_hf"),
    "bare orbax": (("_METADATA", "d/x", "manifest.ocdbt"), "is an Orbax tree without a config.json"),
    "cache of the hub": (("snapshots/abc/config.json", "blobs/x", "refs/main"), "/snapshots/abc"),
    "directory of models": (("child/config.json", "notes.txt"), "is no checkpoint; give "),
    "shards without index": (("config.json", "model-00001-of-00003.safetensors"), f"but no {INDEX}"),
    "empty": ((), f"holds neither {SINGLE} nor {INDEX}"),
}


@pytest.mark.parametrize("names, words", HELD.values(), ids=HELD.keys())
def test_what_a_directory_holds(tmp_path, names, words):
    found = said(directory(tmp_path / "model", *names), check_form)
    assert found.startswith(f"{tmp_path}/model ") and words in found


def test_files_in_place_of_directories(tmp_path):
    weights, gguf, pickled = (tmp_path / name for name in (SINGLE, "x.gguf", "pytorch_model.bin"))
    for path in (weights, gguf, pickled):
        path.touch()
    assert said(weights).endswith("is a file; give the directory that holds it")
    assert "is a GGUF file; give the Hugging Face directory that it was made from" in said(gguf)
    assert "is a file of pickled weights; load the model with transformers and save it" in said(pickled)


def test_openais_own_form_beside_a_model_and_in_its_place(tmp_path):
    model = write_random(tmp_path / "model", packable_config())
    original = directory(model / "original", SINGLE)
    (original / "config.json").write_text(json.dumps(ORIGINAL))
    save_file({"block.0.attn.qkv.weight": np.zeros((2, 2), np.float32)}, original / SINGLE)
    assert describe_checkpoint(model).config == packable_config()
    wanted = f"{original}/config.json is in OpenAI's own form; give {model}, which holds the Hugging Face form"
    assert said(original) == said(original, read_config) == said(original / "config.json", read_config) == wanted
    (model / "config.json").unlink()
    assert said(original).endswith("give the Hugging Face form, which is beside a model's folder original/")


def test_a_single_file_goes_before_an_index(tmp_path):
    """As in transformers; a directory that once held shards keeps its index and old shards."""
    model = write_random(tmp_path / "model", packable_config(), shard_bytes=40_000)
    old = open_tensors(model).tensors["model.norm.weight"].read()
    newer = write_random(tmp_path / "newer", packable_config(), seed=1)
    (newer / SINGLE).rename(model / SINGLE)
    found = describe_checkpoint(model).tensors["model.norm.weight"]
    assert found.sources[0].file == model / SINGLE and not np.array_equal(found.read(), old)
    (model / INDEX).write_text("{")  # which is not read
    assert describe_checkpoint(model).tensors.keys() == open_tensors(model).tensors.keys()


def test_configurations_are_read_without_weights(tmp_path):
    model = write_random(tmp_path / "model", packable_config())
    rewrite(model)
    (model / SINGLE).rename(model / "gpt.gguf")
    assert read_config(model) == packable_config()
