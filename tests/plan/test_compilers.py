"""The choice of the compiler for plans, and the facts about GPUs that are not present."""

import importlib.machinery
import warnings

import jax
import jax.numpy as jnp
import pytest

from puzzle_jax.errors import ConfigError, PuzzleWarning
from puzzle_jax.kernels.platform import is_hopper, target_platform
from puzzle_jax.model.sharding import make_mesh
from puzzle_jax.plan import compilers
from puzzle_jax.plan.__main__ import main
from puzzle_jax.plan.abstract import kernel_shapes
from puzzle_jax.plan.compilers import Compiler, GpuCompiler, compiler, compiler_named, gpu_targets
from tests.paths import ROOT

TARGETS = {
    "NVIDIA H100 80GB HBM3": "gpu_device_info {\n cuda_compute_capability {\n  major: 9\n }\n}\n"
    'device_description_str: "NVIDIA H100 80GB HBM3"',
    "NVIDIA B200": "gpu_device_info {\n cuda_compute_capability {\n  major: 10\n  minor: 3\n }\n}\n"
    'device_description_str: "NVIDIA B200"',
}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A plugin's library with descriptions between other bytes."""
    package = tmp_path / "xla_cuda13"
    package.mkdir()
    texts = [b"\x7fELF gpu_device", *(text.encode() for text in TARGETS.values()), b"gpu_device_info {no name}"]
    (package / "xla_cuda_plugin.so").write_bytes(b"\0\1".join(texts) + b"\0")
    spec = importlib.machinery.ModuleSpec("jax_plugins.xla_cuda13", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(compilers, "find_spec", lambda name: spec if name.endswith("13") else None)
    gpu_targets.cache_clear()
    yield
    gpu_targets.cache_clear()


@pytest.fixture
def no_plugin(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(compilers, "find_spec", missing)
    gpu_targets.cache_clear()
    yield
    gpu_targets.cache_clear()


def test_descriptions_are_found_in_the_plugins_library(plugin):
    assert gpu_targets() == TARGETS
    found = compiler_named("gpu", "b200")
    assert isinstance(found, GpuCompiler) and found.target == TARGETS["NVIDIA B200"]
    assert found.capability == "10.3" and GpuCompiler(gpu="h100").capability == "9.0"
    assert found.dtype == jnp.bfloat16 and not found.stand_ins
    assert found.about == f"compiled by XLA for NVIDIA B200 (JAX {jax.__version__}), with the kernels that serve there"


def test_within_a_compiler_kernels_are_those_of_its_gpu(plugin):
    assert compiler() == Compiler() and compiler().dtype == jnp.float16 and compiler().devices(3) is None
    for gpu, hopper in (("h100", True), ("b200", False)):
        with GpuCompiler(gpu=gpu).in_force(), kernel_shapes():
            assert (target_platform(), is_hopper()) == ("gpu", hopper)
            assert compiler().about.startswith(f"compiled by XLA for {compilers.GPUS[gpu]} ")
            assert "kernel_shapes" not in compilers_of_mixtures()
    with kernel_shapes():
        assert compilers_of_mixtures()[0] == "kernel_shapes"
    assert target_platform() == "cpu" and compiler() == Compiler()


def compilers_of_mixtures():
    from puzzle_jax.kernels.expert_mlp import IMPLEMENTATIONS

    return list(IMPLEMENTATIONS)


def test_without_a_plugin_xla_for_cpus_stands_in_and_says_so(no_plugin):
    with pytest.warns(PuzzleWarning, match=r"no CUDA plugin .* NVIDIA H200 141GB HBM3e .* XLA for CPUs compiles"):
        assert compiler_named("gpu", "h200") == Compiler()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler_named("cpu", "l4") == Compiler()


@pytest.mark.parametrize(
    "name,hardware,message",
    [
        ("tpu", None, "compiler is 'tpu', but must be one of cpu, gpu"),
        ("gpu", "tpu-v5e", r"hardware \(with compiler gpu\) is 'tpu-v5e', but must be one of a100, h100, h200, b200"),
    ],
)
def test_what_is_not_known_is_refused(no_plugin, name, hardware, message):
    with pytest.raises(ConfigError, match=message):
        compiler_named(name, hardware)


def test_the_command_takes_it(no_plugin, capsys):
    config = str(ROOT / "benchmarks/published/gpt-oss-20b.json")
    given = [
        "search",
        "--parent",
        config,
        "--traces.max_tokens",
        "high=8",
        "--hardware",
        "tpu-v5e",
        "--compiler",
        "gpu",
    ]
    assert main(given) == 2
    assert "hardware (with compiler gpu) is 'tpu-v5e'" in capsys.readouterr().err


def test_meshes_are_made_of_the_devices_that_are_given():
    devices = jax.devices()[2:6]
    assert list(make_mesh(2, 2, devices).devices.flat) == devices
