"""Waiting for what happens in other processes, with a limit that only a hang reaches."""

import time
from collections.abc import Callable

HANG = 600.0
"""Seconds after which a wait counts as a hang, however busy the machine is."""


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < end, "what is waited for has not happened"
        time.sleep(0.02)
