"""Damaged checkpoints: each is refused with one sentence, in little memory, and without side effects.

The module imports no JAX, so that a separate process can go through the table without it.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.tensors.files import INDEX, SINGLE, open_tensors
from puzzle_jax.errors import CheckpointError
from tests.paths import ROOT

Damage = Callable[[Path], object]

SHARD = "model-00001-of-00001.safetensors"
BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
NORM = "model.norm.weight"
ABSENT = object()
MEMORY_LIMIT = 1_000_000_000


def config(**changes: Any) -> Damage:
    """Fields of config.json replaced; ABSENT removes one."""

    def damage(directory: Path) -> None:
        data = {**json.loads((directory / "config.json").read_text()), **changes}
        kept = {name: value for name, value in data.items() if value is not ABSENT}
        (directory / "config.json").write_text(json.dumps(kept))

    return damage


def config_text(text: bytes) -> Damage:
    return lambda directory: put(directory / "config.json", text)


def config_number(name: str, literal: str) -> Damage:
    """A number in config.json, spelled as Python would not spell it."""

    def damage(directory: Path) -> None:
        config(**{name: "HERE"})(directory)
        text = (directory / "config.json").read_text()
        (directory / "config.json").write_text(text.replace('"HERE"', literal))

    return damage


def weights(edit: Callable[[bytes], bytes]) -> Damage:
    return lambda directory: put(directory / SINGLE, edit((directory / SINGLE).read_bytes()))


def header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def length(edit: Callable[[int], int]) -> Damage:
    """Another header length in the first eight bytes."""
    return weights(lambda data: edit(header_length(data)).to_bytes(8, "little") + data[8:])


def header_text(edit: Callable[[bytes], bytes]) -> Damage:
    """Another header, with its correct length, before the same tensors."""

    def changed(data: bytes) -> bytes:
        stop = 8 + header_length(data)
        text = edit(data[8:stop])
        return len(text).to_bytes(8, "little") + text + data[stop:]

    return weights(changed)


def header(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    def changed(text: bytes) -> bytes:
        entries = json.loads(text)
        edit(entries)
        return json.dumps(entries).encode()

    return header_text(changed)


def entry(name: str = BLOCKS, **changes: Any) -> Damage:
    return header(lambda entries: entries[name].update(changes))


def offsets(edit: Callable[[int, int], list[Any]]) -> Damage:
    return header(lambda entries: entries[BLOCKS].update(data_offsets=edit(*entries[BLOCKS]["data_offsets"])))


def index(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """Weights in a shard with an index, whose map from names to files `edit` changes."""

    def damage(directory: Path) -> None:
        names = list(open_tensors(directory).tensors)
        (directory / SINGLE).rename(directory / SHARD)
        weight_map: dict[str, Any] = dict.fromkeys(names, SHARD)
        edit(weight_map)
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return damage


def names_file(file: Any) -> Damage:
    return index(lambda weight_map: weight_map.update({NORM: file}))


def index_text(text: bytes) -> Damage:
    def damage(directory: Path) -> None:
        (directory / SINGLE).rename(directory / SHARD)  # a single file would take precedence over the index
        put(directory / INDEX, text)

    return damage


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def instead(name: str, make: Callable[[Path], Any]) -> Damage:
    """Replaces a file by whatever `make` creates."""

    def damage(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        make(directory / name)

    return damage


def shard_is(make: Callable[[Path], Any]) -> Damage:
    def damage(directory: Path) -> None:
        names_file("odd.safetensors")(directory)
        make(directory / "odd.safetensors")

    return damage


class Bomb:
    """A hostile pickle, which creates a directory when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def only_pickled(directory: Path) -> None:
    (directory / SINGLE).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def cut_at(place: float, *, in_header: bool) -> Damage:
    return weights(lambda data: data[: int(place * (8 + header_length(data) if in_header else len(data)))])


