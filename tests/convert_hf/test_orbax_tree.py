"""Orbax checkpoints of unknown origin: files beside the parameters, damage, and trees that do not fit."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.convert_hf import orbax_tree
from puzzle_jax.convert_hf.__main__ import main
from puzzle_jax.convert_hf.child_of import open_child
from puzzle_jax.convert_hf.export import export_child, save_checkpoint
from puzzle_jax.convert_hf.load import Checkpoint
from puzzle_jax.convert_hf.orbax_tree import open_params, save_params
from puzzle_jax.convert_hf.tensors.files import SINGLE
from puzzle_jax.errors import CheckpointError, PuzzleError
from puzzle_jax.model.cache_format import KVScales
from tests.convert_hf.checkpoints import MIXED, packable_config, stored_bytes, write_random
from tests.support import random_params

SCALES = KVScales(jnp.asarray([0.5, 1, 2, 3.0]), jnp.asarray([4.0, 5, 6, 7]))
CHAT = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ reasoning_effort }}", "LICENSE": b"free"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A parent, a child cut from it, and the child as an Orbax checkpoint."""
    place = tmp_path_factory.mktemp("models")
    parent = write_random(place / "parent", packable_config(), extra_files=CHAT)
    kept = [range(block.num_experts) for block in MIXED]
    export_child(
        parent,
        place / "child",
        packable_config(MIXED),
        kept,
        provenance={"parent": str(parent), "seed": 7},
        kv_scales=SCALES,
    )
    assert main(["import", str(place / "child"), "--out", str(place / "orbax")]) == 0
    return place


@pytest.fixture
def orbax(models, tmp_path) -> Path:
    return shutil.copytree(models / "orbax", tmp_path / "orbax")


def export(orbax: Path, capsys) -> tuple[int, str]:
    """Exit code and error output of an export to a directory beside the checkpoint."""
    code = main(["export", "--checkpoint", str(orbax), "--out", str(orbax.parent / "out")])
    return code, capsys.readouterr().err


def refused(orbax: Path, capsys) -> str:
    code, message = export(orbax, capsys)
    assert code == 2 and message.count("\n") == 1, message
    assert [path.name for path in orbax.parent.iterdir()] == ["orbax"]
    return message


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != SINGLE}


def test_a_child_comes_back_as_it_was_and_can_still_be_opened_as_one(models, orbax, capsys):
    assert export(orbax, capsys) == (0, "")
    out = orbax.parent / "out"
    assert stored_bytes(out) == stored_bytes(models / "child")
    child = contents(models / "child")
    assert contents(out) == child and {"provenance.json", "README.md", *CHAT} < set(child)
    opened = open_child(models / "parent", out, every_expert=True)
    assert opened.differing == () and opened.provenance["seed"] == 7


def test_nothing_but_files_of_a_checkpoint_is_carried(models, orbax, capsys):
    secret = orbax.parent / "secret"
    secret.write_text("private")
    planted = orbax / "hf"
    (planted / SINGLE).write_bytes(b"\0" * 100)
    (planted / "model.safetensors.index.json").write_text("{}")
    (planted / "modeling_gpt_oss_puzzle.py").write_text("raise SystemExit")
    (planted / "setup.sh").write_text("exit 1")
    (planted / "notes.txt").symlink_to(secret)
    (planted / "folder").symlink_to(orbax.parent)
    code, said = export(orbax, capsys)
    assert code == 0 and said.startswith("left out of ") and "'notes.txt'" in said and f"'{SINGLE}'" in said
    assert contents(orbax.parent / "out") == contents(models / "child")  # our own code, not the planted file
    assert stored_bytes(orbax.parent / "out") == stored_bytes(models / "child")


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "kv_scales.json", "provenance.json"])
def test_no_link_stands_for_a_file(orbax, capsys, name):
    content = (orbax / "hf" / name).rename(orbax / f"real-{name}")
    (orbax / "hf" / name).symlink_to(content)
    assert f"hf/{name} is no regular file; put the file itself in its place" in refused(orbax, capsys)


def test_no_directory_and_no_pipe_stands_for_a_file(orbax, capsys):
    (orbax / "hf" / "sub").mkdir()
    assert "hf/sub' is a directory, but only files may be there" in refused(orbax, capsys)
    (orbax / "hf" / "sub").rmdir()
    (orbax / "hf" / "LICENSE").unlink()
    os.mkfifo(orbax / "hf" / "LICENSE")
    assert "LICENSE is no regular file" in refused(orbax, capsys)


BAD_SCALES = [
    {},
    {"k": "x"},
    {"k": [1.0] * 4},
    {"k": [1.0] * 3, "v": [1.0] * 4},
    {"k": [1.0] * 4, "v": [1.0, 2.0, 3.0, 0]},
    {"k": [1.0] * 4, "v": [1.0, 2.0, 3.0, float("nan")]},
    {"k": [1.0] * 4, "v": [1.0, 2.0, 3.0, 1e39]},
    {"k": [1.0] * 4, "v": [1.0, 2.0, 3.0, 1e-60]},
    {"k": [1.0] * 4, "v": [1.0, 2.0, 3.0, 10**400]},
    {"k": [1.0] * 4, "v": [1.0, 2.0, 3.0, True]},
    {"k": {"0": 1.0}, "v": []},
]


