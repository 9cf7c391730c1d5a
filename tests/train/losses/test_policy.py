"""Definitions of policy losses against numbers worked out by hand and against float64 loops."""

from functools import cache, partial
from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from puzzle_jax.train.losses import policy as losses
from puzzle_jax.train.losses.policy_settings import NAMES, PolicySettings

GROUPS, ANSWERS = 3, 4
TOKENS, COUNT = 13, 5
OF_ANSWER = np.array([0, 0, 0, 2, 2, 2, 2, 2, 1, 4, 4, 4, 4])  # answer 3 has no tokens
few = settings(max_examples=25, deadline=None)


def f32(values):
    return jnp.asarray(values, jnp.float32)


def eighths(least, most, shape: int | tuple[int, ...] = TOKENS):
    """Numbers that float32 represents exactly, so that rounding decides no comparison with a bound."""
    return hnp.arrays(np.int64, shape, elements=st.integers(8 * least, 8 * most)).map(lambda x: x / 8)


LOG_PROBS, MASKS = eighths(-3, 0), hnp.arrays(bool, TOKENS)
ADVANTAGES = eighths(-2, 2, COUNT).map(lambda of_answer: of_answer[OF_ANSWER])
REWARDS = hnp.arrays(np.float64, (GROUPS, ANSWERS), elements=st.floats(-5, 5, width=16))
COUNTED = hnp.arrays(bool, (GROUPS, ANSWERS))


