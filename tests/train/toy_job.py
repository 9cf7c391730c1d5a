"""A regression that trains in milliseconds, for tests of the step and the loop, and as a process to be killed.

Parameters are named as in `model.spec`; there are 7 inputs, 3 outputs, and batches of 2 micro-batches of 5 rows.
"""

import sys
import time
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from puzzle_jax.train.loop import Job, LoopSettings, train
from puzzle_jax.train.optimizer import OptimizerSettings, make_optimizer
from puzzle_jax.train.step import init_state, make_step

INPUTS, OUTPUTS, MICRO, ROWS = 7, 3, 2, 5
SETTINGS = OptimizerSettings(learning_rate=0.03, schedule="constant", weight_decay=0.1)
LOOP = LoopSettings(steps=20, save_every=4, log_every=3, evaluate_every=5, max_skipped=3)


def loss(params, fixed, batch, key):
    """Weighted sum of squared errors on noisy inputs, the weight, and the weighted sum of absolute errors."""
    x = batch["x"] + fixed["noise"] * jax.random.normal(key, batch["x"].shape)
    y = batch["x"] @ fixed["teacher"]
    error = (x * params["norm"]) @ params["layers"][0]["head"] - y
    weights = batch["weights"][:, None]
    return jnp.sum(weights * error**2), jnp.sum(batch["weights"]), {"absolute": jnp.sum(weights * jnp.abs(error))}


def fixed(noise=0.1):
    teacher = np.random.default_rng(1).standard_normal((INPUTS, OUTPUTS))
    return {"teacher": jnp.asarray(teacher, jnp.float32), "noise": jnp.float32(noise)}


def params():
    head = np.random.default_rng(2).standard_normal((INPUTS, OUTPUTS))
    return {"norm": jnp.ones(INPUTS), "layers": [{"head": jnp.asarray(head, jnp.float32), "frozen": None}]}


def draw(rng):
    return {
        "x": rng.standard_normal((MICRO, ROWS, INPUTS)).astype(np.float32),
        "weights": rng.uniform(0, 2, (MICRO, ROWS)).astype(np.float32),
    }


class Stream:
    """Random batches; `at` is called with the number of each, and a batch that it returns is used in its place."""

    def __init__(self, at=lambda number: None, length=10**9):
        self.rng, self.number, self.at, self.length = np.random.default_rng(5), 0, at, length

    def __iter__(self):
        return self

    def __next__(self):
        if self.number == self.length:
            raise StopIteration
        self.number += 1
        batch = draw(self.rng)
        return self.at(self.number) or batch

    def get_state(self):
        return {"number": self.number, "rng": self.rng.bit_generator.state}

    def set_state(self, state):
        self.number, self.rng.bit_generator.state = state["number"], state["rng"]


def initial():
    return init_state(params(), make_optimizer(SETTINGS, 100), jax.random.key(3))


@cache
def programs():
    """The step and the evaluation, compiled once for all tests."""
    held_out = draw(np.random.default_rng(6))

    @jax.jit
    def evaluate(params):
        first = jax.tree.map(lambda x: x[0], held_out)
        total, weight, _ = loss(params, fixed(0.0), first, jax.random.key(0))
        return total / weight

    return make_step(loss, make_optimizer(SETTINGS, 100)), evaluate


def toy_job(batches=None, **changes):
    step, evaluate = programs()
    settings = {
        "initial": initial,
        "step": step,
        "fixed": fixed(),
        "batches": Stream() if batches is None else batches,
        "identity": {"recipe": {"learning_rate": 0.03}, "data": "ab12"},
        "evaluate": lambda state: {"error": float(evaluate(state.params))},
        "best": "error",
    }
    return Job(**{**settings, **changes})


if __name__ == "__main__":
    train(toy_job(Stream(lambda number: time.sleep(0.01))), LOOP, Path(sys.argv[1]), Console())