@pytest.mark.parametrize("scales", BAD_SCALES)
def test_scales_of_another_form(orbax, capsys, scales):
    (orbax / "hf" / "kv_scales.json").write_text(json.dumps(scales))
    message = refused(orbax, capsys)
    assert "kv_scales.json: " in message and "must be a list of 4 finite numbers above 0" in message


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "kv_scales.json"])
def test_damaged_small_files(orbax, capsys, name, content):
    (orbax / "hf" / name).write_bytes(content)
    assert name in refused(orbax, capsys)


def test_leaves_are_read_with_neighbours_as_long_as_they_are_small_together(monkeypatch):
    monkeypatch.setattr(orbax_tree, "_TOGETHER", 10)
    first, large, last = range(2), range(2, 3), range(3, 6)
    assert orbax_tree._groups([4, 6, 11, 1, 1, 1]) == [first, first, large, last, last, last]
    assert orbax_tree._groups([4, 7]) == [range(1), range(1, 2)] and orbax_tree._groups([]) == []


@pytest.mark.parametrize("together", [1 << 20, pytest.param(0, marks=pytest.mark.slow)])
def test_whatever_is_missing_or_cut_is_refused_in_one_sentence(tmp_path, capsys, monkeypatch, together):
    """Damages each parameter file in two of four ways: gone, empty, cut, or with noise in its middle.

    Noise among values goes undetected, since Orbax keeps no checksums of them.
    """
    monkeypatch.setattr(orbax_tree, "_LATE_SECONDS", 0.1)
    monkeypatch.setattr(orbax_tree, "_TOGETHER", together)
    start = write_random(tmp_path / "start", packable_config(MIXED[:1]))
    good = tmp_path / "good"
    assert main(["import", str(start), "--out", str(good)]) == 0
    kinds = {
        "gone": lambda path, data: path.unlink(),
        "empty": lambda path, data: path.write_bytes(b""),
        "cut": lambda path, data: path.write_bytes(data[: len(data) // 2]),
        "noise": lambda path, data: path.write_bytes(data[: len(data) // 2] + b"noise" + data[len(data) // 2 + 5 :]),
    }
    files = sorted(path.relative_to(good) for path in (good / "params").rglob("*") if path.is_file())
    codes = []
    for number, file in enumerate([*files, *files]):
        kind = ["gone", "cut", "empty", "noise"][(number + number // len(files)) % 4]
        place = tmp_path / f"{number}"
        victim = shutil.copytree(good, place / "orbax") / file
        kinds[kind](victim, victim.read_bytes())
        code, message = export(place / "orbax", capsys)
        codes.append(code)
        if code == 0:
            assert kind == "noise" or stored_bytes(place / "out") == stored_bytes(start), file
        else:
            assert code == 2 and message.count("\n") == 1 and not (place / "out").exists(), message
    assert 3 < codes.count(2) < len(codes)


def test_trees_that_are_not_the_models(models, tmp_path):
    params = random_params(packable_config())
    config = json.loads((models / "parent" / "config.json").read_text())

    def message(change) -> str:
        spoiled = random_params(packable_config())
        change(spoiled)
        checkpoint = Checkpoint(packable_config(), spoiled, "mxfp4", models / "parent", config)
        save_params(tmp_path / "orbax", checkpoint, {})
        with pytest.raises(CheckpointError) as caught:
            open_params(tmp_path / "orbax")
        shutil.rmtree(tmp_path / "orbax")
        return str(caught.value)

    assert "layers.2.moe.router_bias is missing" in message(lambda p: p["layers"][2]["moe"].pop("router_bias"))
    assert "layers.3.attention.k_bias is missing" in message(lambda p: p["layers"].pop())
    assert "extra is no parameter" in message(lambda p: p.update(extra=params["head"]))
    wide = np.zeros((3, 5), np.float32)
    found = message(lambda p: p.update(final_norm=wide))
    assert "final_norm has shape [3, 5], but the model needs [96]" in found
    packed = {"blocks": np.zeros((7, 96, 32), np.uint8), "scales": np.zeros((7, 96, 3), np.uint8)}
    found = message(lambda p: p["layers"][1]["moe"].update(down=packed))
    assert "layers.1.moe.down has blocks of shape [7, 96, 32] and scales of shape [7, 96, 3]" in found


def test_an_orbax_checkpoint_in_place_of_a_directory(models, capsys):
    assert main(["inspect", str(models / "orbax")]) == 2
    assert "is an Orbax checkpoint; run `puzzle convert_hf export" in capsys.readouterr().err
    assert main(["export", "--checkpoint", str(models / "orbax" / "params"), "--out", str(models / "no")]) == 2
    assert "is an Orbax tree without a config.json" in capsys.readouterr().err


def no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_cannot_be_written_is_refused_before_and_after_the_work(models, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for verb in (["import", str(models / "parent")], ["export", "--checkpoint", str(models / "parent")]):
        assert main([*verb, "--out", str(tmp_path / "file" / "out")]) == 2
        assert "file/out cannot be written: a file stands where a directory is needed" in capsys.readouterr().err
    assert main(["export", "--checkpoint", str(models / "orbax"), "--out", str(tmp_path / "file" / "out")]) == 2
    with pytest.raises(PuzzleError, match="its path holds a null character"):
        save_checkpoint(Path("a\0b"), packable_config(), {}, config_base={})
    capsys.readouterr()
    monkeypatch.setattr(Path, "write_bytes", no_space)
    assert main(["import", str(models / "parent"), "--out", str(tmp_path / "out")]) == 2
    assert "out cannot be written: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(os, "fsync", no_space)
    assert main(["export", "--checkpoint", str(models / "parent"), "--out", str(tmp_path / "out")]) == 2
    assert "out cannot be written: No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
