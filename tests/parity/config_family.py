"""A family's config.json, read here and in transformers, written again, and compared: shared by the families' tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.configuration.config_json import write_config
from puzzle_jax.convert_hf.describe import read_config
from puzzle_jax.errors import CheckpointError

ABSENT = object()
_FLOAT32 = ("frequencies", "magnitude")  # computed in float32 by transformers


@dataclass(frozen=True)
class ConfigFamily:
    """One family's configurations.

    Attributes:
      model_type: its name in config.json.
      base: a whole config.json.
      theirs: the values that transformers reads in a directory, or None where it fails to load the configuration.
      ours: the same values of a configuration that was read here.
    """

    model_type: str
    base: Mapping[str, Any]
    theirs: Callable[[Path], dict[str, Any] | None]
    ours: Callable[[ModelConfig], dict[str, Any]]

    def written(self, directory: Path, *changes: Mapping[str, Any]) -> Path:
        """A directory with a config.json; later changes override earlier ones, and `ABSENT` leaves a field out."""
        directory.mkdir()
        data = {name: value for change in (self.base, *changes) for name, value in change.items()}
        kept = {name: value for name, value in data.items() if value is not ABSENT}
        (directory / "config.json").write_text(json.dumps(kept))
        return directory

    def check(self, directory: Path) -> bool:
        """Returns whether it is read; fails where it is read as another model than transformers reads."""
        try:
            config = read_config(directory)
        except CheckpointError as error:
            assert str(error).startswith(f"{directory}/config.json: ") and "\n" not in str(error)
            return False
        expected = self.theirs(directory)
        if expected is None:
            return True
        _compare(self.ours(config), expected)
        # The exported configuration is the same model in transformers.
        again = directory / "again"
        again.mkdir()
        written = write_config(config, json.loads((directory / "config.json").read_text()))
        (again / "config.json").write_text(json.dumps(written))
        assert read_config(again) == config
        if written["model_type"] == self.model_type:
            exported = self.theirs(again)
            assert exported is not None
            _compare(exported, expected)
        return True


def _compare(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if name in _FLOAT32:
            np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)
        else:
            assert found[name] == value, name
