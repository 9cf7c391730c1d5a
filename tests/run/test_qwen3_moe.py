"""The road of a parent in Qwen3-MoE's shape: searched, distilled and trained by reinforcement, by every verb's own way.

Its sizes are no multiples of MXFP4's groups, so nothing may pack its experts on the way.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import QWEN3_MOE, BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.convert_hf.child_of import load_delta, open_child
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.errors import PuzzleWarning
from puzzle_jax.search.__main__ import main as search
from puzzle_jax.tasks.chat.embedded import chat_files, token_ids
from puzzle_jax.train.__main__ import main as train
from tests.support import model_logits, present, random_params, random_tokens

pytestmark = pytest.mark.once

CONFIG = ModelConfig(
    vocab_size=128,
    hidden_size=36,
    intermediate_size=20,
    num_heads=6,
    num_kv_heads=3,
    head_dim=10,
    experts_per_token=2,
    blocks=(BlockConfig(8), BlockConfig(8)),
    rope=RopeConfig(theta=10_000.0, factor=1.0, original_context=640, truncate=True),
    max_position=640,
    rms_norm_eps=1e-6,
    swiglu_limit=None,
    variant=QWEN3_MOE,
)
LIMITS = "low=5,medium=6,high=7"
SEARCH = [
    *("--traces.tasks", "chain", "--traces.calibration", "3", "--traces.validation", "2", "--traces.confirmation", "2"),
    *("--traces.heldout", "2", "--traces.max_tokens", LIMITS, "--traces.batch_size", "9"),
    *("--space.fractions", "[1, 0.75, 0.5]", "--score.tokens_per_batch", "256", "--score.method", "exact"),
    *("--scenario.name", "chat", "--scenario.input_tokens", "40", "--scenario.output_tokens", "8"),
    *("--scenario.batch", "3", "--scenario.hardware", "h100", "--costs", "roofline"),
    *("--target.max_expert_bytes_ratio", "0.82", "--refine.rounds", "0", "--refine.swaps", "0"),
    *("--solve.solutions", "2", "--evaluate.problems", "2", "--evaluate.rounds", "0", "--evaluate.baselines", "[]"),
]


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("road")
    params = random_params(CONFIG)
    files = chat_files(CONFIG.variant.family)
    save_checkpoint(
        root / "parent", CONFIG, params, config_base=token_ids(CONFIG.variant.family), extra_files=files, form="bf16"
    )
    assert search(["--parent", str(root / "parent"), "--run", str(root / "run"), *SEARCH]) == 0
    return root


@pytest.fixture(scope="module")
def distilled(road) -> Path:
    parent, child, traces = road / "parent", road / "run/child", road / "traces.parquet"
    options = ("--tasks", "chain", "--problems", "12", "--max_tokens", LIMITS, "--out", str(traces))
    assert train(["traces", "--parent", str(parent), *options]) == 0
    options = ("--train", "router,experts", "--data.row_length", "96", "--data.rows", "2", "--data.heldout", "4")
    places = ("--parent", str(parent), "--child", str(child), "--traces", str(traces), "--out", str(road / "distilled"))
    assert train(["distill", *places, *options, "--loop.steps", "2", "--optimizer.learning_rate", "0.01"]) == 0
    return road / "distilled/child"


def test_the_child_is_cut_from_its_parent_and_says_what_it_is(road):
    parent, child = describe_checkpoint(road / "parent"), describe_checkpoint(road / "run/child")
    written = json.loads((road / "run/child/config.json").read_text())
    counts = [block.num_experts for block in child.config.blocks]
    assert sum(counts) <= 0.82 * 16 and len(set(counts)) == 2
    assert written["model_type"] == "qwen3_moe_puzzle"
    assert [entry["num_local_experts"] for entry in written["block_configs"]] == counts
    assert all(block.window is None for block in child.config.blocks)  # none are offered without attention sinks
    view = open_child(road / "parent", road / "run/child", every_expert=True).child
    for layer, kept in enumerate(view.kept):
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        np.testing.assert_array_equal(child.tensors[name].read(), parent.tensors[name].read()[list(kept)])


def test_a_cut_child_computes_what_its_view_does(road):
    view = open_child(road / "parent", road / "run/child").child
    parent, child = (load_checkpoint(road / name, dtype=jnp.float32) for name in ("parent", "run/child"))
    tokens = random_tokens(CONFIG, 2, 17)
    masks = [view.view.expert_masks[layer] for layer in range(CONFIG.num_layers)]
    viewed = model_logits(parent.params, CONFIG, tokens, expert_masks=masks)
    tolerance = 1e-5 * float(jnp.abs(viewed).max())
    np.testing.assert_allclose(model_logits(child.params, child.config, tokens), viewed, atol=tolerance)


def test_windows_that_are_asked_for_come_with_a_warning(road, tmp_path):
    with pytest.warns(PuzzleWarning, match=r"space\.windows is 24, but .*parent has no attention sinks"):
        assert (
            search(
                ["cost", "--parent", str(road / "parent"), "--run", str(tmp_path), *SEARCH, "--space.windows", "[24]"]
            )
            == 0
        )


def test_trained_experts_are_written_in_bfloat16(road, distilled):
    opened = open_child(road / "parent", distilled)
    assert {"layers.0.moe.down", "layers.1.moe.router_weight", "layers.0.attention.q_norm"} <= set(opened.differing)
    assert describe_checkpoint(distilled).form == "bf16"
    delta = load_delta(road / "parent", distilled, opened.differing)
    own = present(delta["layers"][0])["moe"]["down"]
    of_parent = load_checkpoint(road / "parent", dtype=jnp.float32).params["layers"][0]["moe"]["down"]
    kept, lost = list(opened.child.kept[0]), sorted({*range(8)} - set(opened.child.kept[0]))
    np.testing.assert_array_equal(own[lost], np.asarray(of_parent)[lost])
    # Two steps of Adam move values by up to twice the rate; MXFP4 would have moved many of them much further.
    moved = np.abs(own[kept] - np.asarray(of_parent)[kept])
    assert 1e-4 < moved.max() < 0.03


def test_reinforcement_learning_goes_on_from_it(road, distilled):
    options = ("--prompts.tasks", "chain", "--prompts.prompts", "4", "--prompts.min_answers", "2")
    lengths = ("--rollout.max_tokens", LIMITS, "--rollout.group", "4", "--update.row_length", "96")
    run = ("--loop.steps", "1", "--monitoring.problems", "1", "--out", str(road / "rl"))
    assert train(["grpo", "--model", str(distilled), *options, *lengths, *run]) == 0
    before, after = describe_checkpoint(distilled), describe_checkpoint(road / "rl/child")
    assert after.config == before.config and after.tensors.keys() == before.tensors.keys()
