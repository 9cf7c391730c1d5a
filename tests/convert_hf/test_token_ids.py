"""Ids beyond the vocabulary, for which JAX would return the last row of the embedding, are refused."""

import json
import shutil
from pathlib import Path

import pytest

from puzzle_jax.convert_hf.token_ids import check_ids, check_tokenizer
from puzzle_jax.errors import CheckpointError
from puzzle_jax.evaluate.models import Model
from puzzle_jax.search.parent import read_parent
from puzzle_jax.tasks import Chat
from tests.paths import ROOT

TINY = ROOT / "puzzle_jax" / "assets" / "tiny"


@pytest.fixture
def tiny(tmp_path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model")


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("value", [None, 0, 96, [0, 96], []])
def test_ids_of_the_vocabulary(value):
    check_ids({"eos_token_id": value, "other": 1000}, Path("config.json"), 97)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [97, -1, [3, 97], 1.0, "3", True, [[3]], {}, 10**400])
def test_ids_beyond_it(name, value):
    with pytest.raises(CheckpointError, match=rf"^config\.json: {name} is .+, but the model's tokens are 0 to 96$"):
        check_ids({name: value}, Path("config.json"), 97)


def test_a_tokenizer_with_tokens_that_the_model_lacks(tiny):
    def add(data) -> None:
        token = dict(data["added_tokens"][-1])
        first = len(data["model"]["vocab"])
        data["added_tokens"] += [{**token, "id": n, "content": f"<|new {n}|>"} for n in range(first, 131)]

    edit(tiny / "tokenizer.json", add)
    tokenizer = Chat.load(tiny).tokenizer
    message = r"tokenizer\.json has 3 tokens beyond the model's vocabulary of 128, the last '<\|new 130\|>' with id 130"
    with pytest.raises(CheckpointError, match=message):
        check_tokenizer(tiny, tokenizer, 128)
    check_tokenizer(tiny, tokenizer, 131)
    with pytest.raises(CheckpointError, match=message):
        read_parent(tiny)
    with pytest.raises(CheckpointError, match="model 'mine': .*" + message):
        Model.open("mine", tiny, Chat.load(tiny).today)


def test_stop_ids_for_generation_that_the_model_lacks(tiny):
    edit(tiny / "generation_config.json", lambda data: data.update(pad_token_id=128))
    message = r"generation_config\.json: pad_token_id is 128, but must be a token id from 0 to 127"
    with pytest.raises(CheckpointError, match=message):
        read_parent(tiny)


def test_the_embedded_parent(tiny):
    check_tokenizer(tiny, Chat.load(tiny).tokenizer, 128)
