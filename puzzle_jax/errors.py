"""Errors that the user can fix.

Every command line turns a `PuzzleError` into one sentence on stderr and exit code 2; any other exception is a bug
and keeps its traceback.
"""

import math
import reprlib
from collections.abc import Iterable
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 120


class PuzzleError(Exception):
    """Something the user gave cannot be used; the message names file, field, value and what would be accepted."""


class PuzzleWarning(UserWarning):
    """Something the user gave was corrected or may not be intended; command lines print it as one line on stderr."""


class ConfigError(PuzzleError):
    """A model description, recipe or setting is invalid."""


class CheckpointError(PuzzleError):
    """A checkpoint directory is missing, damaged, or not of a known kind."""


class InfeasibleError(PuzzleError):
    """No architecture of the search space meets the target; the message names the limits and what is reachable."""


MOST_TOGETHER, MOST_TIMES, MOST_TOKENS, MOST_PROCESSES = 1 << 20, 10**9, (1 << 31) - 1, 1024
"""Upper bounds of settings, so that a typo gives an error message and not an endless run: items in memory together,
repetitions, tokens, processes."""

MOST_SEED = (1 << 32) - 1


def check_range(
    name: str,
    value: int | float,
    least: int | float,
    most: int | float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Raises `ConfigError`, naming the setting, for a number that is not from `least` to `most`, or is infinite.

    `above` and `below` exclude the lower and the upper end itself.
    """
    high_enough = value > least if above else value >= least
    low_enough = value < most if below or most == math.inf else value <= most
    if high_enough and low_enough:  # NaN is in no range
        return
    low, high = (f"{end:g}" if isinstance(end, float) else f"{end}" for end in (least, most))
    if most == math.inf:
        finite = "" if value < math.inf else "a finite number " if above else "a finite number of "
        rule = f"{finite}{'above' if above else 'at least'} {low}"
    elif above or below:
        rule = f"{'above' if above else 'at least'} {low} and {'below' if below else 'at most'} {high}"
    else:  # an upper end that only guards against typos is not worth mentioning
        rule = f"at least {low}" if value < least and most >= MOST_PROCESSES else f"from {low} to {high}"
    raise ConfigError(f"{name} is {shown(value)}, but must be {rule}")


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raises `ConfigError`, naming the setting, for a value that is not one of the known ones."""
    known = tuple(known)
    if value not in known:
        raise ConfigError(f"{name} is {shown(value)}, but must be one of {', '.join(known)}")


def shown(value: Any) -> str:
    """A value from a file as a message shows it: on one line, printable, and short however large or deep it is."""
    return _SHORT.repr(value)
