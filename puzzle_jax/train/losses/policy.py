"""The losses of reinforcement learning as plain definitions; `policy_settings` selects and names combinations of them.

Quantities of whole answers (rewards, advantages, factors) are numpy arrays on the host, computed in float64. Quantities
of tokens are JAX arrays in float32, flat [tokens], in which several answers follow one another: `answers` is the index
of the answer that a token belongs to, out of `count`, and `mask` is true for tokens that count. `policy_loss` puts the
pieces together; where `mask` is false, loss and gradient are 0 whatever the inputs hold there, NaN included.

The loss of a batch is the sum over tokens of `policy_loss` times `token_coefficients`.

Log-probs are those of the sampled tokens: `log_probs` under the policy being trained, the only ones that carry
gradients; `old` under the policy being improved on, computed by the trainer; `sampler` as the sampler reported them,
which differ from `old` because its engine's arithmetic differs; `reference` under the policy to stay close to.

Left out: value functions and advantages that differ within an answer.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from puzzle_jax.train.losses.policy_settings import PolicySettings, ResolvedPolicy

STD_EPS = 1e-6  # added to a group's standard deviation


# Answers: rewards, advantages, factors.


def group_advantages(
    rewards: Float[np.ndarray | Array, "groups answers"],
    counted: Bool[np.ndarray | Array, "groups answers"],
    *,
    baseline: Literal["group_mean", "leave_one_out"],
    scale_by_std: bool,
    clip: float | None = None,
) -> Float[np.ndarray, "groups answers"]:
    """Advantage of each answer over the other answers to its prompt.

        group_mean:     A_i = R_i - mean_j R_j                                        (arXiv 2503.20783, Dr. GRPO)
        leave_one_out:  A_i = R_i - mean_{j != i} R_j = n / (n - 1) (R_i - mean_j R_j)       (arXiv 2402.14740, RLOO)
        scale_by_std:   A_i / (std_j R_j + 1e-6), the population's std                       (arXiv 2402.03300, GRPO)

    Means are over the n answers of the group that are `counted`; the others, whose reward is not known, get 0. So do
    all answers of a group whose rewards are equal or of which fewer than two are counted, exactly and without rounding
    residue. `clip` bounds the absolute value.
    """
    rewards, counted = np.asarray(rewards, np.float64), np.asarray(counted)
    known = np.where(counted, rewards, 0.0)
    n = counted.sum(axis=-1, keepdims=True)
    at_least_one = np.maximum(n, 1)
    centred = np.where(counted, known - known.sum(axis=-1, keepdims=True) / at_least_one, 0.0)
    std = np.sqrt((centred**2).sum(axis=-1, keepdims=True) / at_least_one)
    advantages = centred
    if baseline == "leave_one_out":
        advantages = advantages * (n / np.maximum(n - 1, 1))
    if scale_by_std:
        advantages = advantages / (std + STD_EPS)
    most = np.where(counted, rewards, -np.inf).max(axis=-1, keepdims=True)
    least = np.where(counted, rewards, np.inf).min(axis=-1, keepdims=True)
    advantages = np.where(most > least, advantages, 0.0)
    if clip is not None:
        advantages = np.clip(advantages, -clip, clip)
    return advantages.astype(np.float32)


def overlong_penalty(
    lengths: int | Int[np.ndarray, "*answers"], limit: int, cache: int
) -> Float[np.ndarray, "*answers"]:
    """Penalty added to the reward of answers near the token limit: -clip((n - (limit - cache)) / cache, 0, 1).

    It is 0 up to limit - cache tokens and falls linearly to -1 at the limit (DAPO, arXiv 2503.14476). With a cache of 0
    it is 0 everywhere.
    """
    over = np.asarray(lengths, np.float64) - (limit - cache)
    share = np.clip(over / cache, 0.0, 1.0) if cache else np.zeros(over.shape)
    return np.asarray(0.0 - share, np.float32)


def effort_length_reward(
    reward: float | Float[np.ndarray, "*answers"],
    length: int | Int[np.ndarray, "*answers"],
    budget: int | Int[np.ndarray, "*answers"],
    *,
    weight: float,
    bonus: float,
    penalty: float,
) -> Float[np.ndarray, "*answers"]:
    """The effort-aware length reward: short correct answers gain; long answers lose, whether correct or not.

        s = min(1, weight (1 - n / budget)),   r' = r + bonus r max(s, 0) + penalty min(s, 0)

    n is the answer's length and budget that of its effort, both in tokens. The gain is proportional to r, so a short
    wrong answer gains nothing; what is lost grows with n without bound.
    """
    given = np.asarray(reward, np.float64)
    score = np.minimum(1.0, weight * (1.0 - np.asarray(length) / budget))
    shaped = given + bonus * given * np.maximum(score, 0.0) + penalty * np.minimum(score, 0.0)
    return np.asarray(shaped, np.float32)


def token_coefficients(
    lengths: Int[np.ndarray, "answers"],
    kept: Bool[np.ndarray, "answers"],
    normalization: Literal["token", "sequence", "constant"],
    constant: int | None = None,
) -> Float[np.ndarray, "answers"]:
    """The factor for each token of an answer; the batch's loss is the sum over tokens of factor times loss.

        token:     1 / tokens of all kept answers          (DAPO, arXiv 2503.14476)
        sequence:  1 / (kept answers * the answer's tokens)  (GRPO, arXiv 2402.03300)
        constant:  1 / (kept answers * constant)           (Dr. GRPO, arXiv 2503.20783; usually the token limit)

    `lengths` counts the tokens that carry loss. Answers that are not kept, or are empty, get 0.
    """
    sizes = lengths.astype(np.float64)
    used = kept & (lengths > 0)
    answers = kept.sum()
    if normalization == "token":
        divisor = np.full(sizes.shape, sizes[kept].sum())
    elif normalization == "sequence":
        divisor = answers * sizes
    else:
        if constant is None or constant < 1:
            raise ValueError(f"constant is {constant}, but normalization 'constant' divides by it")
        divisor = np.full(sizes.shape, float(answers * constant))
    return np.where(used, 1.0 / np.where(used, divisor, 1.0), 0.0).astype(np.float32)


# Tokens: ratios and surrogates.


def token_ratio(log_probs: Float[Array, "tokens"], old: Float[Array, "tokens"]) -> Float[Array, "tokens"]:
    """r_t = pi(t) / pi_old(t)."""
    return jnp.exp(log_probs - old)


def sequence_ratio(
    log_probs: Float[Array, "tokens"],
    old: Float[Array, "tokens"],
    answers: Int[Array, "tokens"],
    count: int,
    mask: Bool[Array, "tokens"],
) -> Float[Array, "tokens"]:
    """s = (pi(answer) / pi_old(answer))^(1 / tokens), at each token of the answer (GSPO, arXiv 2507.18071).

    A token's gradient is s grad log pi(t), that paper's GSPO-token; the gradient of s itself would be, at every token,
    the mean of these over the answer's tokens. Summed over an answer whose tokens share one advantage and one factor,
    as in GSPO, both are the same.
    """
    own = jnp.where(mask, log_probs, 0.0)
    ratio = jnp.exp(_answer_means(own - jnp.where(mask, old, 0.0), answers, count, mask))
    return jax.lax.stop_gradient(ratio)[answers] * jnp.exp(own - jax.lax.stop_gradient(own))


def clipped_loss(
    ratio: Float[Array, "tokens"], advantages: Float[Array, "tokens"], low: float, high: float
) -> Float[Array, "tokens"]:
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO (arXiv 1707.06347), with two bounds as in DAPO (arXiv 2503.14476).

    Written by cases, so that on the bounds and at r = 1 the gradient is that of one branch, not the mean of both.
    """
    bound = clip_binds(ratio, advantages, low, high)
    return -jnp.where(bound, jnp.where(advantages > 0, 1.0 + high, 1.0 - low), ratio) * advantages


def clip_binds(
    ratio: Float[Array, "tokens"], advantages: Float[Array, "tokens"], low: float, high: float
) -> Bool[Array, "tokens"]:
    """True where `clipped_loss` stops a token: A > 0 and r > 1 + high, or A < 0 and r < 1 - low."""
    return ((advantages > 0) & (ratio > 1.0 + high)) | ((advantages < 0) & (ratio < 1.0 - low))


def dual_clip(loss: Float[Array, "tokens"], advantages: Float[Array, "tokens"], bound: float) -> Float[Array, "tokens"]:
    """min(loss, -bound A) where A < 0 (arXiv 1912.09729): no likely bad token can outweigh all others. bound > 1."""
    return jnp.where(advantages < 0, jnp.minimum(loss, -bound * advantages), loss)


def cispo_loss(
    log_probs: Float[Array, "tokens"],
    ratio: Float[Array, "tokens"],
    advantages: Float[Array, "tokens"],
    low: float,
    high: float,
) -> Float[Array, "tokens"]:
    """-sg(clip(r, 1 - low, 1 + high)) A log pi, sg stopping gradients (CISPO, arXiv 2506.13585).

    Only the weight is bounded: every token keeps a gradient.
    """
    return -jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - low, 1.0 + high)) * advantages * log_probs


