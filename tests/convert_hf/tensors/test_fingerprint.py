"""Checkpoints are identified by content, not by location, shards, sizes or times."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.tensors import fingerprint as module
from puzzle_jax.convert_hf.tensors.files import SINGLE, StoredTensor, open_tensors
from puzzle_jax.convert_hf.tensors.fingerprint import fingerprint_of, sampled, weights_fingerprint
from puzzle_jax.errors import CheckpointError
from puzzle_jax.evaluate.models import Model
from puzzle_jax.runs import open_run
from puzzle_jax.search.parent import read_parent, run_identity
from puzzle_jax.tasks import Chat
from tests.convert_hf.checkpoints import packable_config, write_random
from tests.paths import ROOT

TINY = ROOT / "puzzle_jax" / "assets" / "tiny"
HOURS = 3_600 * 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PUZZLE_JAX_CACHE", str(tmp_path / "cache"))
    module._kept.cache_clear()
    return tmp_path / "cache" / "fingerprints"


@pytest.fixture
def model(tmp_path) -> Path:
    return write_random(tmp_path / "model", packable_config())


def flip(directory: Path, name: str, place: int, keep_times: bool = False) -> None:
    """Changes one bit of a tensor's bytes in place."""
    stored = open_tensors(directory).tensors[name]
    times = stored.file.stat()
    with stored.file.open("r+b") as file:
        file.seek(stored.offset + place)
        byte = file.read(1)[0]
        file.seek(stored.offset + place)
        file.write(bytes([byte ^ 1]))
    if keep_times:
        os.utime(stored.file, ns=(times.st_atime_ns, times.st_mtime_ns))


def settle(monkeypatch) -> None:
    """Moves the clock on by an hour, so that the files' times tell their versions apart."""
    monkeypatch.setattr(module.time, "time_ns", lambda now=module.time.time_ns: now() + HOURS)


def test_a_copy_other_shards_and_other_keys_are_the_same_model(model, tmp_path):
    found = weights_fingerprint(model)
    assert len(found) == 32 and int(found, 16) >= 0
    assert weights_fingerprint(shutil.copytree(model, tmp_path / "copy")) == found
    assert weights_fingerprint(write_random(tmp_path / "shards", packable_config(), shard_bytes=30_000)) == found
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_version": "9"}))
    assert weights_fingerprint(model) == found


def test_other_values_and_another_function_are_another_model(model, tmp_path):
    names = ["model.norm.weight", "model.layers.3.mlp.experts.down_proj_scales", "lm_head.weight"]
    seen = {weights_fingerprint(model)}
    for name in names:
        flip(model, name, 1)
        seen.add(weights_fingerprint(model))
    config = model / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps({**data, "rope_theta": 20_000.0}))
    seen.add(weights_fingerprint(model))
    seen.add(weights_fingerprint(write_random(tmp_path / "other", packable_config(), seed=1)))
    assert len(seen) == 6


@pytest.mark.parametrize("shape", [(128, 5760, 90, 16), (201_088, 2880), (32, 2880, 90), (5, 2, 1_000_000), (300_000,)])
def test_a_large_tensors_sample_is_spread_over_all_of_it(shape):
    nbytes = int(np.prod(shape))
    blocks = sampled(StoredTensor("a", "U8", shape, Path("x"), 0, nbytes))
    starts = np.array([start for start, _ in blocks])
    assert starts[0] == 0 and sum(blocks[-1]) == nbytes and {length for _, length in blocks} == {4096}
    assert np.diff(starts).max() <= nbytes / 63 and len(blocks) >= 64
    if len(shape) > 2:
        size = nbytes // shape[0]
        assert len({start // size for start in starts}) == shape[0]


def test_of_a_large_checkpoint_every_tensor_counts(model, monkeypatch):
    monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    monkeypatch.setattr(module, "TENSOR_BYTES", 0)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 2)
    seen = {weights_fingerprint(model)}
    tensors = describe_checkpoint(model).tensors
    for name in ("model.norm.weight", "model.layers.0.mlp.experts.gate_up_proj_blocks", "model.embed_tokens.weight"):
        start, length = sampled(tensors[name])[-2]
        flip(model, name, start + length - 1)
        seen.add(weights_fingerprint(model))
    assert len(seen) == 4


def test_an_unchanged_checkpoint_is_read_once(model, cache, monkeypatch):
    first = weights_fingerprint(model)
    assert not cache.exists()  # its files are too new
    settle(monkeypatch)
    assert weights_fingerprint(model) == first and len(list(cache.iterdir())) == 1
    monkeypatch.setattr(module, "_hash", lambda description: pytest.fail("read again"))
    assert weights_fingerprint(model) == first  # from this process
    module._kept.cache_clear()
    assert weights_fingerprint(model) == first  # from the disk


def test_a_changed_checkpoint_is_read_again(model, monkeypatch):
    settle(monkeypatch)
    first = weights_fingerprint(model)
    flip(model, "model.norm.weight", 0, keep_times=True)  # same size, and its old times
    assert weights_fingerprint(model) != first
    flip(model, "model.norm.weight", 0)
    assert weights_fingerprint(model) == first


DAMAGE = [
    b"",
    b"{",
    b"[]",
    b'{"version": 1}',
    b"\xff",
    b"[" * 100_000,
    json.dumps({"version": 1, "files": [], "fingerprint": "0" * 32}).encode(),
]


@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_record_is_ignored_and_replaced(model, cache, monkeypatch, content):
    settle(monkeypatch)
    first = weights_fingerprint(model)
    (record,) = cache.iterdir()
    good = record.read_bytes()
    record.write_bytes(content)
    module._kept.cache_clear()
    assert weights_fingerprint(model) == first and record.read_bytes() == good
    spoiled = json.loads(good) | {"fingerprint": 7}
    record.write_text(json.dumps(spoiled))
    module._kept.cache_clear()
    assert weights_fingerprint(model) == first


def test_a_place_that_cannot_be_written_is_no_reason_to_stop(model, tmp_path, monkeypatch):
    settle(monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PUZZLE_JAX_CACHE", str(tmp_path / "file" / "below"))
    assert weights_fingerprint(model) == weights_fingerprint(model)


def test_a_damaged_checkpoint_has_none(model):
    (model / SINGLE).write_bytes(b"")
    with pytest.raises(CheckpointError, match="cut short"):
        weights_fingerprint(model)


@pytest.fixture
def retrained(tmp_path) -> tuple[Path, Path]:
    """The embedded parent, and a model with files of the same sizes but different values."""
    before, after = (shutil.copytree(TINY, tmp_path / name) for name in ("before", "after"))
    flip(after, "model.layers.2.self_attn.q_proj.weight", 4_000)
    assert (before / SINGLE).stat().st_size == (after / SINGLE).stat().st_size
    return before, after


def test_a_run_of_a_search_belongs_to_a_parents_content(retrained, tmp_path):
    before, after = (read_parent(path) for path in retrained)
    run = open_run(tmp_path / "run", run_identity(before))
    open_run(run, run_identity(read_parent(TINY)))  # a copy elsewhere
    with pytest.raises(Exception, match="run holds another run"):
        open_run(run, run_identity(after))


def test_evaluations_and_teachers_are_told_apart_by_content(retrained):
    """`train.distill.inputs` and `train.grpo.inputs` take the same fingerprint of their parent."""
    today = Chat.load(TINY).today
    before, after, same = (Model.open("m", path, today) for path in (*retrained, TINY))
    assert before.fingerprint == same.fingerprint != after.fingerprint
    assert fingerprint_of(before.description) != fingerprint_of(after.description)
