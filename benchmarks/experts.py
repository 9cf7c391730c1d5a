"""Forward and backward pass of one layer's experts, ours beside the experts of gpt-oss in transformers.

    python benchmarks/experts.py [--tokens 4096] [--hidden 256] [--intermediate 256] [--experts 16] [--top_k 4]
                                 [--rounds 7] [--json PATH]

Both sides compute the gradients of the tokens, of all expert weights and biases, and of the gates, in float32 on the
same cores, from the same weights and routing; the sides take turns, and the ratio is that of their medians. Outputs and
gradients must agree to 1e-4 of their largest value, or the benchmark ends with an error and reports nothing.

Needs the extra `parity`. Not measured: routing, which both are given, and packed experts, which torch has no form for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from puzzle_jax.kernels.expert_mlp import Experts, expert_mlp
from puzzle_jax.kernels.route import Routing

LIMIT = 7.0
AGREE = 1e-4
Arrays = dict[str, np.ndarray]


def main() -> None:
    options = arguments()
    given = inputs(options)
    ours, theirs = our_step(given), their_step(given, options)
    check(ours(), theirs())
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for round_ in range(options.rounds):
        for side, step in sorted({"ours": ours, "theirs": theirs}.items(), reverse=round_ % 2 == 1):
            start = time.perf_counter()
            step()
            seconds[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(of) for side, of in seconds.items()}
    table = Table("", "ms, median", "ms, range")
    for side, of in seconds.items():
        table.add_row(side, f"{1e3 * medians[side]:.0f}", f"{1e3 * min(of):.0f} to {1e3 * max(of):.0f}")
    Console().print(table, f"theirs over ours: {medians['theirs'] / medians['ours']:.2f}")
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options) | {"json": None}, "seconds": seconds}, indent=2))


def inputs(options: argparse.Namespace) -> Arrays:
    """Tokens, routing, weights, and the gradient of the output, by name."""
    rng = np.random.default_rng(0)
    tokens, hidden, inner, experts = options.tokens, options.hidden, options.intermediate, options.experts

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    scores = rng.random((tokens, experts)).argsort(axis=1)
    return {
        "x": normal(tokens, hidden),
        "ids": scores[:, : options.top_k].astype(np.int32),
        "gates": rng.dirichlet(np.ones(options.top_k), tokens).astype(np.float32),
        "gate_up": normal(experts, hidden, 2 * inner, scale=hidden**-0.5),
        "gate_up_bias": normal(experts, 2 * inner),
        "down": normal(experts, inner, hidden, scale=inner**-0.5),
        "down_bias": normal(experts, hidden),
        "of_output": normal(tokens, hidden),
    }


LEARNED = ("x", "gates", "gate_up", "gate_up_bias", "down", "down_bias")


def our_step(given: Arrays) -> Callable[[], Arrays]:
    ids, of_output = jnp.asarray(given["ids"]), jnp.asarray(given["of_output"])
    learned = {name: jnp.asarray(given[name]) for name in LEARNED}

    @jax.jit
    def gradients(learned: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def output(learned: dict[str, jax.Array]) -> jax.Array:
            experts = Experts(*(learned[name] for name in ("gate_up", "gate_up_bias", "down", "down_bias")))
            return expert_mlp(learned["x"], Routing(ids, learned["gates"]), experts, limit=LIMIT)

        found, backward = jax.vjp(output, learned)
        return {"output": found, **backward(of_output)[0]}

    def step() -> Arrays:
        return {name: np.asarray(array) for name, array in jax.block_until_ready(gradients(learned)).items()}

    return step


def their_step(given: Arrays, options: argparse.Namespace) -> Callable[[], Arrays]:
    config = GptOssConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate, num_local_experts=options.experts
    )
    config._experts_implementation = "eager"
    module = GptOssExperts(config)
    weights = {
        "gate_up": module.gate_up_proj,
        "gate_up_bias": module.gate_up_proj_bias,
        "down": module.down_proj,
        "down_bias": module.down_proj_bias,
    }
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(torch.from_numpy(given[name]))
    x, gates = (torch.from_numpy(given[name]).requires_grad_() for name in ("x", "gates"))
    ids, of_output = torch.from_numpy(given["ids"]).long(), torch.from_numpy(given["of_output"])
    learned = {"x": x, "gates": gates, **weights}

    def step() -> Arrays:
        for tensor in learned.values():
            tensor.grad = None
        output = module(x, ids, gates)
        output.backward(of_output)
        gradients = {name: tensor.grad for name, tensor in learned.items()}
        return {"output": output.detach().numpy()} | {n: g.numpy() for n, g in gradients.items() if g is not None}

    return step


def check(ours: Arrays, theirs: Arrays) -> None:
    """Raises SystemExit where an output or a gradient differs by more than `AGREE` of its largest value."""
    for name, wanted in theirs.items():
        error = float(np.abs(ours[name] - wanted).max() / np.abs(wanted).max())
        if error > AGREE:
            raise SystemExit(f"{name} differs by {error:.1e} of its largest value, more than {AGREE:g}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 4096, "hidden": 256, "intermediate": 256, "experts": 16, "top_k": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
