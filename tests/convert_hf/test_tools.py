"""The commands inspect, verify, import and export, called as from the shell."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig, ModelConfig, cache_bytes
from puzzle_jax.convert_hf.__main__ import main
from puzzle_jax.convert_hf.configuration.config_json import write_config
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.tensors.files import SINGLE
from puzzle_jax.convert_hf.verify import verify
from puzzle_jax.model.cache_format import KVScales
from tests.convert_hf.checkpoints import MIXED, packable_config, rewrite, stored_bytes, write_random
from tests.support import model_logits, random_tokens

ALTERNATING = (BlockConfig(7, 5), BlockConfig(7, None), BlockConfig(7, 5), BlockConfig(7, None))


def published(layers: int, experts: int) -> ModelConfig:
    blocks = tuple(BlockConfig(experts, None if layer % 2 else 128) for layer in range(layers))
    return ModelConfig(201_088, 2_880, 2_880, 64, 8, 64, 4, blocks)


def inspected(config: ModelConfig, path: Path, capsys) -> dict:
    path.write_text(json.dumps(write_config(config, {}, form="mxfp4")))
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_published_child_is_counted_exactly_from_its_configuration(tmp_path, capsys):
    half = {15, 17, 19, *range(21, 36)}
    full = {1, 7, 9, 11, 13, 15, 17, 19, 25, 29}
    blocks = tuple(
        BlockConfig(64 if i in half else 128, None if i in full else 8_192 if i % 2 else 128) for i in range(36)
    )
    found = inspected(replace(published(36, 128), blocks=blocks), tmp_path / "config.json", capsys)
    assert found["parameters"] == 88_150_438_080
    assert found["checkpoint_bytes"] == 49_993_752_960  # without the 72 scales of an FP8 cache


@pytest.mark.parametrize(
    "layers,experts,nbytes,parameters",
    [(24, 32, 13_761_264_768, 20_914_757_184), (36, 128, 65_248_815_744, 116_829_156_672)],
)
def test_published_models_are_counted_exactly_from_their_configuration(
    tmp_path, capsys, layers, experts, nbytes, parameters
):
    found = inspected(published(layers, experts), tmp_path / "config.json", capsys)
    assert found["checkpoint_bytes"] == nbytes == sum(found["bytes_by_part"].values())
    assert found["parameters"] == parameters
    assert found["expert_bytes"] == 13_236_480
    assert len(found["layers"]) == layers and found["layers"][1]["sliding_window"] is None
    # Windowed layers hold 128 tokens, the others 1,000: keys and values of 8 heads of 64, two bytes each.
    assert found["kv_bytes_per_1000_tokens"]["bfloat16"] == layers // 2 * (128 + 1_000) * 2 * 8 * 64 * 2
    assert found["weights"] == "none here"


@pytest.mark.parametrize("layers,experts,active", [(24, 32, 3.61e9), (36, 128, 5.13e9)])
def test_active_parameters_are_those_of_the_chosen_experts(tmp_path, capsys, layers, experts, active):
    """Counted as in the model card of openai/gpt-oss, which leaves out the embedding too."""
    found = inspected(published(layers, experts), tmp_path / "config.json", capsys)
    assert found["active_parameters"] == pytest.approx(active, abs=0.01e9)


def test_inspection_for_people(tmp_path, capsys):
    directory = write_random(tmp_path / "model", packable_config(MIXED), shard_bytes=40_000)
    assert main(["inspect", str(directory)]) == 0
    out = capsys.readouterr().out
    assert "gpt_oss_puzzle, experts in mxfp4" in out and "headers as described" in out.replace("\n", " ")
    assert f"{cache_bytes(packable_config(MIXED), 1_000, 1):,} in float8" in out


def test_inspection_never_imports_jax(tmp_path):
    directory = write_random(tmp_path / "model", packable_config())
    program = (
        "import sys; from puzzle_jax.convert_hf.__main__ import main;"
        "code = main(['inspect', sys.argv[1], '--json']); assert 'jax' not in sys.modules; sys.exit(code)"
    )
    for damaged, code in ((False, 0), (True, 2)):
        if damaged:
            (directory / SINGLE).write_bytes(b"")
        done = subprocess.run([sys.executable, "-c", program, str(directory)], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert done.stderr.startswith("puzzle convert_hf inspect: ") and done.stderr.count("\n") == 1


def test_the_same_model_in_other_files_is_the_same_function(tmp_path, capsys):
    one = write_random(tmp_path / "one", packable_config())
    many = write_random(tmp_path / "many", packable_config(), shard_bytes=30_000)
    assert main(["verify", str(one), str(many), "--length", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same_function"] and found["logit_error"] == 0.0 and found["layer_errors"] == [0.0] * 4
    assert found["tensors"] == {"equal": 79, "different": 0, "in one alone": 0}


def test_errors_start_at_the_layer_that_differs(tmp_path, capsys):
    one, other = (write_random(tmp_path / name, packable_config()) for name in ("one", "other"))
    name = "model.layers.2.self_attn.v_proj.bias"
    rewrite(other, **{name: describe_checkpoint(one).tensors[name].read() + np.asarray(1, jnp.bfloat16)})
    assert main(["verify", str(one), str(other), "--length", "32", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["layer_errors"][:2] == [0.0, 0.0] and min(found["layer_errors"][2:]) > 0.01
    assert found["different_tensors"] == [name] and not found["same_function"]
    assert found["same_tokens"] < 1


def test_the_logits_compared_are_those_of_the_network(tmp_path):
    """For two different models, the error is that between two whole forward passes."""
    parent = write_random(tmp_path / "parent", packable_config())
    config = packable_config().with_blocks(MIXED)
    export_child(parent, tmp_path / "child", config, [range(b.num_experts) for b in MIXED], provenance={})
    found = verify(parent, tmp_path / "child", rows=3, length=30, seed=5)
    tokens = random_tokens(config, 3, 30, seed=5)
    ours, theirs = (
        model_logits(load_checkpoint(path, dtype=jnp.float32, experts="dense").params, config_of, tokens)
        for path, config_of in ((parent, packable_config()), (tmp_path / "child", config))
    )
    expected = float(jnp.abs(ours - theirs).max() / jnp.abs(ours).max())
    assert found.logit_error == pytest.approx(expected, rel=1e-3) and expected > 0.01
    assert "layer 0: 7 experts, window 5 and 5, 9" in found.config_differences


def test_models_that_cannot_be_compared(tmp_path, capsys):
    one = write_random(tmp_path / "one", packable_config())
    two = write_random(tmp_path / "two", packable_config(ALTERNATING[:2]))
    assert main(["verify", str(one), str(two)]) == 2
    assert "one has 4 layers and 97 tokens" in capsys.readouterr().err
    assert main(["verify", str(one), str(one), "--rows", "0"]) == 2
    assert "rows is 0, but must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["mxfp4", "bf16"])
def test_to_orbax_and_back_is_byte_identical(tmp_path, capsys, form):
    scales = KVScales(jnp.asarray([0.5, 1, 2, 3.0]), jnp.asarray([4.0, 5, 6, 7]))
    extra = {"tokenizer.json": b"{}"}
    start = write_random(tmp_path / "start", packable_config(MIXED), form, kv_scales=scales, extra_files=extra)
    assert main(["import", str(start), "--out", str(tmp_path / "orbax")]) == 0
    assert main(["export", "--checkpoint", str(tmp_path / "orbax"), "--out", str(tmp_path / "end")]) == 0
    assert stored_bytes(tmp_path / "end") == stored_bytes(start)
    assert (tmp_path / "end" / "tokenizer.json").read_bytes() == b"{}"
    assert json.loads((tmp_path / "end" / "config.json").read_text()) == json.loads((start / "config.json").read_text())
    assert main(["import", str(start), "--out", str(tmp_path / "orbax")]) == 2
    assert "orbax exists and is not empty" in capsys.readouterr().err
    assert main(["export", "--checkpoint", str(tmp_path / "orbax"), "--out", str(start)]) == 2
    assert "start exists and holds something else" in capsys.readouterr().err


def test_a_trained_checkpoint_is_packed_again(tmp_path):
    start = write_random(tmp_path / "start", packable_config())
    assert main(["import", str(start), "--out", str(tmp_path / "orbax"), "--experts", "dense"]) == 0
    assert main(["export", "--checkpoint", str(tmp_path / "orbax"), "--out", str(tmp_path / "end")]) == 0
    found = verify(start, tmp_path / "end", length=16)
    assert describe_checkpoint(tmp_path / "end").form == "mxfp4" and found.logit_error == 0.0


def test_a_damaged_orbax_checkpoint_is_named(tmp_path, capsys):
    start = write_random(tmp_path / "start", packable_config())
    assert main(["import", str(start), "--out", str(tmp_path / "orbax")]) == 0
    shutil.rmtree(tmp_path / "orbax" / "params")
    assert main(["export", "--checkpoint", str(tmp_path / "orbax"), "--out", str(tmp_path / "end")]) == 2
    assert "params cannot be read as an Orbax checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "end").exists()


def test_a_padded_child_is_plain_and_the_same_function(tmp_path, capsys):
    parent = write_random(tmp_path / "parent", packable_config(ALTERNATING))
    kept = ((0, 2, 3, 5, 6), (1, 2), tuple(range(7)), (0, 5, 6))
    config = packable_config(tuple(BlockConfig(len(ids), b.window) for ids, b in zip(kept, ALTERNATING, strict=True)))
    child, pad = tmp_path / "child", tmp_path / "pad"
    export_child(parent, child, config, kept, provenance={})
    assert main(["export", "--checkpoint", str(child), "--out", str(pad), "--pad-experts"]) == 0
    padded = describe_checkpoint(pad)
    assert padded.config_json["model_type"] == "gpt_oss" and padded.config.blocks == ALTERNATING
    assert not list(pad.glob("*.py"))
    assert verify(child, pad, length=40).logit_error < 1e-6
    bias = padded.tensors["model.layers.1.mlp.router.bias"].read().astype(np.float32)
    assert np.all(bias[2:] < -9e29) and np.all(np.abs(bias[:2]) < 10)
    wide = write_random(tmp_path / "wide", packable_config(MIXED))
    assert main(["export", "--checkpoint", str(wide), "--out", str(tmp_path / "no"), "--pad-experts"]) == 2
    assert "the child's windows are [9, None, 5, 9], but a padded child needs one width" in capsys.readouterr().err


def test_the_card_says_what_was_cut(tmp_path):
    parent = write_random(tmp_path / "parent", packable_config())
    config = packable_config().with_blocks(MIXED)
    provenance = {"parent": "models/big", "predicted": {"kl": 0.25}}
    export_child(parent, tmp_path / "child", config, [range(b.num_experts) for b in MIXED], provenance=provenance)
    card = (tmp_path / "child" / "README.md").read_text()
    assert "# A child of big" in card and "| 0 | 5 of 7 | 9 (was 5) |" in card and "| 1 | 7 of 7 | full |" in card
    assert "Predicted by the search, not measured" in card and "| kl | 0.25 |" in card
    assert "trust_remote_code=True" in card and "FP8" not in card