# Answers: rewards, advantages, factors.


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0, np.nan, 2.0], [0.1, 0.1, 0.1, 0.1], [5.0, np.nan, np.nan, np.nan]])
    counted = ~np.isnan(rewards)
    of = partial(losses.group_advantages, rewards, counted)
    plain = of(baseline="group_mean", scale_by_std=False)
    assert plain.dtype == np.float32
    np.testing.assert_array_equal(plain, [[0, -1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(of(baseline="leave_one_out", scale_by_std=False)[0], [0, -1.5, 0, 1.5])
    scaled = of(baseline="group_mean", scale_by_std=True)  # std is sqrt(2 / 3) = 0.8164966
    np.testing.assert_allclose(scaled[0], [0, -1.2247434, 0, 1.2247434], rtol=1e-6)
    np.testing.assert_array_equal(scaled[1:], 0.0)
    clipped = of(baseline="leave_one_out", scale_by_std=False, clip=0.25)
    np.testing.assert_array_equal(clipped[0], [0, -0.25, 0, 0.25])


@few
@given(rewards=REWARDS, counted=COUNTED, scale=st.booleans(), baseline=st.sampled_from(["group_mean", "leave_one_out"]))
def test_advantages_are_those_of_a_loop(rewards, counted, scale, baseline):
    found = losses.group_advantages(np.where(counted, rewards, np.nan), counted, baseline=baseline, scale_by_std=scale)
    for group, known, advantages in zip(rewards, counted, found, strict=True):
        assert not advantages[~known].any()
        values = group[known]
        if len(set(values)) < 2:
            np.testing.assert_array_equal(advantages, 0.0)
            continue
        for i, advantage in zip(np.flatnonzero(known), advantages[known], strict=True):
            others = [group[j] for j in np.flatnonzero(known) if baseline == "group_mean" or j != i]
            expected = group[i] - sum(others) / len(others)
            expected /= values.std() + 1e-6 if scale else 1.0
            assert advantage == pytest.approx(expected, rel=1e-5, abs=1e-6)


@few
@given(rewards=REWARDS, counted=COUNTED)
def test_advantages_over_the_mean_add_up_to_nothing_and_leaving_one_out_scales_them(rewards, counted):
    mean, left_out = (
        losses.group_advantages(rewards, counted, baseline=baseline, scale_by_std=False).astype(np.float64)
        for baseline in ("group_mean", "leave_one_out")
    )
    np.testing.assert_allclose(mean.sum(-1), 0.0, atol=1e-5)
    n = counted.sum(-1, keepdims=True)
    np.testing.assert_allclose(left_out, mean * n / np.maximum(n - 1, 1), rtol=1e-6)


@few
@given(reward=st.floats(-5, 5), size=st.integers(1, 7), scale=st.booleans())
def test_equal_rewards_teach_exactly_nothing(reward, size, scale):
    rewards, counted = np.full((1, size), reward), np.ones((1, size), bool)
    for baseline in ("group_mean", "leave_one_out"):
        found = losses.group_advantages(rewards, counted, baseline=baseline, scale_by_std=scale)
        np.testing.assert_array_equal(found, 0.0)


def test_overlong_penalty_by_hand():
    lengths = np.array([5, 12, 13, 16, 20, 25])
    np.testing.assert_array_equal(losses.overlong_penalty(lengths, 20, 8), [0, 0, -0.125, -0.5, -1, -1])
    np.testing.assert_array_equal(losses.overlong_penalty(lengths, 20, 0), 0.0)
    assert float(losses.overlong_penalty(16, 20, 8)) == -0.5


def test_effort_length_reward_by_hand():
    """At 25 of 100 tokens the score is capped at 1, at 80 it is 0.4, at 150 it is -1."""
    rewards, lengths = np.array([[1.0, 1, 1], [0, 0, 0]]), np.array([[25, 80, 150], [25, 80, 150]])
    of = partial(losses.effort_length_reward, weight=2.0, bonus=0.5, penalty=3.0)
    np.testing.assert_allclose(of(rewards, lengths, 100), [[1.5, 1.2, -2], [0, 0, -3]], rtol=1e-6)
    np.testing.assert_allclose(of(rewards, lengths, 4 * lengths), [[1.5] * 3, [0] * 3], rtol=1e-6)
    assert float(of(1.0, 80, 100)) == pytest.approx(1.2)


def test_token_coefficients_by_hand():
    lengths, kept = np.array([2, 5, 3, 0, 7]), np.array([True, True, False, True, True])
    of = partial(losses.token_coefficients, lengths, kept)
    assert of("token").dtype == np.float32
    np.testing.assert_allclose(of("token"), [1 / 14, 1 / 14, 0, 0, 1 / 14], rtol=1e-6)
    np.testing.assert_allclose(of("sequence"), [1 / 8, 1 / 20, 0, 0, 1 / 28], rtol=1e-6)
    np.testing.assert_allclose(of("constant", 10), [1 / 40, 1 / 40, 0, 0, 1 / 40], rtol=1e-6)
    for normalization in ("token", "sequence", "constant"):
        nothing = losses.token_coefficients(lengths, np.zeros(5, bool), normalization, 10)
        np.testing.assert_array_equal(nothing, 0.0)
    with pytest.raises(ValueError, match="constant is None"):
        of("constant")


@few
@given(
    lengths=hnp.arrays(np.int64, 6, elements=st.integers(1, 99)), kept=hnp.arrays(bool, 6), constant=st.integers(1, 50)
)
def test_token_coefficients_form_the_published_means(lengths, kept, constant):
    value = np.arange(1.0, 7.0)  # loss of each token, by answer

    def total(*normalization):
        return (losses.token_coefficients(lengths, kept, *normalization).astype(float) * lengths * value).sum()

    if not kept.any():
        assert total("token") == total("sequence") == total("constant", constant) == 0.0
        return
    of_tokens = np.concatenate([np.full(n, v) for n, v in zip(lengths[kept], value[kept], strict=True)])
    assert total("token") == pytest.approx(of_tokens.mean(), rel=1e-5)
    assert total("sequence") == pytest.approx(value[kept].mean(), rel=1e-5)
    assert total("constant", constant) == pytest.approx((lengths * value)[kept].mean() / constant, rel=1e-5)


# Tokens, by hand.


def test_ratios_by_hand():
    new, old = f32(np.log([0.4, 0.5, 0.2, 0.9, 0.1])), f32(np.log([0.1, 0.5, 0.4, 0.3, 0.8]))
    np.testing.assert_allclose(losses.token_ratio(new, old), [4, 1, 0.5, 3, 0.125], rtol=1e-6)
    answers, mask = jnp.asarray([0, 0, 2, 2, 2]), jnp.asarray([True, True, True, False, True])
    ratio = losses.sequence_ratio(new, old, answers, 3, mask)
    np.testing.assert_allclose(ratio, [2, 2, 0.25, 0.25, 0.25], rtol=1e-6)  # roots of 4 * 1 and of 0.5 * 0.125


def test_clipping_by_hand():
    ratio, better, worse = f32([1.5, 0.5, 1.1, 5.0]), f32([2.0] * 4), f32([-2.0] * 4)
    of_better, of_worse = (losses.clipped_loss(ratio, a, 0.2, 0.3) for a in (better, worse))
    np.testing.assert_allclose(of_better, [-2.6, -1.0, -2.2, -2.6], rtol=1e-6)
    np.testing.assert_allclose(of_worse, [3.0, 1.6, 2.2, 10.0], rtol=1e-6)
    np.testing.assert_array_equal(losses.clip_binds(ratio, better, 0.2, 0.3), [True, False, False, True])
    np.testing.assert_array_equal(losses.clip_binds(ratio, worse, 0.2, 0.3), [False, True, False, False])
    np.testing.assert_allclose(losses.dual_clip(of_worse, worse, 3.0), [3.0, 1.6, 2.2, 6.0], rtol=1e-6)
    np.testing.assert_array_equal(losses.dual_clip(of_better, better, 3.0), of_better)


def test_cispo_by_hand():
    log_probs, ratio, advantages = f32([-2.0, -3.0, -0.5]), f32([0.25, 9.0, 1.5]), f32([2.0, 1.0, -4.0])
    found, gradient = jax.value_and_grad(
        lambda x: (f32([1, 10, 100]) * losses.cispo_loss(x, ratio, advantages, 1.0, 4.0)).sum()
    )(log_probs)
    assert float(found) == 1 * 1.0 + 10 * 15.0 + 100 * -3.0
    np.testing.assert_array_equal(gradient, [1 * -0.5, 10 * -5.0, 100 * 6.0])
    lifted = losses.cispo_loss(log_probs, ratio, advantages, 0.5, 0.25)  # weights 0.5, 1.25 and 1.25
    np.testing.assert_array_equal(lifted, [2.0, 3.75, -2.5])


def test_kl_estimators_by_hand():
    new, reference = f32([log(0.5)]), f32([log(0.25)])
    for estimator, expected in ((losses.kl_k1, 0.6931472), (losses.kl_k2, 0.2402265), (losses.kl_k3, 0.1931472)):
        assert float(estimator(new, reference)[0]) == pytest.approx(expected, rel=1e-5)
        assert float(estimator(new, new)[0]) == 0.0


def test_corrections_for_the_sampler_by_hand():
    trainer, sampler = f32(np.log([0.4, 0.5, 0.2, 0.9, 0.1])), f32(np.log([0.1, 0.5, 0.4, 0.3, 0.8]))
    np.testing.assert_allclose(losses.importance_weights(trainer, sampler, 2.5), [2.5, 1, 0.5, 2.5, 0.125], rtol=1e-6)
    gradient = jax.grad(lambda x: losses.importance_weights(x, sampler, 2.5).sum())(trainer)
    np.testing.assert_array_equal(gradient, 0.0)
    answers, mask = jnp.asarray([0, 0, 2, 2, 2]), jnp.asarray([True, True, True, False, True])
    of = partial(losses.answers_within, trainer, sampler, answers, 3, mask)  # ratios 2 and 0.25
    np.testing.assert_array_equal(of(0.2, 2.1), [True] * 5)
    np.testing.assert_array_equal(of(0.3, 2.1), [True, True, False, False, False])
    np.testing.assert_array_equal(of(0.2, 1.9), [False, False, True, True, True])


# Tokens, over many inputs.


@few
@given(new=LOG_PROBS, old=LOG_PROBS, mask=MASKS)
def test_sequence_ratio_is_the_root_of_the_product(new, old, mask):
    ratio = np.asarray(sequence_ratio(f32(new), f32(old), mask))
    for answer in set(OF_ANSWER):
        own = mask & (answer == OF_ANSWER)
        expected = np.prod(np.exp(new - old)[own]) ** (1 / max(own.sum(), 1))
        np.testing.assert_allclose(ratio[answer == OF_ANSWER], expected, rtol=1e-5)


@jax.jit
def sequence_ratio(new, old, mask):
    return losses.sequence_ratio(new, old, jnp.asarray(OF_ANSWER), COUNT, mask)


@few
@given(new=LOG_PROBS, old=LOG_PROBS, advantages=ADVANTAGES, mask=MASKS)
def test_gradient_of_the_sequence_ratio_is_that_of_the_published_loss(new, old, advantages, mask):
    """There, s has gradients through every token of the answer."""
    arguments = f32(new), f32(old), f32(advantages), jnp.asarray(mask)
    np.testing.assert_allclose(of_ours(*arguments), of_paper(*arguments), rtol=1e-5, atol=1e-6)


FACTORS = np.array([0.5, 2.0, 1.0, 8.0, 0.25])  # by answer


@jax.jit
@jax.grad
def of_ours(new, old, advantages, mask):
    ratio = losses.sequence_ratio(new, old, jnp.asarray(OF_ANSWER), COUNT, mask)
    return jnp.sum(jnp.where(mask, FACTORS[OF_ANSWER] * losses.clipped_loss(ratio, advantages, 0.3, 0.4), 0.0))


@jax.jit
@jax.grad
def of_paper(new, old, advantages, mask):
    total = 0.0
    for answer in set(OF_ANSWER):
        own = mask & (answer == OF_ANSWER)
        tokens = jnp.sum(own)
        s = jnp.exp(jnp.sum(jnp.where(own, new - old, 0.0)) / jnp.maximum(tokens, 1))
        a = advantages[list(OF_ANSWER).index(answer)]
        total += FACTORS[answer] * tokens * jnp.minimum(s * a, jnp.clip(s, 0.7, 1.4) * a)
    return -total


@few
@given(
    ratio=hnp.arrays(np.float32, TOKENS, elements=st.floats(0, 8, width=32)),
    advantages=eighths(-2, 2),
    low=st.sampled_from([0.2, 1.0]),
    high=st.sampled_from([0.28, 4.0]),
)
def test_clipped_loss_is_the_smaller_of_two_and_dual_clip_bounds_it(ratio, advantages, low, high):
    r, a = ratio.astype(np.float64), advantages
    expected = -np.minimum(r * a, np.clip(r, 1 - low, 1 + high) * a)
    found = clipped_loss(f32(ratio), f32(a), low, high)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    dual = np.asarray(dual_clip(found, f32(a), 3.0))
    np.testing.assert_allclose(dual, np.where(a < 0, np.minimum(expected, -3 * a), expected), rtol=1e-5, atol=1e-6)
    assert np.all(dual[a < 0] <= -3 * a[a < 0])
    assert np.all(dual <= np.asarray(found))


# One program each; as separate operations, they would be compiled one by one.
clipped_loss = jax.jit(losses.clipped_loss, static_argnums=(2, 3))
dual_clip = jax.jit(losses.dual_clip, static_argnums=2)


@few
@given(
    new=hnp.arrays(np.float32, TOKENS, elements=st.floats(-9, 0, width=32)),
    reference=hnp.arrays(np.float32, TOKENS, elements=st.floats(-9, 0, width=32)),
)
def test_kl_estimators_are_their_formulas(new, reference):
    k1, k2, k3 = (np.asarray(k) for k in estimators(f32(new), f32(reference)))
    d = new.astype(np.float64) - reference.astype(np.float64)
    np.testing.assert_allclose(k1, d, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(k2, d * d / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(k3, np.exp(-d) - 1 + d, rtol=1e-4, atol=1e-5)
    assert np.all(k2 >= 0) and np.all(k3 >= 0)


@jax.jit
def estimators(new, reference):
    return losses.kl_k1(new, reference), losses.kl_k2(new, reference), losses.kl_k3(new, reference)


@few
@given(logits=eighths(-3, 3, (2, 7)))
def test_k1_and_k3_have_the_mean_of_the_kl(logits):
    log_p, log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    p = np.exp(log_p)
    k1, k2, k3 = (np.asarray(k, np.float64) for k in estimators(f32(log_p), f32(log_q)))
    kl = (p * (log_p - log_q)).sum()
    assert (p * k1).sum() == pytest.approx(kl, rel=1e-5, abs=1e-5)
    assert (p * k3).sum() == pytest.approx(kl, rel=1e-5, abs=1e-5)
    assert (p * k2).sum() == pytest.approx((p * (log_p - log_q) ** 2).sum() / 2, rel=1e-5, abs=1e-5)


# The whole loss.

EVERYTHING = {
    "plain": PolicySettings("dapo"),
    "grpo": PolicySettings("grpo"),
    "gspo": PolicySettings("gspo", kl=0.25, kl_estimator="k2", importance_cap=1.5, entropy=0.125),
    "cispo": PolicySettings("cispo", clip_low=0.5, clip_high=0.75, kl=0.5, kl_estimator="k1", mask_high=1.4),
    "all": PolicySettings(
        "dapo", dual_clip=2.5, kl=0.125, entropy=0.5, importance_cap=2.0, mask_low=0.6, mask_high=1.7
    ),
    "sequence cispo": PolicySettings("cispo", ratio="sequence", clip_high=0.5, mask_low=0.7),
}
COEFFICIENTS = np.arange(1, TOKENS + 1) / 16


@cache
def program(name):
    """One program for the loss, its metrics, and gradients of sum_t coefficient_t loss_t in log-probs and entropy."""

    def of(new, entropy, old, advantages, answers, mask, sampler, reference):
        whole = losses.policy_loss(
            EVERYTHING[name], new, old, advantages, answers, COUNT, mask,
            sampler=sampler, reference=reference, entropy=entropy,
        )  # fmt: skip
        return jnp.sum(f32(COEFFICIENTS) * whole.per_token), whole

    return jax.jit(jax.grad(of, argnums=(0, 1), has_aux=True))


def by_loop(policy, new, entropy, old, advantages, mask, sampler, reference):
    """Losses, their gradients in the token's log-prob, and metrics, one token at a time."""
    loss, gradient, metrics = np.zeros(TOKENS), np.zeros(TOKENS), {}

    def mean_over_answer(values, t):
        own = mask & (OF_ANSWER[t] == OF_ANSWER)
        return values[own].sum() / own.sum()

    for t in np.flatnonzero(mask):
        a, change = advantages[t], new - old
        r = exp(mean_over_answer(change, t) if policy.ratio == "sequence" else change[t])
        low, high = 1 - policy.clip_low, 1 + policy.clip_high
        if policy.surrogate == "cispo":
            weight = min(max(r, low), high)
            clipped = weight != r
            loss[t], gradient[t] = -weight * a * new[t], -weight * a
        else:
            clipped = bool((a > 0 and r > high) or (a < 0 and r < low))
            loss[t], gradient[t] = -min(r * a, min(max(r, low), high) * a), 0.0 if clipped else -r * a
            if policy.dual_clip and a < 0 and loss[t] > -policy.dual_clip * a:
                loss[t], gradient[t] = -policy.dual_clip * a, 0.0
        gap = mean_over_answer(old - sampler, t)
        dropped = exp(gap) < policy.mask_low or (policy.mask_high > 0 and exp(gap) > policy.mask_high)
        weight = min(exp(old[t] - sampler[t]), policy.importance_cap) if policy.importance_cap else 1.0
        loss[t], gradient[t] = (0.0, 0.0) if dropped else (weight * loss[t], weight * gradient[t])
        d = new[t] - reference[t]
        kl, slope = {"k1": (d, 1.0), "k2": (d * d / 2, d), "k3": (exp(-d) - 1 + d, 1 - exp(-d))}[policy.kl_estimator]
        loss[t] += policy.kl * kl - policy.entropy * entropy[t]
        gradient[t] += policy.kl * slope
        seen = {
            "ratio": r, "ratio_abs_log": abs(log(r)), "clipped": clipped, "kl": kl, "entropy": entropy[t],
            "sampler_gap": abs(old[t] - sampler[t]), "importance": weight, "masked_out": dropped,
        }  # fmt: skip
        for name, value in seen.items():
            metrics.setdefault(name, np.zeros(TOKENS))[t] = value
    return loss, gradient, metrics


@pytest.mark.parametrize("name", EVERYTHING)
@settings(max_examples=20, deadline=None)
@given(
    new=LOG_PROBS,
    entropy=eighths(0, 3),
    old=LOG_PROBS,
    advantages=ADVANTAGES,
    mask=MASKS,
    sampler=LOG_PROBS,
    reference=LOG_PROBS,
)
def test_policy_loss_is_that_of_a_loop(name, new, entropy, old, advantages, mask, sampler, reference):
    policy = EVERYTHING[name].resolved
    loss, slope, metrics = by_loop(policy, new, entropy, old, advantages, mask, sampler, reference)
    arguments = f32(new), f32(entropy), f32(old), f32(advantages), jnp.asarray(OF_ANSWER), jnp.asarray(mask)
    (by_new, by_entropy), found = program(name)(*arguments, f32(sampler), f32(reference))
    np.testing.assert_allclose(found.per_token, loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_new, COEFFICIENTS * slope, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_entropy, -policy.entropy * COEFFICIENTS * mask, rtol=1e-6)
    for key, values in found.metrics.items():
        expected = metrics.get(key, np.zeros(TOKENS))  # no metrics if no token counts
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5, err_msg=key)
    assert set(metrics) <= set(found.metrics)


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nothing_that_is_masked_reaches_the_loss(name, poison):
    rng = np.random.default_rng(3)
    new, old, sampler, reference = -rng.random((4, TOKENS))
    mask = np.arange(TOKENS) % 3 != 1
    values = [new, rng.random(TOKENS), old, rng.standard_normal(COUNT)[OF_ANSWER], sampler, reference]

    def of(values, answers):
        first, rest = [f32(v) for v in values[:4]], [f32(v) for v in values[4:]]
        return program(name)(*first, jnp.asarray(answers), jnp.asarray(mask), *rest)

    clean = of(values, OF_ANSWER)
    poisoned = of([np.where(mask, v, poison) for v in values], np.where(mask, OF_ANSWER, 999))
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
    for leaf in jax.tree.leaves(poisoned):
        assert np.isfinite(leaf).all() and not np.asarray(leaf)[~mask].any()


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_the_ratio_is_one_and_the_gradient_the_plain_one_exactly(name):
    rng = np.random.default_rng(5)
    new, coefficients = f32(-rng.random(TOKENS)), f32(rng.random(TOKENS))
    advantages, mask = f32(rng.standard_normal(COUNT)[OF_ANSWER]), jnp.arange(TOKENS) % 5 != 3
    chosen = PolicySettings(name, kl=0.0, dual_clip=0.0 if name == "cispo" else 3.0)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def of(log_probs):
        old = jax.lax.stop_gradient(log_probs)
        found = losses.policy_loss(chosen, log_probs, old, advantages, jnp.asarray(OF_ANSWER), COUNT, mask)
        return jnp.sum(coefficients * found.per_token), found

    gradient, found = of(new)
    np.testing.assert_array_equal(gradient, np.where(mask, -np.asarray(advantages * coefficients), 0.0))
    np.testing.assert_array_equal(found.metrics["ratio"], np.asarray(mask, np.float32))
    assert set(found.metrics) == {"ratio", "ratio_abs_log", "clipped"}
    assert not np.any(found.metrics["ratio_abs_log"]) and not np.any(found.metrics["clipped"])


def test_losses_of_bfloat16_are_float32():
    half = jnp.asarray([-1.0, -0.5, -2.0], jnp.bfloat16)
    found = losses.policy_loss(
        PolicySettings("gspo"), half, half, half, jnp.asarray([0, 1, 1]), 2, jnp.ones(3, bool), reference=half
    )
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(found.per_token, [1.0, 0.5, 2.0])


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"importance_cap": 2.0}, "sampler"),
        ({"mask_low": 0.5}, "sampler"),
        ({"mask_high": 2.0}, "sampler"),
        ({"kl": 0.5}, "reference"),
        ({"entropy": 0.5}, "entropy"),
    ],
)
def test_what_the_settings_need_must_be_given(changes, missing):
    (field, value), x = next(iter(changes.items())), jnp.zeros(3)
    with pytest.raises(ValueError, match=f"loss.{field} is {value}, which needs {missing}"):
        losses.policy_loss(PolicySettings(**changes), x, x, x, jnp.zeros(3, int), 1, jnp.ones(3, bool))
