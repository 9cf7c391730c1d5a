"""A policy update from the same answers, with a copy of the prompt for every answer and with shared prompts.

    python benchmarks/policy_update.py [--model DIR] [--prompts N] [--rounds N] [--json PATH]

The embedded parent, or another checkpoint that can answer the embedded tasks, answers one step's prompts of the recipe
`grpo-accuracy`. Both ways then update it from all answers that carry a signal, in turns whose order changes every
round. Ratios are computed round by round; medians and ranges are shown. `positions` are those that the model is run on,
padding included. The tests check that gradients agree, so only time is compared here. Not measured: sampling and
rewards, which are the same for both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.search.recipe import EMBEDDED_PARENT
from puzzle_jax.settings.verbs import parse
from puzzle_jax.train.__main__ import VERBS
from puzzle_jax.train.distill.objectives import Fixed
from puzzle_jax.train.grpo import policy_batches
from puzzle_jax.train.grpo.inputs import GrpoInputs
from puzzle_jax.train.grpo.primary_rewards import PrimaryRewards
from puzzle_jax.train.grpo.recipe import GrpoRecipe
from puzzle_jax.train.grpo.run import Trainer
from puzzle_jax.train.run import open_placement

WAYS = {"a prompt with every answer": False, "shared prompts": True}


def main() -> None:
    options = arguments()
    enable_compilation_cache()
    with tempfile.TemporaryDirectory() as directory:
        given = ["--recipe", "grpo-accuracy", "--model", str(options.model), "--out", f"{directory}"]
        recipe = parse(VERBS["grpo"], given)
        assert isinstance(recipe, GrpoRecipe)
        recipe = replace(recipe, prompts=replace(recipe.prompts, prompts=options.prompts))
        report = {
            "model": str(options.model),
            "device": jax.devices()[0].device_kind,
            **measure(recipe, options.rounds),
        }
    console = Console()
    for name, found in report["ways"].items():
        console.print(
            f"{name}: {found['seconds']:.2f} s ({found['least']:.2f} to {found['most']:.2f}), "
            f"{found['micro_batches']} micro-batches, {found['positions']:,} positions; first {found['first']:.1f} s"
        )
    low, middle, high = report["ratio"]
    console.print(
        f"{report['answers']} answers; shared prompts take {middle:.2f} of the time ({low:.2f} to {high:.2f})"
    )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED_PARENT)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(recipe: GrpoRecipe, rounds: int) -> dict[str, Any]:
    """Times an update both ways, round by round."""
    with PrimaryRewards(recipe.reward) as rewards:
        trainers = {}
        for name, shares in WAYS.items():
            update, out = replace(recipe.update, share_prompts=shares), recipe.out / str(shares)
            inputs = GrpoInputs.open(replace(recipe, update=update, out=out))
            trainers[name] = Trainer(inputs, open_placement(inputs), Console(quiet=True), rewards)
        first = next(iter(trainers.values()))
        state, fixed = first.initial(), Fixed(first.base)
        answered, _ = first._answers(state.params, fixed, next(first), 1)
        learnable = policy_batches.learnable(answered, first.inputs.loss)
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for round_ in range(rounds + 1):
            for name in sorted(trainers, reverse=round_ % 2 == 1):
                own = jax.tree.map(jnp.copy, state)
                started = time.perf_counter()
                jax.block_until_ready(trainers[name]._learn(own, fixed, learnable)[0])
                seconds[name].append(time.perf_counter() - started)
        flat = [answer for group in learnable for answer in group]
        batches = {name: trainer._batches(flat) for name, trainer in trainers.items()}
    ways = {
        name: {
            "seconds": float(np.median(of[1:])),
            "least": min(of[1:]),
            "most": max(of[1:]),
            "first": of[0],
            "micro_batches": len(batches[name]),
            "positions": sum(batch.tokens.size for batch in batches[name]),
        }
        for name, of in seconds.items()
    }
    plain, shared = (np.asarray(seconds[name][1:]) for name in WAYS)
    ratios = shared / plain
    return {
        "ways": ways,
        "answers": len(flat),
        "ratio": [float(np.min(ratios)), float(np.median(ratios)), float(np.max(ratios))],
    }


if __name__ == "__main__":
    main()
