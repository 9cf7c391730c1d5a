"""The choice of a loss for reinforcement learning, and its numbers.

A name stands for the settings that its authors published; any other setting given overrides them. `losses.policy`
defines what the numbers mean.

| name | ratio, surrogate | clip | baseline | divided by | else |
|---|---|---|---|---|---|
| grpo (arXiv 2402.03300) | token, clip | 0.2 / 0.2 | mean, std | each answer's length | KL 0.04 by k3 |
| dapo (arXiv 2503.14476) | token, clip | 0.2 / 0.28 | mean, std | tokens of the batch | overlong filter |
| dr_grpo (arXiv 2503.20783) | token, clip | 0.2 / 0.2 | mean | a constant length | |
| gspo (arXiv 2507.18071) | sequence, clip | 3e-4 / 4e-4 | mean, std | each answer's length | |
| cispo (arXiv 2506.13585) | token, cispo | 1 / 4 | mean, std | tokens of the batch | |

GRPO's paper does not state its clip range; PPO's is used here. DAPO's soft penalty is left to `overlong_cache`, because
the published 4096 tokens of 20480 only mean something relative to a limit. CISPO sets no lower bound; its upper bound
was tuned but not published: weights of up to 5 are a choice of this file, and results depend little on it
(arXiv 2510.13786, appendix A.17).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from types import MappingProxyType
from typing import Any, Literal

from puzzle_jax.errors import MOST_TOKENS, ConfigError, check_range
from puzzle_jax.tasks.base import EFFORTS

NAMES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "name": NAMES,
        "ratio": ("token", "sequence"),
        "surrogate": ("clip", "cispo"),
        "baseline": ("group_mean", "leave_one_out"),
        "normalization": ("token", "sequence", "constant"),
        "kl_estimator": ("k1", "k2", "k3"),
    }
)
"""Allowed values of the settings that are strings."""

_LARGEST = 1e6  # bound on float settings, so that products with rewards and lengths stay within float32


@dataclass(frozen=True)
class PolicySettings:
    """The loss of a policy; None stands for the named loss's value.

    Attributes:
      name: one of `NAMES`.
      ratio: probability ratio to the policy being improved on, of each "token" or of the whole answer ("sequence").
      surrogate: "clip" stops tokens whose ratio has moved too far, "cispo" only bounds their weight.
      clip_low, clip_high: ratios from 1 - clip_low to 1 + clip_high are not clipped.
      dual_clip: bound on the loss of answers worse than the baseline, in multiples of their advantage; 0 is off.
      baseline: "group_mean" or "leave_one_out", over all answers to a prompt.
      scale_by_std: divides advantages by the standard deviation of the group's rewards.
      normalization: "token" is the mean over the batch's tokens; "sequence" is the mean over answers of each answer's
        mean; "constant" is the mean over answers of each answer's sum divided by a constant length.
      advantage_clip: largest absolute advantage; 0 is off.
      kl, kl_estimator: weight of the KL divergence to the reference policy (0: no such term), and its estimator.
      entropy: weight of the entropy bonus.
      importance_cap: cap on the importance weight that corrects for the sampler's different probabilities; 0 is off.
      mask_low, mask_high: bounds on the ratio per token of an answer's probabilities under trainer and sampler; answers
        outside them carry no loss; 0 is no bound.
      overlong_filter: answers cut off by the token limit carry no loss, but count in the baseline.
      overlong_cache: number of tokens before the limit over which a penalty rises from 0 to 1; 0 is off.
      length_budgets: length in tokens, by effort, below which correct answers gain and above which all answers lose;
        efforts that are not named have none.
      length_weight, length_bonus, length_penalty: slope of the length reward, factor on gains, and factor on losses.
    """

    name: str = "dapo"
    ratio: str | None = None
    surrogate: str | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    baseline: str | None = None
    scale_by_std: bool | None = None
    normalization: str | None = None
    advantage_clip: float | None = None
    kl: float | None = None
    kl_estimator: str | None = None
    entropy: float | None = None
    importance_cap: float | None = None
    mask_low: float | None = None
    mask_high: float | None = None
    overlong_filter: bool | None = None
    overlong_cache: int | None = None
    length_budgets: Mapping[str, int] = field(default_factory=dict)
    length_weight: float | None = None
    length_bonus: float | None = None
    length_penalty: float | None = None

    def __post_init__(self) -> None:
        for name, values in CHOICES.items():
            self._check(name, lambda value, values=values: value in values, f"one of {', '.join(values)}")
        self._check("clip_low", lambda value: 0 < value <= 1, "above 0 and at most 1")
        self._check("clip_high", lambda value: value > 0, "a finite number above 0")
        self._check("dual_clip", lambda value: value == 0 or value > 1, "0 or a finite number above 1")
        self._check("mask_low", lambda value: 0 <= value < 1, "at least 0 and below 1")
        self._check("mask_high", lambda value: value == 0 or value > 1, "0 or a finite number above 1")
        for name in ("advantage_clip", "kl", "entropy", "importance_cap", "length_bonus", "length_penalty"):
            self._check(name, lambda value: value >= 0, "a finite number of at least 0")
        self._check("length_weight", lambda value: value > 0, "a finite number above 0")
        self._check("overlong_cache", lambda value: 0 <= value <= MOST_TOKENS, f"from 0 to {MOST_TOKENS}")
        for effort, budget in self.length_budgets.items():
            if effort not in EFFORTS:
                raise ConfigError(f"loss.length_budgets has {effort!r}, but must be of {', '.join(EFFORTS)}")
            check_range(f"loss.length_budgets.{effort}", budget, 1, MOST_TOKENS)
        policy = self.resolved
        if policy.surrogate == "cispo" and policy.dual_clip:
            raise ConfigError(f"loss.dual_clip is {policy.dual_clip}, but must be 0 where loss.surrogate is 'cispo'")

    def _check(self, name: str, holds: Callable[[Any], bool], wanted: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not holds(value) or (isinstance(value, float) and not isfinite(value)):
            raise ConfigError(f"loss.{name} is {value!r}, but must be {wanted}")
        if isinstance(value, float) and value > _LARGEST:
            raise ConfigError(f"loss.{name} is {value!r}, but must be at most {_LARGEST:g}")

    @property
    def resolved(self) -> ResolvedPolicy:
        """These settings, with the named loss's values in place of None."""
        given = {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}
        return ResolvedPolicy(**{**NAMED[self.name], **given})