# Tokens: distances to other policies.


def kl_k1(log_probs: Float[Array, "tokens"], reference: Float[Array, "tokens"]) -> Float[Array, "tokens"]:
    """log(pi / ref), whose mean over samples of pi is KL(pi || ref) (Schulman 2020, "Approximating KL Divergence").

    To be monitored, not minimised: its gradient is that of log pi, whose mean is 0.
    """
    return log_probs - reference


def kl_k2(log_probs: Float[Array, "tokens"], reference: Float[Array, "tokens"]) -> Float[Array, "tokens"]:
    """log(pi / ref)^2 / 2 (Schulman 2020): biased, never negative; its mean gradient is that of KL(pi || ref)."""
    return 0.5 * (log_probs - reference) ** 2


def kl_k3(log_probs: Float[Array, "tokens"], reference: Float[Array, "tokens"]) -> Float[Array, "tokens"]:
    """ref / pi - 1 - log(ref / pi) (Schulman 2020): unbiased like k1, never negative; GRPO's (arXiv 2402.03300)."""
    difference = reference - log_probs
    return jnp.expm1(difference) - difference


def importance_weights(
    trainer: Float[Array, "tokens"], sampler: Float[Array, "tokens"], cap: float
) -> Float[Array, "tokens"]:
    """sg(min(pi_trainer / pi_sampler, cap)): truncated importance sampling against the engines' differing arithmetic.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(trainer - sampler), cap))


def answers_within(
    trainer: Float[Array, "tokens"],
    sampler: Float[Array, "tokens"],
    answers: Int[Array, "tokens"],
    count: int,
    mask: Bool[Array, "tokens"],
    low: float,
    high: float,
) -> Bool[Array, "tokens"]:
    """True where low <= (pi_trainer(answer) / pi_sampler(answer))^(1 / tokens) <= high, at each token of the answer.

    An answer on which the two engines disagree too much is better dropped whole (Liu et al. 2025, "When Speed Kills
    Stability"). An answer without tokens that count has the ratio 1.
    """
    gap = jnp.where(mask, trainer, 0.0) - jnp.where(mask, sampler, 0.0)
    ratio = jnp.exp(_answer_means(gap, answers, count, mask))
    return ((ratio >= low) & (ratio <= high))[answers]


def _answer_means(values: Array, answers: Array, count: int, mask: Array) -> Array:
    """Means over the tokens of each answer, [count] from [tokens]; 0 for an answer without tokens that count."""
    total = jax.ops.segment_sum(jnp.where(mask, values, 0.0), answers, num_segments=count)
    tokens = jax.ops.segment_sum(mask.astype(jnp.float32), answers, num_segments=count)
    return total / jnp.maximum(tokens, 1.0)


# The whole loss.


class PolicyLoss(NamedTuple):
    """The loss of each token, and metrics without gradients; all are 0 where the mask is false.

    Attributes:
      per_token: losses, to be multiplied by `token_coefficients` and summed.
      metrics: values of each token, by name:
        ratio, ratio_abs_log: ratio to the old policy, and the absolute value of its log.
        clipped: 1 where clipping stopped the token, or with CISPO bounded its weight.
        kl: KL to the reference by the settings' estimator; only if there is a reference.
        entropy: entropy of the policy; only if it is given.
        sampler_gap: |old - sampler|; importance: the token's weight; masked_out: 1 where its answer was dropped because
          trainer and sampler disagree. All three only if the sampler's log-probs are given.
    """

    per_token: Float[Array, "tokens"]
    metrics: dict[str, Float[Array, "tokens"]]


def policy_loss(
    settings: PolicySettings,
    log_probs: Float[Array, "tokens"],
    old: Float[Array, "tokens"],
    advantages: Float[Array, "tokens"],
    answers: Int[Array, "tokens"],
    count: int,
    mask: Bool[Array, "tokens"],
    *,
    sampler: Float[Array, "tokens"] | None = None,
    reference: Float[Array, "tokens"] | None = None,
    entropy: Float[Array, "tokens"] | None = None,
) -> PolicyLoss:
    """The loss that the settings ask for: importance * within * surrogate + kl * KL - entropy * H.

    Args:
      advantages: advantage of the answer that a token belongs to.
      answers: index of that answer, from 0 to `count` - 1.
      entropy: H of the policy's distribution at each token, with its gradient.

    Raises `ValueError` where the settings need an argument that is not given.
    """
    policy = settings.resolved
    _check_given(policy, sampler, reference, entropy)

    def cleaned(x: Array) -> Array:
        return jnp.where(mask, x, 0.0).astype(jnp.float32)

    with jax.named_scope("policy_loss"):
        own, old, advantages = cleaned(log_probs), *map(jax.lax.stop_gradient, (cleaned(old), cleaned(advantages)))
        loss, ratio, clipped = _surrogate(policy, own, old, advantages, answers, count, mask)
        metrics = {"ratio": ratio, "ratio_abs_log": jnp.abs(jnp.log(ratio)), "clipped": clipped}
        if sampler is not None:
            theirs = jax.lax.stop_gradient(cleaned(sampler))
            weight, within = jnp.ones_like(loss), jnp.ones_like(mask)
            if policy.importance_cap:
                weight = importance_weights(old, theirs, policy.importance_cap)
            if policy.mask_low or policy.mask_high:
                high = policy.mask_high or float("inf")
                within = answers_within(old, theirs, answers, count, mask, policy.mask_low, high)
            loss = jnp.where(within, weight * loss, 0.0)
            metrics |= {"sampler_gap": jnp.abs(old - theirs), "importance": weight, "masked_out": ~within}
        if reference is not None:
            estimator = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[policy.kl_estimator]
            metrics["kl"] = estimator(own, jax.lax.stop_gradient(cleaned(reference)))
            if policy.kl:
                loss = loss + policy.kl * metrics["kl"]
        if entropy is not None:
            metrics["entropy"] = cleaned(entropy)
            if policy.entropy:
                loss = loss - policy.entropy * metrics["entropy"]
        monitored = {name: jax.lax.stop_gradient(cleaned(value)) for name, value in metrics.items()}
        return PolicyLoss(cleaned(loss), monitored)


def _surrogate(
    policy: ResolvedPolicy, own: Array, old: Array, advantages: Array, answers: Array, count: int, mask: Array
) -> tuple[Array, Array, Array]:
    """Each token's loss, its ratio, and whether the ratio was clipped."""
    ratio = sequence_ratio(own, old, answers, count, mask) if policy.ratio == "sequence" else token_ratio(own, old)
    low, high = policy.clip_low, policy.clip_high
    if policy.surrogate == "cispo":
        outside = (ratio < 1.0 - low) | (ratio > 1.0 + high)
        return cispo_loss(own, ratio, advantages, low, high), ratio, outside
    loss = clipped_loss(ratio, advantages, low, high)
    if policy.dual_clip:
        loss = dual_clip(loss, advantages, policy.dual_clip)
    return loss, ratio, clip_binds(ratio, advantages, low, high)


def _check_given(policy: ResolvedPolicy, sampler: Array | None, reference: Array | None, entropy: Array | None) -> None:
    needs = {
        "importance_cap": (policy.importance_cap, sampler, "sampler"),
        "mask_low": (policy.mask_low, sampler, "sampler"),
        "mask_high": (policy.mask_high, sampler, "sampler"),
        "kl": (policy.kl, reference, "reference"),
        "entropy": (policy.entropy, entropy, "entropy"),
    }
    for field, (value, given, name) in needs.items():
        if value and given is None:
            raise ValueError(f"loss.{field} is {value}, which needs {name}")
