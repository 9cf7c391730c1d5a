"""Training that is interrupted: python -m tests.train.interrupted SIGNAL STEP SECONDS VERB ARGUMENTS...

The process sends itself SIGNAL that many seconds after it logs the first step at or after STEP; at once if 0.
"""

import os
import signal
import sys
import threading
from collections.abc import Mapping

from puzzle_jax.train.__main__ import main
from puzzle_jax.train.metrics import MetricsLog
from tests.processes.program import compile_quickly

if __name__ == "__main__":
    compile_quickly()
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