@dataclass(frozen=True)
class ResolvedPolicy(PolicySettings):
    """Settings without None; the defaults are what most published losses have in common."""

    ratio: Literal["token", "sequence"] = "token"
    surrogate: Literal["clip", "cispo"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    baseline: Literal["group_mean", "leave_one_out"] = "group_mean"
    scale_by_std: bool = True
    normalization: Literal["token", "sequence", "constant"] = "token"
    advantage_clip: float = 0.0
    kl: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy: float = 0.0
    importance_cap: float = 0.0
    mask_low: float = 0.0
    mask_high: float = 0.0
    overlong_filter: bool = False
    overlong_cache: int = 0
    length_weight: float = 1.0
    length_bonus: float = 1.0
    length_penalty: float = 1.0

    @property
    def resolved(self) -> ResolvedPolicy:
        return self


NAMED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "grpo": {"clip_low": 0.2, "clip_high": 0.2, "normalization": "sequence", "kl": 0.04},
        "dapo": {"clip_low": 0.2, "clip_high": 0.28, "normalization": "token", "overlong_filter": True},
        "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "scale_by_std": False, "normalization": "constant"},
        "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "normalization": "sequence"},
        "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "normalization": "token"},
    }
)
"""Settings of each named loss; the others are the defaults of `ResolvedPolicy`."""
