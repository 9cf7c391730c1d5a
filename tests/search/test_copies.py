"""The files of the primary's run directory that the other processes of a search receive; messages go through a list."""

import json
from pathlib import Path

import pytest

from puzzle_jax.search import copies as module
from puzzle_jax.search.copies import Copies


@pytest.fixture
def messages(monkeypatch) -> list:
    """Messages that the primary process has sent and the other one has not received yet."""
    said: list = []

    def say(value):
        said.append(value)
        return value

    monkeypatch.setattr(module, "decided", lambda work: say(json.loads(json.dumps(work()))))
    monkeypatch.setattr(module, "published", lambda work: say(work()))
    return said


def test_files_are_sent_when_they_have_changed(tmp_path, messages, monkeypatch):
    run, copy = tmp_path / "run", tmp_path / "copy"
    copy.mkdir()
    primary, other = Copies(run), Copies(copy)

    def sent(kept: str) -> tuple[list[str], Path | None]:
        """Names of the files that were sent in one stage, and what the other process then finds."""
        primary.send(run / kept)
        names = messages[0]["new"]
        with monkeypatch.context() as hearing:
            hearing.setattr(module, "decided", lambda _: messages.pop(0))
            hearing.setattr(module, "published", lambda _: messages.pop(0))
            found = other.receive()
        assert not messages
        return names, found

    write(run / "traces/calibration.parquet", b"\0answers")
    write(run / "score-book.safetensors", b"")
    write(run / "child/model.safetensors", b"large")
    write(run / ".rank.kept-1/sums.safetensors", b"sums")
    assert sent(".rank.kept-1") == (
        ["traces/calibration.parquet", "score-book.safetensors", ".rank.kept-1/sums.safetensors"],
        copy / ".rank.kept-1",
    )
    assert files(copy) == {
        "traces/calibration.parquet": b"\0answers",
        "score-book.safetensors": b"",
        ".rank.kept-1/sums.safetensors": b"sums",
    }
    write(run / "score-book.safetensors", b"scores")
    (run / "traces/calibration.parquet").unlink()
    assert sent(".score.kept-2") == (["score-book.safetensors"], copy / ".score.kept-2")
    assert files(copy) == {"score-book.safetensors": b"scores"}
    assert sent(".solve.kept-3") == ([], copy / ".solve.kept-3")
    primary.skip()
    monkeypatch.setattr(module, "decided", lambda _: messages.pop(0))
    assert other.receive() is None


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
