"""Named policy losses match their publications, and impossible settings are refused."""

from dataclasses import dataclass, field, fields, replace

import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.settings.verbs import Verb, parse
from puzzle_jax.train.losses.policy_settings import NAMED, NAMES, PolicySettings


@pytest.mark.parametrize(
    ("name", "ratio", "surrogate", "clip", "scale_by_std", "normalization", "kl", "overlong_filter"),
    [
        ("grpo", "token", "clip", (0.2, 0.2), True, "sequence", 0.04, False),
        ("dapo", "token", "clip", (0.2, 0.28), True, "token", 0.0, True),
        ("dr_grpo", "token", "clip", (0.2, 0.2), False, "constant", 0.0, False),
        ("gspo", "sequence", "clip", (3e-4, 4e-4), True, "sequence", 0.0, False),
        ("cispo", "token", "cispo", (1.0, 4.0), True, "token", 0.0, False),
    ],
)
def test_names_stand_for_what_was_published(
    name, ratio, surrogate, clip, scale_by_std, normalization, kl, overlong_filter
):
    found = PolicySettings(name).resolved
    assert (found.name, found.ratio, found.surrogate, (found.clip_low, found.clip_high)) == (
        name, ratio, surrogate, clip
    )  # fmt: skip
    assert (found.baseline, found.scale_by_std, found.normalization) == ("group_mean", scale_by_std, normalization)
    assert (found.kl, found.kl_estimator, found.overlong_filter) == (kl, "k3", overlong_filter)
    off = ("dual_clip", "advantage_clip", "entropy", "importance_cap", "mask_low", "mask_high", "overlong_cache")
    assert not any(getattr(found, one) for one in off)
    assert found.length_budgets == {}


def test_every_name_resolves_to_settings_that_stand():
    assert set(NAMED) == set(NAMES)
    for name in NAMES:
        found = PolicySettings(name).resolved
        assert isinstance(found, PolicySettings) and found.resolved is found
        assert [one.name for one in fields(found) if getattr(found, one.name) is None] == []
        assert replace(found, kl=0.5).kl == 0.5


def test_what_is_given_comes_before_the_name():
    found = PolicySettings("grpo", kl=0.0, scale_by_std=False, length_budgets={"low": 300}).resolved
    assert (found.kl, found.scale_by_std, found.length_budgets) == (0.0, False, {"low": 300})
    assert (found.clip_low, found.normalization) == (0.2, "sequence")
    assert PolicySettings().resolved.name == "dapo"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "ppo"}, "loss.name is 'ppo', but must be one of grpo, dapo, dr_grpo, gspo, cispo"),
        ({"ratio": "word"}, "loss.ratio is 'word', but must be one of token, sequence"),
        ({"surrogate": "reinforce"}, "loss.surrogate is 'reinforce', but must be one of clip, cispo"),
        ({"baseline": "value"}, "loss.baseline is 'value', but must be one of group_mean, leave_one_out"),
        ({"normalization": "none"}, "loss.normalization is 'none', but must be one of token, sequence, constant"),
        ({"kl_estimator": "k4"}, "loss.kl_estimator is 'k4', but must be one of k1, k2, k3"),
        ({"clip_low": 0.0}, "loss.clip_low is 0.0, but must be above 0 and at most 1"),
        ({"clip_low": 1.5}, "loss.clip_low is 1.5, but must be above 0 and at most 1"),
        ({"clip_high": -0.2}, "loss.clip_high is -0.2, but must be a finite number above 0"),
        ({"clip_high": float("inf")}, "loss.clip_high is inf, but must be a finite number above 0"),
        ({"dual_clip": 1.0}, "loss.dual_clip is 1.0, but must be 0 or a finite number above 1"),
        ({"advantage_clip": -1.0}, "loss.advantage_clip is -1.0, but must be a finite number of at least 0"),
        ({"kl": float("nan")}, "loss.kl is nan, but must be a finite number of at least 0"),
        ({"entropy": -0.1}, "loss.entropy is -0.1, but must be a finite number of at least 0"),
        ({"importance_cap": -2.0}, "loss.importance_cap is -2.0, but must be a finite number of at least 0"),
        ({"mask_low": 1.0}, "loss.mask_low is 1.0, but must be at least 0 and below 1"),
        ({"mask_high": 0.5}, "loss.mask_high is 0.5, but must be 0 or a finite number above 1"),
        ({"overlong_cache": -1}, "loss.overlong_cache is -1, but must be from 0 to 2147483647"),
        ({"length_budgets": {"huge": 9}}, "loss.length_budgets has 'huge', but must be of low, medium, high"),
        ({"length_budgets": {"low": 0}}, "loss.length_budgets.low is 0, but must be at least 1"),
        ({"length_weight": 0.0}, "loss.length_weight is 0.0, but must be a finite number above 0"),
        ({"length_bonus": -1.0}, "loss.length_bonus is -1.0, but must be a finite number of at least 0"),
        ({"length_penalty": -1.0}, "loss.length_penalty is -1.0, but must be a finite number of at least 0"),
        ({"name": "cispo", "dual_clip": 3.0}, "loss.dual_clip is 3.0, but must be 0 where loss.surrogate is 'cispo'"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        PolicySettings(**changes)
    assert str(error.value) == message


@dataclass(frozen=True)
class Recipe:
    loss: PolicySettings = field(default_factory=PolicySettings)


def test_settings_come_from_a_command_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("loss: {name: gspo, scale_by_std: false, length_budgets: {low: 300, high: 7000}, clip_high: 0.5}\n")
    arguments = ["--recipe", str(file), "--loss.kl", "0.5", "--loss.clip_high", "null"]
    verb = Verb("test", "", f"{__name__}:Recipe", "", (), "")
    found = parse(verb, arguments)
    budgets = {"low": 300, "high": 7000}
    assert found.loss == PolicySettings("gspo", scale_by_std=False, length_budgets=budgets, kl=0.5)
    assert found.loss.resolved.clip_high == 4e-4
    with pytest.raises(ConfigError, match=r"loss\.ratio is 'word'"):
        parse(verb, ["--loss.ratio", "word"])
