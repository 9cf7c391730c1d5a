"""`puzzle doctor` prints what is present and which implementations are chosen."""

import json
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from puzzle_jax.doctor import operations
from puzzle_jax.doctor.__main__ import main
from puzzle_jax.kernels import self_check
from puzzle_jax.kernels.dispatch import recording
from puzzle_jax.kernels.self_check import Verdict
from puzzle_jax.kernels.window_attention import window_attention
from puzzle_jax.search.recipe import EMBEDDED_PARENT

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def verdicts(tmp_path, monkeypatch):
    path = tmp_path / "kernels.json"
    monkeypatch.setenv("PUZZLE_KERNEL_VERDICTS", str(path))
    monkeypatch.delenv("PUZZLE_KERNELS", raising=False)
    return path


def test_it_says_what_is_installed_present_and_chosen(capsys, verdicts, monkeypatch):
    self_check._write("mul kernel small", Verdict("", 0.01, 0.02, {"forwards": 3.0}, {"forwards": 4.0}))
    self_check._write("mul kernel large", Verdict("it does not run here: no"))
    assert main([]) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert f"python {platform.python_version()}" in lines and f"jax {jax.__version__}" in lines
    assert "PUZZLE_KERNELS auto" in lines and f"verdicts on kernels {verdicts}" in lines
    assert f"device 0: {jax.devices()[0].device_kind}, cpu" in lines
    at = lines.index("experts, float32, 4,096 tokens sorted_blocks")
    assert lines[at + 2] == "capacity: 8192 pairs are many for 16 experts"
    assert "attention, 4,096 tokens, window 16 banded" in lines
    kernels = "mosaic_gpu_wide (GPU), mosaic_gpu_fused (GPU), mosaic_gpu (GPU), mosaic_tpu (TPU), splash (TPU)"
    assert f"for other devices: {kernels}" in lines and "by name only: tokamax, dew_flash_attn" in lines
    assert "mul kernel small: error 1.0e-02 where XLA has 2.0e-02; 0.75 of XLA's time forwards" in lines
    assert "mul kernel large: left out: it does not run here: no" in lines


def test_its_json_says_the_same(capsys):
    given = ["--model", str(ROOT / "benchmarks/published/gpt-oss-20b.json"), "--tokens", "96", "--slots", "640"]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    chosen = {each["what"]: each["chosen"] for each in found["operations"]}
    assert chosen == {
        "routing, 64 tokens": "reference",
        "routing, 96 tokens": "reference",
        "experts, float32, 64 tokens": "expert_loop",
        "experts, float32, 96 tokens": "expert_loop",
        "experts, MXFP4, 64 tokens": "expert_loop",
        "experts, MXFP4, 96 tokens": "expert_loop",
        "attention, 96 tokens, all keys": "causal_blocks",
        "attention, 96 tokens, all keys, packed sequences": "causal_blocks",
        "attention, 96 tokens, window 128": "causal_blocks",
        "attention, 96 tokens, window 128, packed sequences": "causal_blocks",
        "prefill, cache of 640 slots, float32": "blocks",
        "prefill, cache of 640 slots, e4m3": "blocks",
        "prefill, cache of 128 slots, float32": "blocks",
        "prefill, cache of 128 slots, e4m3": "blocks",
        "decoding, cache of 640 slots, float32": "reference",
        "decoding, cache of 640 slots, e4m3": "blocks",
        "decoding, cache of 128 slots, float32": "reference",
        "decoding, cache of 128 slots, e4m3": "reference",
    }
    assert {each["operation"] for each in found["operations"]} == {
        "route", "expert_mlp", "window_attention", "chunk_attention", "decode_attention",
    }  # fmt: skip
    assert found["operations"][0]["refusals"]["mosaic_gpu"] == "for a GPU, but this is a CPU"
    assert found["verdicts"] == {}
    assert found["host"]["cores"] >= 1 and found["versions"]["puzzle-jax"]


def test_choices_are_those_of_the_operations_themselves():
    q = jnp.zeros((1, 96, 4, 8))
    with recording() as choices:
        window_attention(q, q[:, :, :2], q[:, :, :2], jnp.zeros(4), window=3)
    assert [choice.chosen for choice in choices] == ["banded"]
    asked = {each.name: operations.choice(each) for each in operations.operations(_tiny(), 4096, 8192)}
    assert asked["attention, 4,096 tokens, window 16"].refusals["causal_blocks"].startswith("the window is much")


def _tiny():
    from puzzle_jax.convert_hf.configuration.config_json import parse_config

    source = EMBEDDED_PARENT / "config.json"
    return parse_config(json.loads(source.read_text()), source)


@pytest.mark.parametrize(
    "more,message",
    [
        (["--tokens", "0"], "tokens is 0, but must be at least 1"),
        (["--model", "nowhere"], "nowhere"),
        (["--modle", "x"], "modle"),
    ],
)
def test_bad_options_are_one_sentence(capsys, more, message):
    assert main(more) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("puzzle doctor: ") and said.count("\n") == 1


def test_a_choice_of_kernels_that_cannot_be_is_one_sentence_before_anything_else(capsys, monkeypatch):
    monkeypatch.setenv("PUZZLE_KERNELS", "fast")
    assert main(["--model", "nowhere"]) == 2
    kernels = "mosaic_gpu_wide, mosaic_gpu_fused, mosaic_gpu, mosaic_tpu, splash, tokamax"
    sentence = f"PUZZLE_KERNELS is 'fast', but must be auto, off, or one of {kernels}, dew_flash_attn"
    assert capsys.readouterr().err == f"puzzle doctor: {sentence}\n"
