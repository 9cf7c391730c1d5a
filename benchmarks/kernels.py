"""Implementations of each operation side by side: milliseconds and ratios to the reference, forward and gradient.

    python benchmarks/kernels.py [--tokens 4096] [--experts 64]

Runs in turns on the device present, medians over rounds. `lax.ragged_dot` stands beside the experts because it is
what JAX offers for grouped matmuls.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.expert_mlp import Experts, expert_mlp
from puzzle_jax.kernels.expert_mlp.reference import clamped_swiglu
from puzzle_jax.kernels.route import Routing, route
from puzzle_jax.kernels.window_attention import window_attention


def ragged_mlp(x: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    """The mixture by `lax.ragged_dot` over rows sorted by expert."""
    k, count = routing.ids.shape[1], experts.down_bias.shape[0]
    flat = routing.ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.zeros(count, jnp.int32).at[flat].add(1)
    expert = flat[order]
    h = jax.lax.ragged_dot(x[order // k], experts.gate_up, sizes) + experts.gate_up_bias[expert]
    out = jax.lax.ragged_dot(clamped_swiglu(h, 7.0), experts.down, sizes) + experts.down_bias[expert]
    out = jnp.zeros_like(out).at[order].set(out).reshape(*routing.ids.shape, -1)
    return jnp.einsum("tkh,tk->th", out, routing.gates)


def turns(title: str, functions: dict[str, Callable[[], object]], rounds: int) -> None:
    """Times functions in turns and prints medians and the ratio to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    print(title)
    for name, median in medians.items():
        print(f"  {name:<16} {median * 1e3:9.2f} ms   {first / median:6.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--inter", type=int, default=96)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, float32")

    keys = jax.random.split(jax.random.key(0), 8)
    x = jax.random.normal(keys[0], (options.tokens, options.hidden))
    experts = Experts(
        jax.random.normal(keys[1], (options.experts, options.hidden, 2 * options.inter)) * options.hidden**-0.5,
        jax.random.normal(keys[2], (options.experts, 2 * options.inter)),
        jax.random.normal(keys[3], (options.experts, options.inter, options.hidden)) * options.inter**-0.5,
        jax.random.normal(keys[4], (options.experts, options.hidden)),
    )
    routing = route(jax.random.normal(keys[5], (options.tokens, options.experts)), 2)
    mixtures: dict[str, Callable[..., jax.Array]] = {
        name: lambda x, w, name=name: expert_mlp(x, routing, w, limit=7.0, implementation=name)
        for name in ("reference", "sorted_blocks")
    }
    mixtures["ragged_dot"] = lambda x, w: ragged_mlp(x, routing, w)
    shape = f"{options.tokens} tokens, top 2 of {options.experts} experts, {options.hidden} x {options.inter}"
    compare(f"expert_mlp, {shape}", mixtures, (x, experts), options.rounds)

    rows = max(1, options.tokens // options.sequence)
    q = jax.random.normal(keys[5], (rows, options.sequence, 4, 32))
    k, v = (jax.random.normal(key, (rows, options.sequence, 2, 32)) for key in keys[6:])
    sinks = jnp.zeros(4)
    for window, names in (
        (None, ("reference", "square", "causal_blocks")),
        (options.window, ("reference", "square", "banded")),
    ):
        functions = {
            name: lambda q, k, v, name=name, window=window: window_attention(
                q, k, v, sinks, window=window, implementation=name
            )
            for name in names
        }
        compare(f"window_attention, {rows} x {options.sequence}, window {window}", functions, (q, k, v), options.rounds)


def compare(title: str, functions: dict[str, Callable[..., jax.Array]], data: tuple, rounds: int) -> None:
    """Forward and gradient of functions of the same arrays."""
    forward = {name: jax.jit(f) for name, f in functions.items()}
    turns(f"{title}, forward", {name: lambda f=f: f(*data) for name, f in forward.items()}, rounds)
    argnums = tuple(range(len(data)))
    backward = {name: jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), argnums)) for name, f in functions.items()}
    turns(f"{title}, gradient", {name: lambda f=f: f(*data) for name, f in backward.items()}, rounds)


if __name__ == "__main__":
    main()
