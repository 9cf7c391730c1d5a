"""Rotary settings of a config.json, as transformers standardises them (`RotaryEmbeddingConfigMixin` of 5.x).

They are given in `rope_scaling` beside `rope_theta`, or together in `rope_parameters`. Where both tables are given,
transformers takes the first and other runtimes the second, so they must agree; so must a number that stands both
inside a table and beside it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace

from puzzle_jax.config import RopeConfig
from puzzle_jax.convert_hf.configuration.fields import Fields
from puzzle_jax.errors import CheckpointError, shown
from puzzle_jax.files import Json

ORIGINAL = "original_max_position_embeddings"
_LAYER_TYPES = ("sliding_attention", "full_attention")


@dataclass(frozen=True)
class Defaults:
    """The values that a family takes for rotary settings that a file does not give.

    Attributes:
      absent: the settings of a file without any.
      plain: those without scaling, where a file says so.
      max_position: the value of `max_position_embeddings`.
    """

    absent: RopeConfig
    plain: RopeConfig
    max_position: int


def parse_rope(fields: Fields, defaults: Defaults) -> RopeConfig:
    """Rotary settings as transformers standardises them; refused where two places contradict each other."""
    _refuse_partial(fields)
    old, new = fields.table("rope_scaling"), fields.table("rope_parameters")
    theta = fields.rotary("rope_theta", defaults.absent.theta)
    found = [(table, _scaling(fields, table, theta, defaults)) for table in (old, new) if table and table.data]
    if not found:
        scaled = defaults.absent.factor != 1.0
        if scaled and new is not None:
            raise fields.fail("rope_parameters", "must have rope_type; yarn and default are supported")
        if scaled and "rope_scaling" in fields.data:  # plain in transformers 4, the family's defaults in 5
            rule = 'releases of transformers differ in what that means; {"rope_type": "default"} is no scaling'
            raise fields.fail("rope_scaling", rule)
        return replace(defaults.absent, theta=theta)
    (first, rope), *others = found
    for table, other in others:
        for name in (field.name for field in dataclasses.fields(RopeConfig)):
            one, two = getattr(rope, name), getattr(other, name)
            if one != two:
                raise CheckpointError(
                    f"{fields.source}: {first.prefix[:-1]} and {table.prefix[:-1]} contradict each other ({name} is "
                    f"{one} and {two}); remove the one that does not count"
                )
    return rope


def _scaling(fields: Fields, table: Fields, theta: float, defaults: Defaults) -> RopeConfig:
    """The settings of one of the two tables.

    Args:
      fields: the fields of the whole file.
      table: `rope_scaling` or `rope_parameters`, not empty.
      theta: the base given beside the tables, or the default.
    """
    for name in _LAYER_TYPES:
        if name in table.data:
            raise table.fail(name, "only one setting for all layers is supported")
    _refuse_partial(table)
    inside = table.rotary("rope_theta", theta)
    if "rope_theta" in fields.data and inside != theta:
        raise table.fail("rope_theta", f"rope_theta beside it is {theta}; they must be equal")
    kind_field = "rope_type" if "rope_type" in table.data else "type"
    if kind_field not in table.data:
        raise table.fail("rope_type", "it must be given; yarn and default are supported")
    kind = table.string(kind_field)
    if kind == "default":
        return replace(defaults.plain, theta=inside)
    if kind != "yarn":
        raise table.fail(kind_field, "only yarn and default are supported")
    rope = RopeConfig(
        theta=inside,
        factor=table.rotary("factor"),
        beta_fast=_beta(table, "beta_fast", 32.0),
        beta_slow=_beta(table, "beta_slow", 1.0),
        original_context=_original_context(fields, table, defaults),
        truncate=table.boolean("truncate", True),
    )
    for field in ("mscale", "mscale_all_dim"):
        if table.data.get(field) is not None:
            raise table.fail(field, "only the standard attention factor of YaRN is supported")
    if table.data.get("attention_factor") is not None:
        given = table.number("attention_factor")
        if not math.isclose(given, rope.magnitude, rel_tol=1e-6):
            raise table.fail("attention_factor", f"only YaRN's own, {rope.magnitude:.6f}, is supported")
    return rope


def _beta(table: Fields, name: str, default: float) -> float:
    """A bound of the ramp; these are the only numbers for which null means the default."""
    return default if table.data.get(name) is None else table.rotary(name)


def _original_context(fields: Fields, table: Fields, defaults: Defaults) -> int:
    """The context before extension; where it is not given, transformers takes the extended one.

    A file that gives `initial_context_length` alone, as OpenAI's own form does, is refused where the two differ, since
    it does not mean what transformers makes of it.
    """
    beside = fields.integer(ORIGINAL) if ORIGINAL in fields.data else None
    if ORIGINAL in table.data:
        inside = table.integer(ORIGINAL)
        if beside not in (None, inside):
            raise table.fail(ORIGINAL, f"{ORIGINAL} beside it is {beside}; they must be equal")
        return inside
    longest = fields.integer("max_position_embeddings", defaults.max_position) if beside is None else beside
    initial = fields.data.get("initial_context_length", longest)
    if initial != longest:
        raise CheckpointError(
            f"{fields.source}: {table.prefix}{ORIGINAL} is missing, for which transformers takes {longest}, but "
            f"initial_context_length is {shown(initial)}; write it into {table.prefix[:-1]}"
        )
    return longest


def _refuse_partial(fields: Fields) -> None:
    if fields.data.get("partial_rotary_factor") not in (None, 1):
        raise fields.fail("partial_rotary_factor", "only rotary embeddings of whole heads are supported")


def written_rope(rope: RopeConfig) -> dict[str, Json]:
    """`rope_scaling` of a model with YaRN."""
    numbers = {name: getattr(rope, name) for name in ("factor", "beta_fast", "beta_slow", "truncate")}
    return {"rope_type": "yarn", **numbers, ORIGINAL: rope.original_context}