PLACES = [random.Random(seed).random() for seed in range(12)]
DEEP = b"[" * 100_000
CUT = rf"{SINGLE} is cut short"
HEADER = rf"the header of {SINGLE}"
ENTRY = rf"{SINGLE} has a damaged entry for {BLOCKS}"
OUTSIDE = rf"{INDEX} names the file .*, which is outside the directory"
LAYERS = "num_hidden_layers"

CASES: dict[str, tuple[Damage, str]] = {
    **{
        f"cut at {place:.3f} of the {'header' if number < 4 else 'file'}": (cut_at(place, in_header=number < 4), CUT)
        for number, place in enumerate(PLACES)
    },
    # the header's length
    "length 0": (length(lambda _: 0), HEADER),
    "length huge": (length(lambda _: 2**63), CUT),
    "length the largest": (length(lambda _: 2**64 - 1), CUT),
    "length shorter": (length(lambda right: right - 40), HEADER),
    "length longer": (length(lambda right: right + 40), HEADER),
    # the header's text
    "header no JSON": (header_text(lambda text: b"x" + text[1:]), HEADER),
    "header a list": (header_text(lambda _: b"[1, 2]"), HEADER + " is no JSON object"),
    "header deep": (header_text(lambda _: DEEP), HEADER + " is nested too deeply"),
    "header no UTF-8": (header_text(lambda text: text.replace(b"norm", b"n\xffrm", 1)), HEADER),
    "header gives a name twice": (
        header_text(lambda text: text.rstrip()[:-1] + b', "' + NORM.encode() + b'": {}}'),
        HEADER + f" gives '{NORM}' twice",
    ),
    "header gives the last of many names twice": (
        header_text(lambda _: b"{" + b", ".join(b'"%d": 0' % n for n in [*range(60_000), 59_999]) + b"}"),
        HEADER + " gives '59999' twice",
    ),
    "header larger than any": (
        header_text(lambda _: b"[" + b"[]," * 8_000_000 + b"0]"),
        rf"{SINGLE} .*no safetensors file",
    ),
    # the header's entries
    "entry a list": (header(lambda entries: entries.update({BLOCKS: [1]})), ENTRY),
    "entry empty": (header(lambda entries: entries.update({BLOCKS: {}})), ENTRY),
    "name of two lines": (
        header(lambda entries: entries.update({"a\nb": entries.pop(BLOCKS)})),
        rf"{SINGLE} has a damaged entry for 'a\\nb'",
    ),
    "name of half a character": (
        header(lambda entries: entries.update({"\ud800": entries.pop(BLOCKS)})),
        HEADER + " holds half a surrogate pair",
    ),
    "offsets overlap": (
        header(lambda entries: entries[NORM].update(data_offsets=[0, 192])),
        rf"{SINGLE} gives \S+ and \S+ the same bytes",
    ),
    "offsets beyond the end": (offsets(lambda start, stop: [start + 10**9, stop + 10**9]), CUT),
    "offsets beyond all numbers": (offsets(lambda start, stop: [start + 10**4000, stop + 10**4000]), ENTRY),
    "offsets reversed": (offsets(lambda start, stop: [stop, start]), ENTRY),
    "offsets negative": (offsets(lambda start, stop: [start - stop, 0]), ENTRY),
    "offsets floats": (offsets(lambda start, stop: [float(start), float(stop)]), ENTRY),
    "offsets strings": (offsets(lambda start, stop: [str(start), str(stop)]), ENTRY),
    "offsets three": (offsets(lambda start, stop: [start, stop, stop]), ENTRY),
    "offsets too near": (offsets(lambda start, stop: [start, stop - 1]), rf"{SINGLE} gives {BLOCKS} \d+ bytes"),
    "dtype unknown": (entry(dtype="Q4\n"), rf"{SINGLE} stores {BLOCKS} as 'Q4\\n', which is no known type"),
    "dtype a list": (entry(dtype=["U8"]), ENTRY),
    "dtype wrong": (entry(dtype="I8"), rf"{SINGLE}: {BLOCKS} is stored as I8, but must be U8"),
    "shape a number": (entry(shape=3), ENTRY),
    "shape negative": (entry(shape=[-7, -96, 2, 16]), ENTRY),
    "shape without end": (entry(shape=[2**62] * 200_000), ENTRY),
    "shape wrong": (entry(shape=[7, 2, 96, 16]), rf"{SINGLE}: {BLOCKS} has shape \[7, 2, 96, 16\]"),
    "layer number without end": (
        header(lambda e: e.update({f"model.layers.{'9' * 440}.self_attn.k_scale": e.pop(NORM)})),
        rf"{NORM} is missing",
    ),
    # the index
    "index no JSON": (index_text(b"{"), rf"{INDEX} cannot be read as JSON"),
    "index deep": (index_text(DEEP), rf"{INDEX} is nested too deeply"),
    "index a list": (index_text(b"[]"), rf"{INDEX} holds a JSON list"),
    "index without map": (index_text(b'{"metadata": {}}'), rf"{INDEX} has no weight_map"),
    "index map a list": (index_text(b'{"weight_map": ["a"]}'), rf"{INDEX} has no weight_map"),
    "index map to a number": (names_file(7), rf"{INDEX} maps {NORM} to 7, but must name a file"),
    "index map to deep lists": (
        index_text(b'{"weight_map": {"a": ' + b"[" * 800 + b"]" * 800 + b"}}"),
        rf"{INDEX} maps a to \[\[.*, but must name a file",
    ),
    "index lacks a tensor": (index(lambda weight_map: weight_map.pop(NORM)), rf"{NORM} is missing"),
    "index names a stranger": (
        index(lambda weight_map: weight_map.update(stranger=SHARD)),
        rf"{INDEX} lists stranger in {SHARD}, which does not hold it",
    ),
    "index names two lines": (
        index(lambda weight_map: weight_map.update({"a\nb": SHARD})),
        rf"{INDEX} maps 'a\\nb', which is no tensor's name",
    ),
    "index leads up": (names_file("../model.safetensors"), OUTSIDE),
    "index leads to the parent": (names_file(".."), OUTSIDE),
    "index leads to the root": (names_file("/etc/passwd"), OUTSIDE),
    "index leads down": (names_file(f"sub/{SHARD}"), OUTSIDE),
    "index leads nowhere": (names_file(""), OUTSIDE),
    "index leads to a nul": (names_file("a\0b"), OUTSIDE),
    "index leads to half a character": (names_file("\ud800"), rf"{INDEX} holds half a"),
    "index names an absent file": (names_file("gone"), r"gone cannot be read \(No such file or directory\)"),
    "shard a directory": (shard_is(Path.mkdir), r"odd.safetensors cannot be read \(it is no regular file\)"),
    "shard a pipe": (shard_is(os.mkfifo), r"odd.safetensors cannot be read \(it is no regular file\)"),
    "shard a device": (shard_is(lambda path: path.symlink_to("/dev/zero")), r"odd.safetensors cannot be read"),
    "weights a directory": (instead(SINGLE, Path.mkdir), rf"holds neither {SINGLE} nor {INDEX}"),
    "weights a pipe": (instead(SINGLE, os.mkfifo), rf"holds neither {SINGLE} nor {INDEX}"),
    "weights pickled": (only_pickled, rf"holds neither {SINGLE} nor {INDEX}, but pickled weights \(pytorch_model.bin"),
    "shards without index": (
        lambda directory: (directory / SINGLE).rename(directory / SHARD),
        rf"holds {SHARD}, but no {INDEX}",
    ),
    # config.json
    "config absent": (lambda directory: (directory / "config.json").unlink(), r"config.json cannot be read"),
    "config a directory": (instead("config.json", Path.mkdir), r"config.json cannot be read: it is no regular file"),
    "config a pipe": (instead("config.json", os.mkfifo), r"config.json cannot be read: it is no regular file"),
    "config no JSON": (config_text(b"{'a': 1}"), r"config.json cannot be read as JSON"),
    "config no UTF-8": (config_text(b'{"a": "\xff"}'), r"config.json is not valid UTF-8"),
    "config empty": (config_text(b""), r"config.json cannot be read as JSON"),
    "config a list": (config_text(b"[]"), r"config.json holds a JSON list"),
    "config deep": (config_text(DEEP), r"config.json is nested too deeply"),
    "config larger than any": (config_text(b"[" + b"[]," * 8_000_000 + b"0]"), r"config.json is no such file"),
    "config of no fields": (config_text(b"{}"), r"config.json: model_type is missing"),
    "field missing": (config(hidden_size=ABSENT), r"config.json: hidden_size is missing"),
    "field a string": (config(hidden_size="96"), r"config.json: hidden_size is '96', but must be a whole number"),
    "field a boolean": (config(vocab_size=True), r"config.json: vocab_size is True, but"),
    "field a float": (config(head_dim=10.0), r"config.json: head_dim is 10.0, but"),
    "field negative": (config(num_attention_heads=-6), r"config.json: num_attention_heads is -6, but"),
    "field NaN": (config_number("rms_norm_eps", "NaN"), r"config.json: rms_norm_eps is nan, but must be a number"),
    "field Infinity": (config_number("swiglu_limit", "Infinity"), r"config.json: swiglu_limit is inf, but"),
    "field 1e999": (config_number("vocab_size", "1e999"), r"config.json: vocab_size is inf, but"),
    "field of 400 digits": (
        config(rope_theta=10**400),
        r"config.json: rope_theta is 10+\.\.\.0+, but must be a number",
    ),
    "field of 5000 digits": (
        config_number("vocab_size", "9" * 5000),
        r"config.json holds a whole number of thousands of digits",
    ),
    "text of half a character": (config(note="\ud800"), r"config.json holds half a surrogate"),
    "rotary base huge": (config(rope_theta=1e300), r"config.json: rope_theta is 1e\+300, but must be a number from"),
    "stop id beyond": (config(eos_token_id=[3, 97]), r"eos_token_id is \[3, 97\], but the model's tokens are 0 to 96"),
    "pad id negative": (config(pad_token_id=-1), r"pad_token_id is -1, but the model's tokens are 0 to 96"),
    "pad id a text": (config(pad_token_id="0"), r"pad_token_id is '0', but the model's tokens are 0 to 96"),
    "field of deep lists": (
        config_number("vocab_size", "[" * 800 + "]" * 800),
        r"config.json: vocab_size is \[\[.*, but must be a whole number",
    ),
    "layers without end": (config(**{LAYERS: 10**12, "layer_types": ABSENT}), rf"config.json: {LAYERS} is 10+, but"),
    "layers many": (config(**{LAYERS: 100, "layer_types": ABSENT}), r"is missing; .* more problems$"),
    "sizes without end": (config(hidden_size=10**30), r"config.json: hidden_size is 10+, but .*at most 2147483647"),
    "sizes large": (config(hidden_size=2**30), r"config.json asks for \[97, 1073741824\]"),
    "experts without end": (config(num_local_experts=10**9), r"config.json: num_local_experts is 10+, but"),
    "experts more": (config(num_local_experts=8), r"has shape \[7, 128, 3, 16\], but config.json asks for \[8,"),
    "experts per token too many": (config(num_experts_per_tok=9, experts_per_token=9), r"config.json: layer 0 has"),
    "layer types too few": (config(layer_types=["full_attention"] * 3), r"config.json: layer_types is .*4 layers"),
    "layer types unknown": (config(layer_types=[{}] * 4), r"config.json: layer_types\[0\] is {}, but"),
    "window negative": (config(sliding_window=-5), r"config.json: sliding_window is -5, but"),
    "blocks of numbers": (config(model_type="gpt_oss_puzzle", block_configs=[1] * 4), r"block_configs\[0\] is 1, but"),
    "model unknown": (config(model_type="llama\n"), r"config.json: model_type is 'llama\\n', but only gpt_oss"),
    "rope a list": (config(rope_scaling=[]), r"config.json: rope_scaling is \[\], but must be an object"),
    "quantization unknown": (config(quantization_config={"quant_method": "awq"}), r"quant_method is 'awq', but only"),
    "quantization a string": (config(quantization_config="mxfp4"), r"config.json: quantization_config is 'mxfp4', but"),
}


