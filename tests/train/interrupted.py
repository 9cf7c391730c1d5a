"""Training that is interrupted: python -m tests.train.interrupted SIGNAL STEP SECONDS VERB ARGUMENTS...

The signal comes so many seconds after the metrics of the first step from STEP on were written; with 0, at once.
"""

import gc
import os
import signal
import sys
import threading
from collections.abc import Mapping

from puzzle_jax.train.__main__ import main
from puzzle_jax.train.metrics import MetricsLog

if __name__ == "__main__":
    gc.set_threshold(50_000, 20, 20)  # as in tests.processes.program
    number, first, seconds = getattr(signal, sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    write, struck = MetricsLog.write, threading.Event()

    def strike() -> None:
        os.kill(os.getpid(), number)

    def then_strike(self: MetricsLog, step: int, values: Mapping[str, float]) -> None:
        write(self, step, values)
        if step >= first and not struck.is_set():
            struck.set()
            threading.Timer(seconds, strike).start() if seconds else strike()

    MetricsLog.write = then_strike
    raise SystemExit(main(sys.argv[4:]))
