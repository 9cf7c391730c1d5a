"""The minimal GRPO loop: what it freezes, what it minimises, and that it stays small."""

import importlib.util
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.model.network import forward
from puzzle_jax.search.recipe import EMBEDDED_PARENT
from puzzle_jax.tasks import TASKS, Chat, problems
from puzzle_jax.train.losses.policy import group_advantages
from tests.paths import ROOT
from tests.support import chat_config, random_params

FILE = ROOT / "examples" / "grpo_minimal.py"


@pytest.fixture(scope="module")
def grpo():
    spec = importlib.util.spec_from_file_location("grpo_minimal", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_is_small():
    assert len(FILE.read_text(encoding="utf-8").splitlines()) < 200


def test_two_steps_leave_what_is_frozen_and_move_the_rest(grpo, capsys):
    options = ["--steps", "2", "--prompts", "8", "--group", "4", "--held-out", "4", "--length", "64", "--effort", "low"]
    params, history = grpo.train(grpo.parse(options))
    before = load_checkpoint(EMBEDDED_PARENT, dtype=jnp.float32, experts="dense").params
    for old, new in zip(before["layers"], params["layers"], strict=True):
        for name, kept in (("router_weight", np.s_[:, :12]), ("router_bias", np.s_[:12])):
            np.testing.assert_array_equal(new["moe"].pop(name), old["moe"].pop(name)[kept])
        for name in ("gate_up", "gate_up_bias", "down", "down_bias"):
            np.testing.assert_array_equal(new["moe"].pop(name), old["moe"].pop(name)[:12])
    moved = jax.tree.map(lambda old, new: np.abs(new - old).max(), before, params)
    assert min(jax.tree.leaves(moved)) > 1e-5 and max(jax.tree.leaves(moved)) < 1e-2
    assert len(history) == 2 and all(0 < step["groups"] <= 8 for step in history)
    assert all(0 < step["gap"] < 1e-4 and 0 < step["reward"] <= step["pass@4"] <= 1 for step in history)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and f"reward {history[1]['reward']:.3g} " in lines[1]


def test_the_gradient_is_the_plain_policy_gradient(grpo):
    """With one update per sample: the mean over tokens of -A grad log pi, here without clipping, ratio and replay."""
    config, chat, length = chat_config(), Chat.load(EMBEDDED_PARENT), 48
    params = random_params(config)
    asked = [problem for problem in islice(problems(TASKS["add"]), 3) for _ in range(4)]
    options = grpo.parse(["--prompts", "3", "--group", "4", "--length", str(length)])
    rollouts = grpo.sample(params, config, chat, asked, options, temperature=1.0, seed=1)
    rewards_GA = np.array([[0.1, 0.7, 0.4, 0.4], [0.3, 0.3, 0.3, 0.3], [1.0, 0.0, 0.0, 0.0]])
    batch = grpo.make_batch(rollouts, rewards_GA, config, length)

    everyone = np.ones(rewards_GA.shape, bool)
    advantages_GA = group_advantages(rewards_GA, everyone, baseline="leave_one_out", scale_by_std=False)
    used = [(r, a) for r, a in zip(rollouts, advantages_GA.reshape(-1), strict=True) if a != 0]
    assert len(used) == 6  # one group has equal rewards, and two answers of another equal the mean of the rest

    lengths_R = [len(rollout.generated.tokens) for rollout in rollouts]
    np.testing.assert_array_equal(batch.mask_RT.sum(axis=1), lengths_R[:4] + [0] * 4 + lengths_R[8:])
    np.testing.assert_allclose(
        batch.advantages_RT.max(axis=1) + batch.advantages_RT.min(axis=1), advantages_GA.reshape(-1), atol=1e-6
    )
    tokens = np.zeros((len(used), length), np.int32)
    weights = np.zeros((len(used), length), np.float32)
    for row, (rollout, advantage) in enumerate(used):
        whole = [*rollout.request.prompt, *rollout.generated.tokens]
        tokens[row, : len(whole)] = whole
        weights[row, len(rollout.request.prompt) : len(whole)] = advantage / batch.mask_RT.sum()

    def plain(params):
        log_probs = jax.nn.log_softmax(forward(params, config, jnp.asarray(tokens)))
        rows, positions = np.nonzero(weights)
        return -jnp.sum(weights[rows, positions] * log_probs[rows, positions - 1, tokens[rows, positions]])

    found, gap = jax.jit(jax.grad(grpo.policy_loss, has_aux=True), static_argnums=3)(params, params, batch, config)
    wanted = jax.jit(jax.grad(plain))(params)
    assert 0 < gap < 1e-4  # ratios are 1 up to this
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())
