"""Exported checkpoints in other runtimes, each in its own environment (`make runtimes`).

A random model is written, our float32 logits and greedy tokens are computed here, and a script that knows nothing of
puzzle_jax's JAX parts answers the same questions in the other environment. Questions and answers go through files.

Where PUZZLE_JAX_CHILD names a child's directory, that child is tested too: `make runtimes CHILD=runs/road/child`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import QWEN3_MOE, BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import export_child, save_checkpoint
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.tasks import TASKS, Chat, problems
from tests.parity.qwen3_moe import scales_of, write_qwen3
from tests.parity.reference import greedy_of, logits_of, our_greedy, our_logits, relative_difference
from tests.support import random_params, random_tokens

pytestmark = pytest.mark.runtimes

HERE = Path(__file__).parent
TOLERANCE = 1e-3
"""Tolerance for float32 logits: their largest difference, relative to the largest logit."""
PROMPTS = [[5, 17, 3, 88, 41, 9, 60, 2, 33, 71, 12, 118, 77, 6, 54, 101, 19, 200, 45, 8], [7, 7, 90]]
STEPS = 16
LENGTH = 45
BLOCKS = {
    "plain": [BlockConfig(7, 9), BlockConfig(7), BlockConfig(7, 9), BlockConfig(7)],
    "padded": [BlockConfig(5, 9), BlockConfig(4), BlockConfig(7, 9), BlockConfig(6)],
    "puzzle": [BlockConfig(5, 9), BlockConfig(7), BlockConfig(4, 17), BlockConfig(7, 9), BlockConfig(6)],
}
K_SCALES, V_SCALES = [0.5, 0.25, 2.0, 1.5, 0.75], [3.0, 0.125, 1.25, 0.375, 0.625]


YARN = RopeConfig(theta=50_000.0, factor=4.0, original_context=32, truncate=True)
QWEN3 = {"plain": {}, "counts": {"variant": replace(QWEN3_MOE, tied_head=True), "rope": YARN}, "puzzle": {}}


def friendly_config(kind: str) -> ModelConfig:
    """A model with widths that every runtime accepts, and windows shorter than the longer prompt."""
    return ModelConfig(
        vocab_size=224,
        hidden_size=96,
        intermediate_size=160,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        experts_per_token=3,
        blocks=tuple(BLOCKS["padded" if kind == "unpadded" else kind]),
        rope=RopeConfig(theta=10_000.0, factor=4.0, original_context=32),
        max_position=128,
        rms_norm_eps=1e-5,
        swiglu_limit=7.0,
    )


def written(directory: Path, kind: str, form: str) -> Path:
    """A random checkpoint whose clamp takes effect; a "puzzle" one carries scales of an FP8 cache.

    A padded one is made from a heterogeneous one, which stays beside it as "unpadded".
    """
    if kind == "padded":
        child = written(directory.parent / "unpadded", "unpadded", form)
        config = friendly_config(kind)
        everything = [range(block.num_experts) for block in config.blocks]
        export_child(child, directory, config, everything, provenance={}, pad_experts=True)
        return directory
    config = friendly_config(kind)
    params = random_params(config)
    for layer in params["layers"]:
        layer["moe"]["gate_up_bias"] = layer["moe"]["gate_up_bias"] * 16
    scales = KVScales(jnp.asarray(K_SCALES), jnp.asarray(V_SCALES)) if kind == "puzzle" else None
    base = {"eos_token_id": 223, "pad_token_id": 1}
    save_checkpoint(directory, config, params, config_base=base, form=form, kv_scales=scales)  # type: ignore[arg-type]
    return directory


def question_of(tokens: np.ndarray, prompts: list[list[int]], vocab: int) -> dict[str, object]:
    """Asks for all logits of `tokens` and for continuations of `prompts`; `context` is long enough for either."""
    context = max(128, STEPS + max(map(len, prompts)))
    return {"tokens": tokens.tolist(), "prompts": prompts, "steps": STEPS, "vocab": vocab, "context": context}


def ask(runtime: str, checkpoint: Path, question: dict) -> dict[str, np.ndarray]:
    own = HERE.parent.parent / f".venv-{runtime}" / "bin" / "python"
    python = Path(sys.executable) if runtime == "transformers" else own
    if not python.exists():
        pytest.skip(f"{python} does not exist; `make runtimes` makes it")
    asked, answer = checkpoint.parent / "question.json", checkpoint.parent / f"{runtime}.npz"
    asked.write_text(json.dumps(question))
    command = [str(python), str(HERE / f"run_{runtime}.py"), str(checkpoint), str(asked), str(answer)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checkpoint.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return dict(np.load(answer))


@pytest.mark.parametrize(
    "runtime, kind, form",
    [
        ("transformers", "plain", "mxfp4"),
        ("transformers", "puzzle", "mxfp4"),
        ("transformers", "padded", "mxfp4"),
        ("mlx", "plain", "mxfp4"),
        ("mlx", "padded", "mxfp4"),
        ("mlx", "puzzle", "mxfp4"),
        ("mlx", "puzzle", "bf16"),
        ("vllm", "plain", "bf16"),
        ("vllm", "padded", "bf16"),
        ("vllm", "puzzle", "bf16"),
        ("vllm", "puzzle", "mxfp4"),
    ],
)
def test_logits_and_greedy_tokens(tmp_path, runtime, kind, form):
    checkpoint = written(tmp_path / "checkpoint", kind, form)
    config = friendly_config(kind)
    tokens = np.asarray(random_tokens(config, 2, LENGTH))
    question = question_of(tokens, PROMPTS, config.vocab_size)
    # Stock mlx-lm always rounds YaRN's correction range; the model class of puzzle children does not.
    rounds = runtime == "mlx" and kind != "puzzle"
    changes = {"rope": replace(config.rope, truncate=True)} if rounds else {}
    ours = checkpoint.with_name("unpadded") if kind == "padded" else checkpoint
    expected = our_logits(ours, tokens, **changes)
    answer = ask(runtime, checkpoint, question)
    difference = relative_difference(expected, answer["logits"])
    print(f"{runtime} {kind} {form}: {difference:.1e} of the largest logit, {np.abs(expected).max():.2f}")
    assert difference < TOLERANCE
    greedy = [our_greedy(ours, prompt, STEPS, **changes) for prompt in PROMPTS]
    assert answer["greedy"].tolist() == greedy
    assert len({tuple(row) for row in greedy}) == 2 and len(set(greedy[0])) > 2
    if (runtime, kind) == ("vllm", "puzzle"):
        np.testing.assert_allclose(answer["kv_scales"], np.stack([K_SCALES, V_SCALES], 1))
        assert answer["model_type"] == "gpt_oss"  # by which vLLM chooses kernels and the chat format


@pytest.fixture(scope="module", params=QWEN3)
def qwen3(request, tmp_path_factory):
    """A kind of Qwen3-MoE checkpoint, a question, and our float32 logits and greedy tokens."""
    kind = request.param
    checkpoint = tmp_path_factory.mktemp(kind) / "checkpoint"
    config, params = write_qwen3(checkpoint, kind, **QWEN3[kind])
    tokens = np.asarray(random_tokens(config, 2, LENGTH))
    answer = {"logits": logits_of(config, params, tokens), "greedy": greedy_of(config, params, PROMPTS, STEPS, LENGTH)}
    return kind, config, checkpoint, question_of(tokens, PROMPTS, config.vocab_size), answer


@pytest.mark.parametrize("runtime", ["transformers", "mlx", "vllm"])
def test_qwen3_moe(qwen3, runtime):
    kind, config, checkpoint, question, expected = qwen3
    answer = ask(runtime, checkpoint, question)
    difference = relative_difference(expected["logits"], answer["logits"])
    print(f"{runtime} qwen3_moe {kind}: {difference:.1e} of the largest logit, {np.abs(expected['logits']).max():.2f}")
    assert difference < TOLERANCE
    assert answer["greedy"].tolist() == expected["greedy"]
    assert len(set(map(tuple, expected["greedy"]))) == 2 and len(set(expected["greedy"][0])) > 2
    if runtime == "vllm" and kind != "plain":
        np.testing.assert_allclose(answer["kv_scales"], scales_of(config))
        assert answer["model_type"] == "qwen3_moe"


@pytest.mark.parametrize("runtime", ["transformers", "mlx", "vllm"])
def test_a_given_child_answers_the_same(tmp_path, runtime):
    given = os.environ.get("PUZZLE_JAX_CHILD")
    if not given:
        pytest.skip("no child was given; `make runtimes CHILD=DIRECTORY` asks that one")
    checkpoint = shutil.copytree(given, tmp_path / "checkpoint")  # the answer files go beside it
    vocab = describe_checkpoint(checkpoint).config.vocab_size
    chat = Chat.load(checkpoint)
    asked = [next(problems(task, first_seed=1)) for task in TASKS.values()]
    prompts = [chat.prompt_tokens(problem.prompt, "high") for problem in asked]
    tokens = np.asarray([(prompt * LENGTH)[:LENGTH] for prompt in prompts])
    answer = ask(runtime, checkpoint, question_of(tokens, prompts, vocab))
    difference = relative_difference(our_logits(checkpoint, tokens), answer["logits"])
    print(f"{runtime} {given}: {difference:.1e} of the largest logit")
    assert difference < TOLERANCE
    greedy = [our_greedy(checkpoint, prompt, STEPS) for prompt in prompts]
    assert answer["greedy"].tolist() == greedy
    assert len({tuple(row) for row in greedy}) == len(prompts) > 2


def test_the_comparison_would_see_a_wrong_window_or_rotation(tmp_path):
    checkpoint = written(tmp_path / "checkpoint", "puzzle", "bf16")
    config = friendly_config("puzzle")
    tokens = np.asarray(random_tokens(config, 2, LENGTH))
    right = our_logits(checkpoint, tokens)
    blocks = [replace(block, window=block.window and block.window + 1) for block in config.blocks]
    alike = [replace(block, window=block.window and 17) for block in config.blocks]
    for changes in (
        {"blocks": tuple(blocks)},
        {"blocks": tuple(alike)},
        {"rope": replace(config.rope, truncate=True)},
        {"swiglu_limit": 6.5},
    ):
        assert relative_difference(our_logits(checkpoint, tokens, **changes), right) > 3 * TOLERANCE, changes
