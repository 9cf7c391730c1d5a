"""All of GRPO in one short file; it runs for a minute or two on two free cores.

    python examples/grpo_minimal.py [--steps 20] [--task chain] [--effort medium] [--model DIR] [--keep 0.75]

The embedded parent loses the last quarter of each layer's experts, whichever they are, and with them much of its
accuracy. Then it learns to do without them. Each step asks some problems, samples a group of answers to each from the
current model, scores them, and makes those that beat the rest of their group more likely, the others less likely:

    A       = reward - mean reward of the group's other answers                           (RLOO, arXiv 2402.14740)
    ratio_t = pi(token_t) / pi_old(token_t), pi_old as the sampler drew it                (GRPO, arXiv 2402.03300)
    loss    = mean over all tokens of -min(ratio_t A, clip(ratio_t, 0.8, 1.28) A)         (DAPO, arXiv 2503.14476)

A sample is used for one update, so ratios are 1 up to rounding, and only their gradients matter. Routers and experts
are frozen, and the update sends each token through the experts that the sampler chose (replay, arXiv 2510.11370).

Left out, and found in the full trainer, `puzzle train grpo`: checkpoints and resuming, meshes, bfloat16, packed rows
and micro-batches, mixtures of tasks and efforts, reward workers, prompt filters, rewards for length, other losses,
several updates per sample, a KL penalty towards the first policy, and metrics on disk.

The letters at the end of an array's name are its axes: G groups, one per problem; A answers of each; R = G * A rows;
T positions of a row; V vocabulary; L layers; K experts of a token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.generate import Generated, Request, generate
from puzzle_jax.model.child import Child, ChildBlock, cut_params, with_delta
from puzzle_jax.model.network import forward
from puzzle_jax.model.spec import Params
from puzzle_jax.search.recipe import EMBEDDED_PARENT
from puzzle_jax.tasks import EFFORTS, TASKS, Chat, Problem, problems

FROZEN = ("router_weight", "router_bias", "gate_up", "gate_up_bias", "down", "down_bias")
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


class Rollout(NamedTuple):
    """One answer to a problem."""

    request: Request
    generated: Generated
    reward: float


class Batch(NamedTuple):
    """Inputs of an update. Rows that teach nothing stay empty, so that every step runs the same program."""

    tokens_RT: np.ndarray  # prompt, answer, padding
    mask_RT: np.ndarray  # true at the answer's tokens
    sampler_RT: np.ndarray  # log-probabilities that these were sampled with
    advantages_RT: np.ndarray
    experts_RTLK: np.ndarray  # experts that the sampler chose


def train(options: argparse.Namespace) -> tuple[Params, list[dict[str, float]]]:
    """Returns the final parameters and the metrics printed for each step.

    `trained` is a tree like the parameters, with None for frozen leaves; `with_delta` merges the two.
    """
    parent, chat = load_checkpoint(options.model, dtype=jnp.float32, experts="dense"), Chat.load(options.model)
    kept = [tuple(range(round(options.keep * block.num_experts))) for block in parent.config.blocks]
    child = Child(parent.config, tuple(map(ChildBlock, kept, (block.window for block in parent.config.blocks))))
    first, config = cut_params(parent.params, child), child.config
    trained = jax.tree.map_with_path(lambda path, leaf: None if path[-1].key in FROZEN else leaf, first)
    optimizer = optax.adam(options.learning_rate)
    state = optimizer.init(trained)

    @jax.jit
    def update(trained: Params, state: optax.OptState, first: Params, batch: Batch):
        gradients, gap = jax.grad(policy_loss, has_aux=True)(trained, first, batch, config)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trained, updates), state, gap

    def greedy_accuracy() -> float:
        asked = list(islice(problems(TASKS[options.task]), options.held_out))
        rollouts = sample(with_delta(first, trained), config, chat, asked, options)
        return float(np.mean([rollout.reward == 1 for rollout in rollouts]))

    before, history = greedy_accuracy(), []
    training = problems(TASKS[options.task], held_out=False)
    for step in range(options.steps):
        asked = [problem for problem in islice(training, options.prompts) for _ in range(options.group)]
        rollouts = sample(with_delta(first, trained), config, chat, asked, options, temperature=1.0, seed=step)
        rewards_GA = np.array([rollout.reward for rollout in rollouts]).reshape(-1, options.group)
        batch = make_batch(rollouts, rewards_GA, config, options.length)
        gap = 0.0
        if batch.mask_RT.any():
            trained, state, gap = update(trained, state, first, batch)
        metrics = {
            "reward": rewards_GA.mean(),
            f"pass@{options.group}": (rewards_GA == 1).any(axis=1).mean(),
            "tokens": np.mean([len(rollout.generated.tokens) for rollout in rollouts]),
            "groups": (np.ptp(rewards_GA, axis=1) > 0).sum(),  # groups that taught something
            "gap": gap,
        }
        history.append({name: float(value) for name, value in metrics.items()})
        print(f"step {step:3}", *(f"{name} {value:<7.3g}" for name, value in history[-1].items()), flush=True)
    print(f"greedy accuracy on {options.held_out} held-out problems: {before:.3f} -> {greedy_accuracy():.3f}")
    return with_delta(first, trained), history


def sample(
    params: Params,
    config: ModelConfig,
    chat: Chat,
    asked: Sequence[Problem],
    options: argparse.Namespace,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Rollout]:
    """Samples an answer to each problem, at most as long as its prompt leaves room for."""
    prompts = [tuple(chat.prompt_tokens(problem.prompt, options.effort)) for problem in asked]
    noise = range(seed * len(asked), (seed + 1) * len(asked))
    requests = [Request(prompt, options.length - len(prompt), n) for prompt, n in zip(prompts, noise, strict=True)]
    stops, slots = sorted(chat.stop_ids), options.prompts * options.group
    found = generate(
        params, config, requests, stop_ids=stops, temperature=temperature, slots=slots, log_probs=True, experts=True
    )
    rewards = [
        TASKS[problem.task].score(problem, chat.parse(generated.tokens, prompt).final)
        for problem, prompt, generated in zip(asked, prompts, found, strict=True)
    ]
    return [Rollout(*rollout) for rollout in zip(requests, found, rewards, strict=True)]


def make_batch(rollouts: Sequence[Rollout], rewards_GA: np.ndarray, config: ModelConfig, length: int) -> Batch:
    """Returns advantages and equally long rows. A group whose rewards are all equal teaches nothing and is left out."""
    (G, A), T, L, K = rewards_GA.shape, length, len(config.blocks), config.experts_per_token
    others_GA = (rewards_GA.sum(axis=1, keepdims=True) - rewards_GA) / (A - 1)
    advantages_R = (rewards_GA - others_GA).reshape(G * A)
    teaches_R = np.repeat(np.ptp(rewards_GA, axis=1) > 0, A)
    tokens_RT = np.zeros((G * A, T), np.int32)
    mask_RT = np.zeros((G * A, T), bool)
    sampler_RT = np.zeros((G * A, T), np.float32)
    advantages_RT = np.zeros((G * A, T), np.float32)
    experts_RTLK = np.tile(np.arange(K, dtype=np.int32), (G * A, T, L, 1))
    for row, (request, generated, _) in enumerate(rollouts):
        if not teaches_R[row]:
            continue
        start, end = len(request.prompt), len(request.prompt) + len(generated.tokens)
        tokens_RT[row, :end] = request.prompt + generated.tokens
        mask_RT[row, start:end] = True
        sampler_RT[row, start:end] = np.asarray(generated.log_probs)
        advantages_RT[row, start:end] = advantages_R[row]
        experts_RTLK[row, : end - 1] = np.asarray(generated.experts)  # the last token was drawn, but never run
    return Batch(tokens_RT, mask_RT, sampler_RT, advantages_RT, experts_RTLK)


def policy_loss(trained: Params, first: Params, batch: Batch, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the loss and the largest |sampler - trainer| difference of a token's log-probability."""
    R, T, L, K = batch.experts_RTLK.shape
    replay = [batch.experts_RTLK[:, :, layer].reshape(R * T, K) for layer in range(L)]
    logits_RTV = forward(with_delta(first, trained), config, jnp.asarray(batch.tokens_RT), replay=replay)
    # Each position predicts the next token, so all that belongs to that token is shifted by one.
    tokens_RT, mask_RT, sampler_RT, advantages_RT = (x_RT[:, 1:] for x_RT in batch[:4])
    log_probs_RTV = jax.nn.log_softmax(logits_RTV[:, :-1])
    log_probs_RT = jnp.take_along_axis(log_probs_RTV, tokens_RT[..., None], axis=-1)[..., 0]
    difference_RT = jnp.where(mask_RT, log_probs_RT - sampler_RT, 0.0)
    ratio_RT = jnp.exp(difference_RT)
    clipped_RT = jnp.clip(ratio_RT, 1 - CLIP_LOW, 1 + CLIP_HIGH)
    loss_RT = -jnp.minimum(ratio_RT * advantages_RT, clipped_RT * advantages_RT)
    return jnp.sum(loss_RT, where=mask_RT) / jnp.sum(mask_RT), jnp.abs(difference_RT).max()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED_PARENT, help="a checkpoint with its chat files")
    parser.add_argument("--keep", type=float, default=0.75, help="share of each layer's experts that stays")
    parser.add_argument("--task", choices=TASKS, default="chain")
    parser.add_argument("--effort", choices=EFFORTS, default="medium")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=32, help="problems of a step")
    parser.add_argument("--group", type=int, default=8, help="answers to each, at least 2")
    parser.add_argument("--length", type=int, default=80, help="tokens that a prompt and its answer have room for")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--held-out", type=int, default=200, help="problems that accuracy is taken on")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    enable_compilation_cache()
    train(parse())
