"""Parents in Qwen3-MoE's shape, written once for each file of tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert_hf.qwen import STORAGES, write_qwen


@pytest.fixture(scope="module", params=STORAGES)
def parent(request, tmp_path_factory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("models") / "parent", storage=request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("models") / "fp8", storage="fp8")
