"""The parts of the vLLM plugin that can be tested without vLLM; `make runtimes` runs it with vLLM."""

import importlib
import subprocess
import sys
import tomllib

import pytest

from puzzle_jax.convert_hf.configuration.config_json import FAMILIES as WRITTEN
from puzzle_jax.serve_vllm import FAMILIES, VLLM_RELEASE, puzzle_architecture, puzzle_model_type, release_problem
from tests.paths import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_vllm_loads_it_without_jax():
    heavy = "{'jax', 'jaxlib', 'flax', 'numpy', 'torch', 'transformers', 'vllm'}"
    code = f"import sys, puzzle_jax.serve_vllm; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_is_declared_for_the_release_that_is_pinned():
    entry = PYPROJECT["project"]["entry-points"]["vllm.general_plugins"]["puzzle_jax"]
    module, function = entry.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert PYPROJECT["project"]["optional-dependencies"]["vllm"] == [f"vllm=={VLLM_RELEASE}.*"]


def test_it_answers_to_the_names_that_exports_carry():
    assert list(WRITTEN) == list(FAMILIES)
    for family in WRITTEN.values():
        assert puzzle_model_type(family.plain) == family.puzzle
        assert family.auto_map["AutoModelForCausalLM"].endswith(f".{puzzle_architecture(family.plain)}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_configuration_and_a_module_with_its_model(family):
    package = ROOT / "puzzle_jax" / "serve_vllm"
    assert f"class {FAMILIES[family]}PuzzleConfig(" in (package / "config.py").read_text()
    assert f"class {puzzle_architecture(family)}(" in (package / f"{family}.py").read_text()
    remote = ROOT / "puzzle_jax" / "convert_hf" / "remote"
    modeling = (remote / f"modeling_{puzzle_model_type(family)}.py").read_text()
    assert f"class {puzzle_architecture(family)}(" in modeling
    configuration = (remote / f"configuration_{puzzle_model_type(family)}.py").read_text()
    assert f'model_type = "{puzzle_model_type(family)}"' in configuration


@pytest.mark.parametrize("version", [f"{VLLM_RELEASE}.0", f"{VLLM_RELEASE}.1+cu130"])
def test_the_pinned_release_is_supported(version):
    assert release_problem(version) is None


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", f"{VLLM_RELEASE}0.1"])
def test_other_releases_are_named_in_one_sentence(version):
    problem = release_problem(version)
    assert problem is not None and version in problem and VLLM_RELEASE in problem
