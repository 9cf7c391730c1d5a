"""Training that is interrupted: python -m tests.train.interrupted SIGNAL STEP SECONDS VERB ARGUMENTS...

The process sends itself SIGNAL that many seconds after it logs the first step at or after STEP; at once if 0.
"""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from puzzle_jax.runs import METRICS_FILE, read_metrics
from puzzle_jax.train.__main__ import main
from puzzle_jax.train.metrics import MetricsLog
from tests.processes.program import compile_quickly


def stop_and_kill(verb: Sequence[str], out: Path, steps: int, kills: int) -> None:
    """Begins a run of `steps` steps, stops it at step 3, and kills it `kills` times at random moments after that."""

    def interrupted(*moment: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.train.interrupted", *map(str, moment), *verb]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    stopped = interrupted("SIGTERM", 2, 0)
    assert stopped.returncode == 0, stopped.stderr
    assert f"stopped at step 3 of {steps}; the same command goes on" in stopped.stdout + stopped.stderr
    logged = [
        line["step"] for line in read_metrics(out / METRICS_FILE) if line["step"]
    ]  # 0: an evaluation of the start
    assert logged == [1, 2, 3] and not (out / "child").exists()
    moments = random.Random(kills)
    for _ in range(kills):
        interrupted("SIGKILL", moments.randint(4, steps), moments.uniform(0, 0.5))


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