def refusal(good: Path, directory: Path, damage: Damage, read: Callable[[Path], object]) -> str:
    """The message that refuses a damaged copy; checks that reading it creates no files."""
    shutil.copytree(good, directory)
    damage(directory)
    before = sorted(directory.parent.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        read(directory)
    assert caught.type is CheckpointError
    assert sorted(directory.parent.rglob("*")) == before
    message = str(caught.value)
    assert message.isprintable() and len(message) < 4000 and str(directory) in message
    return message


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    from tests.convert_hf.checkpoints import packable_config, write_random

    return write_random(tmp_path_factory.mktemp("good") / "model", packable_config())


@pytest.mark.parametrize("damage, words", CASES.values(), ids=CASES.keys())
def test_damage_is_refused_in_one_sentence(good, tmp_path, monkeypatch, damage, words):
    monkeypatch.chdir(tmp_path)
    assert re.search(words, refusal(good, tmp_path / "model", damage, describe_checkpoint))


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_scale_that_is_no_number_is_refused_when_read(good, tmp_path, name):
    from puzzle_jax.convert_hf.load import load_checkpoint

    def damage(directory: Path) -> None:
        stored = open_tensors(directory).tensors[f"model.layers.2.mlp.experts.{name}_scales"]
        with (directory / SINGLE).open("r+b") as file:
            file.seek(stored.offset + stored.nbytes // 2)
            file.write(b"\xff")

    message = refusal(good, tmp_path / "model", damage, load_checkpoint)
    assert f"{name}_scales holds the scale 255, which is no number" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_a_cache_scale_that_is_no_scale_is_refused_once(good, tmp_path, value):
    name = "model.layers.0.self_attn.k_scale"

    def damage(directory: Path) -> None:
        end = max(stored.offset + stored.nbytes for stored in open_tensors(directory).tensors.values())
        start = end - 8 - header_length((directory / SINGLE).read_bytes())
        added = {"dtype": "F32", "shape": [], "data_offsets": [start, start + 4]}
        header(lambda entries: entries.update({name: added}))(directory)
        weights(lambda data: data + np.float32(value).tobytes())(directory)

    message = refusal(good, tmp_path / "model", damage, describe_checkpoint)
    assert message.endswith(f"cannot be used: {name} is {value}, but a scale must be above 0 and finite")


ALL_CASES = """
import sys
from pathlib import Path
import puzzle_jax.convert_hf.describe
assert "jax" not in sys.modules
from tests.convert_hf.test_damage import ABSENT, CASES, LAYERS, config, describe_checkpoint, refusal
good, place = map(Path, sys.argv[1:])
for number, (damage, _) in enumerate(CASES.values()):
    refusal(good, place / str(number) / "model", damage, describe_checkpoint)
most = config(**{LAYERS: 10_000, "layer_types": ABSENT})  # slow where types are checked
refusal(good, place / "most" / "model", most, describe_checkpoint)
assert "jax" not in sys.modules
peak, = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak)
"""


def test_all_damage_in_one_process_without_jax_and_in_little_memory(good, tmp_path):
    """The peak is the kernel's VmHWM of the process; getrusage would include the process that started it."""
    root = ROOT
    command = [sys.executable, "-c", ALL_CASES, str(good), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < MEMORY_LIMIT
    assert not (tmp_path / "exploded").exists()
