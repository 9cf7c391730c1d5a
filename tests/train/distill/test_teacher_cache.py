"""A cached top k matches the teacher, and caches of other runs or damaged ones are refused."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from puzzle_jax.errors import PuzzleError
from puzzle_jax.train.distill import teacher_cache
from puzzle_jax.train.distill.objectives import Distillation, Fixed, LossSettings
from puzzle_jax.train.distill.teacher_cache import make_cache, open_cache
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.rows import Example, packed
from puzzle_jax.train.student import Student
from tests.support import of_type
from tests.train import toy_student as toy
from tests.train.toy_student import CHILD, LENGTH, PAD, close, jit, random_master_weights

VOCAB, TEMPERATURE = 98, 2.0
IDENTITY = {"parent": {"model.safetensors": 1234}, "k": VOCAB, "temperature": TEMPERATURE}
STUDENT = Student(CHILD)
COUNTED = 5 + 8 + 14 + 1 + 0  # tokens of the examples' answers


def make(directory, examples=None, base=None, **changes):
    settings = {"k": VOCAB, "temperature": TEMPERATURE, "rows": 2, "length": LENGTH, "pad_id": PAD}
    return make_cache(
        directory,
        toy.examples() if examples is None else examples,
        STUDENT,
        base or {},
        Placement(),
        Console(file=io.StringIO()),
        **{**settings, "identity": IDENTITY, **changes},
    )


@pytest.fixture(scope="module")
def parent():
    params = toy.dense(toy.packed_params())
    return params, STUDENT.stacked(params)


@pytest.fixture(scope="module")
def made(parent, tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher") / "cache"
    return directory, make(directory, base=parent[1])


@pytest.fixture
def copy(made, tmp_path):
    """A cache to damage."""
    return shutil.copytree(made[0], tmp_path / "copy")


def test_it_holds_what_the_teacher_says(parent, made):
    """It has every position before a token of an answer; rows go in batches of two, the last of which is not full."""
    directory, cache = made
    assert sorted(path.name for path in directory.parent.iterdir()) == ["cache"]
    assert cache.ids.shape == cache.logits.shape == (COUNTED, VOCAB) and cache.log_total.shape == (COUNTED,)
    (batch,) = packed(toy.examples(), rows=4, length=LENGTH, pad_id=PAD, extras=cache.extras)
    live = batch.weights > 0
    assert live.sum() == COUNTED
    x = toy.TEACHER_STATES(parent[0], batch._replace(extras={}))[-1]
    logits = np.asarray(toy.logits(parent[0], x), np.float64)[live]
    below = logits - logits.max(-1, keepdims=True)
    ids, cached = batch.extras["teacher_ids"][live], batch.extras["teacher_logits"][live]
    np.testing.assert_array_equal(np.sort(ids), np.tile(np.arange(VOCAB), (COUNTED, 1)))
    np.testing.assert_allclose(cached, np.take_along_axis(below, ids, -1), rtol=1e-3, atol=1e-4)
    assert (np.diff(cached.astype(np.float32)) <= 0).all() and (cached[:, 0] == 0).all()
    total = np.log(np.exp(below / TEMPERATURE).sum(-1))
    np.testing.assert_allclose(batch.extras["teacher_log_total"][live], total, rtol=1e-5)
    for values in batch.extras.values():
        assert not values[~live].any()


def test_with_the_whole_vocabulary_it_is_the_forward_kl(parent, made):
    _, base = parent
    (batch,) = packed(toy.examples(), rows=4, length=LENGTH, pad_id=PAD, extras=made[1].extras)
    settings = LossSettings(forward_kl=1.0, top_k_kl=1.0, temperature=TEMPERATURE)
    loss = jit(Distillation(STUDENT, settings))(random_master_weights(STUDENT, base), Fixed(base), batch)
    assert float(loss.terms["forward_kl"]) > 1.0
    close(loss.terms["top_k_kl"], loss.terms["forward_kl"], 2e-3)  # logits were rounded to 11 bits


def test_it_is_there_for_the_next_run(made):
    directory, cache = made
    again = open_cache(directory, toy.examples(), dict(IDENTITY))
    assert isinstance(again.logits, np.memmap)
    jax.tree.map(np.testing.assert_array_equal, tuple(again), tuple(cache))
    assert again.extras(4)["teacher_ids"].shape == (6, VOCAB)  # an example without an answer


def changed_example():
    *others, last = toy.examples()
    return [*others, Example(of_type(np.ndarray, last.tokens)[::-1].copy(), last.prompt_length)]


@pytest.mark.parametrize(
    "examples,changes,name",
    [
        (toy.examples()[::-1], {}, "examples"),
        (toy.examples()[:-1], {}, "examples"),
        (changed_example(), {}, "examples"),
        ([*toy.examples()[:-1], Example(toy.examples()[-1].tokens, 5)], {}, "examples"),
        (toy.examples(), {"temperature": 1.0}, "temperature is 2.0, but here it is 1.0"),
        (toy.examples(), {"k": 64}, "k is 98, but here it is 64"),
        (toy.examples(), {"parent": {"model.safetensors": 1235}}, "parent"),
    ],
)
def test_the_cache_of_another_run_is_refused(made, examples, changes, name):
    with pytest.raises(PuzzleError, match=rf"holds the cache of another run \({name}.*; name another directory") as e:
        open_cache(made[0], examples, IDENTITY | changes)
    assert "\n" not in str(e.value)


def shorter(directory):
    np.save(directory / "log_total.npy", np.zeros(COUNTED - 1, np.float32))


DAMAGE = {
    "no file": (lambda d: (d / "ids.npy").unlink(), "ids.npy cannot be read"),
    "empty": (lambda d: (d / "logits.npy").write_bytes(b""), "logits.npy cannot be read"),
    "half": (lambda d: (d / "ids.npy").write_bytes((d / "ids.npy").read_bytes()[:5000]), "ids.npy cannot be read"),
    "no array": (lambda d: (d / "ids.npy").write_bytes(b"PK\x03\x04 broken"), "ids.npy cannot be read"),
    "an archive": (lambda d: np.savez((d / "ids.npy").open("wb"), a=np.zeros(3)), "ids.npy is damaged: .* of int32"),
    "one number": (lambda d: np.save(d / "ids.npy", np.int32(3)), "ids.npy is damaged: .* no rows of int32"),
    "dtype": (lambda d: np.save(d / "logits.npy", np.zeros((28, 98))), "logits.npy is damaged: .* of float16"),
    "positions": (shorter, r"log_total.npy is damaged: it has shape \(27,\) in place of \(28,\)"),
    "k": (
        lambda d: np.save(d / "logits.npy", np.zeros((28, 97), np.float16)),
        r"logits.npy is damaged: it has shape \(28, 97\) in place of \(28, 98\)",
    ),
    "record": (lambda d: (d / "cache.json").write_text("{"), "cache.json cannot be read"),
    "no record": (lambda d: (d / "cache.json").unlink(), "cache.json cannot be read"),
    "other record": (lambda d: (d / "cache.json").write_text("{}"), r"another run \(parent is None"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(copy, name):
    damage, message = DAMAGE[name]
    damage(copy)
    with pytest.raises(PuzzleError, match=message):
        open_cache(copy, toy.examples(), IDENTITY)


def nothing_known(student, base, batch, *, k, temperature):
    """Stands in for a teacher."""
    shape = batch.tokens.shape
    return jax.numpy.zeros((*shape, k), int), jax.numpy.zeros((*shape, k)), jax.numpy.ones(shape)


@pytest.mark.parametrize("end", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_dies_leaves_nothing(monkeypatch, tmp_path, end):
    def dying(*args, **options):
        batches = packed(*args, **options)
        yield next(batches)
        assert (tmp_path / "of").is_dir() and any((tmp_path / "of").iterdir())  # part of the cache is written
        raise end

    monkeypatch.setattr(teacher_cache, "top_k", nothing_known)
    with monkeypatch.context() as patched, pytest.raises(end):
        patched.setattr(teacher_cache, "packed", dying)
        make(tmp_path / "of" / "cache", k=3)
    assert not any((tmp_path / "of").iterdir())
    # Nothing blocks the next run; an empty directory does not either.
    (tmp_path / "of" / "cache").mkdir()
    cache = make(tmp_path / "of" / "cache", k=3)
    assert cache.ids.shape == (COUNTED, 3) and (cache.log_total == 1).all()
    record = json.loads((tmp_path / "of" / "cache" / "cache.json").read_text())
    assert record["temperature"] == TEMPERATURE and len(record["examples"]) == 16


@pytest.mark.parametrize("examples,message", [([], "no trace"), (None, "example 2 has 24 tokens, but a row has 20")])
def test_examples_that_cannot_be_asked_are_refused(tmp_path, examples, message):
    with pytest.raises(PuzzleError, match=message):
        make(tmp_path / "cache", examples, length=20)
    assert not any(tmp_path.iterdir())
