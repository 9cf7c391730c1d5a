from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from puzzle_jax.codec import from_plain, read, to_plain
from puzzle_jax.errors import ConfigError, PuzzleError


@dataclass(frozen=True)
class Layer:
    count: int
    window: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count is {self.count}, but must be at least 1")


@dataclass(frozen=True)
class Model:
    name: str
    share: float
    layers: tuple[Layer, ...]
    loads: Mapping[int, Layer]
    directory: Path | None = None


MODEL = Model("a", 0.5, (Layer(7), Layer(5, 3)), {11: Layer(2)}, Path("a/b"))
PLAIN = {
    "name": "a",
    "share": 0.5,
    "layers": ({"count": 7, "window": None}, {"count": 5, "window": 3}),
    "loads": {"11": {"count": 2, "window": None}},
    "directory": "a/b",
}


def test_a_value_comes_back_from_its_json_form(tmp_path):
    assert to_plain(MODEL) == PLAIN
    assert from_plain(Model, PLAIN, "m.json") == MODEL
    (tmp_path / "m.json").write_text('{"name":"a","share":1,"layers":[],"loads":{},"a later field":[1]}')
    assert read(Model, tmp_path / "m.json") == Model("a", 1.0, (), {})
    assert to_plain({"x": np.float32(0.5), "y": np.arange(3)}) == {"x": 0.5, "y": [0, 1, 2]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": 3}, "m.json: name is a whole number, but must be a text"),
        ({"share": True}, "m.json: share is true or false, but must be a number"),
        ({"layers": {}}, "m.json: layers is an object, but must be a list"),
        ({"layers": [{"count": 1}, {}]}, "m.json: layers[1] has no field 'count'"),
        (
            {"layers": [{"count": 1, "window": "x"}]},
            "m.json: layers[0].window is a text, but must be a whole number or null",
        ),
        ({"layers": [{"count": 0}]}, "m.json: count is 0, but must be at least 1"),
        ({"loads": {"x": {"count": 1}}}, "m.json: key in loads is a text, but must be a whole number"),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_file_and_field(change, message):
    with pytest.raises(PuzzleError) as refused:
        from_plain(Model, PLAIN | change, "m.json")
    assert str(refused.value) == message


def test_another_kind_of_value_is_refused():
    with pytest.raises(ConfigError, match=r"^m\.json: the value is a list, but must be an object$"):
        from_plain(Model, [], "m.json", ConfigError)
    with pytest.raises(TypeError, match="object has no JSON form"):
        to_plain({"x": object()})
