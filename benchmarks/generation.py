"""Our generation engine compared with transformers' `generate` on the same checkpoint and prompts.

    python benchmarks/generation.py [--quick] [--json PATH] [--theirs grouped_mm/dynamic eager/dynamic ...]

A random model of gpt-oss-20b's proportions is written as a Hugging Face checkpoint, which both sides read. Their logits
and greedy tokens are compared first. Then the sides take turns, in an order that changes every round:

    decode    tokens per second of a batch, from the seconds for a long completion minus those for a short one
    prefill   prompt tokens per second until the first token of long prompts
    windows   our seconds per decode step with every layer windowed, and with every layer full, at growing context;
              and the bytes of the caches against the formula `config.cache_bytes`

Ratios are computed round by round, ours over theirs; medians and quartiles are shown (minimum and maximum for fewer
than four rounds). Every request runs to its limit. Our prefill includes one decode step, which theirs does not need.
`--clock cpu` is for shared machines: both sides get one core, and CPU seconds of the process are counted instead of
wall-clock seconds.

`--theirs` names settings of transformers as EXPERTS/CACHE[/compiled]; EXPERTS is grouped_mm, eager or batched_mm, and
CACHE is dynamic or static. All are measured in the same rounds. Attention is `eager`, the only one that runs: sdpa is
refused because of the attention sinks, and flex attention has no sinks on CPU. `compiled` applies torch.compile to the
decode step; prefill is not compiled, as in transformers itself. glibc is told to keep freed memory: by default it
returns every large array to the system, and their prefill takes 2.7 times as long (`--malloc default` shows it).

Not measured: sampling, requests that differ in length or arrive over time, packed weights, and accelerators.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.config import BlockConfig, ModelConfig, cache_bytes
from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate.throughput import Spread
from puzzle_jax.generate.engine import Engine, Request
from puzzle_jax.generate.slots import Slots, decode, empty_slots
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.network import forward, to_compute
from puzzle_jax.model.spec import Params, count_params, init_params

OURS = "ours"
MEASUREMENTS = ("agreement", "decode", "prefill", "windows")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
QUICK = {"rounds": 3, "short": 4, "long": 36, "prefill_batches": [1], "contexts": [256, 1024]}


def main() -> None:
    options = parse()
    enable_compilation_cache()
    if options.malloc == "keep":
        keep_freed_memory()
    if options.clock == "cpu":  # before the first use of JAX, which starts as many threads as there are cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.disable_progress_bar()
    config = model_config(options)
    console = Console()
    report: dict[str, Any] = {"machine": machine(options), "options": vars(options)}
    report["parameters"] = count_params(config)
    console.print(f"{report['machine']}\n{report['parameters']:,} parameters", highlight=False)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        params = init_params(config, jax.random.key(options.seed))
        save_checkpoint(path, config, params, config_base={}, form=options.form)
        ours = Ours(path, options.dtype)
        theirs = {name: Theirs(path, options.dtype, name) for name in options.theirs}

    sides: dict[str, Ours | Theirs] = {OURS: ours, **theirs}
    if "agreement" in options.measure:
        report["agreement"] = agreement(ours, theirs[options.theirs[0]], options)
        console.print(agreed(report["agreement"]), highlight=False)
    if "decode" in options.measure:
        report["decode"] = compare_decode(sides, options)
        speeds(console, f"decode, batch {options.batch}, prompts of {options.prompt}", report["decode"])
    if "prefill" in options.measure:
        report["prefill"] = {}
        for batch in options.prefill_batches:
            report["prefill"][batch] = compare_prefill(sides, options, batch)
            speeds(console, f"prefill, {batch} x {options.prefill_tokens}", report["prefill"][batch])
    if "windows" in options.measure:
        report["windows"] = compare_windows(ours.params, config, options)
        windows(console, f"our decode step, batch {options.batch}", report["windows"])
    report["load_after"] = os.getloadavg()
    if options.json:
        options.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def model_config(options: argparse.Namespace) -> ModelConfig:
    """A model that alternates sliding and full attention, as gpt-oss does."""
    blocks = [BlockConfig(options.experts, None if i % 2 else options.window) for i in range(options.layers)]
    return ModelConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        experts_per_token=options.top_k,
        blocks=tuple(blocks),
    )


def keep_freed_memory() -> None:
    """Lets glibc serve large arrays from its heap (M_MMAP_MAX) and keep what is freed (M_TRIM_THRESHOLD)."""
    if platform.libc_ver()[0] == "glibc":
        libc, mmap_max, trim_threshold = ctypes.CDLL("libc.so.6"), -4, -1
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


# The two sides -------------------------------------------------------------------------------------------------------


class Ours:
    """Our engine on a checkpoint."""

    def __init__(self, path: Path, dtype: str) -> None:
        checkpoint = load_checkpoint(path, dtype=jnp.dtype(dtype))
        self.config = checkpoint.config
        self.params = jax.block_until_ready(to_compute(checkpoint.params, jnp.dtype(dtype)))

    def logits(self, prompts: np.ndarray) -> np.ndarray:
        compiled = jax.jit(lambda params, tokens: forward(params, self.config, tokens))
        return np.asarray(compiled(self.params, jnp.asarray(prompts)), np.float32)

    def generate(self, prompts: np.ndarray, new_tokens: int, context: int) -> np.ndarray:
        """Returns [batch, new_tokens]. Caches hold `context` positions, whatever the length of the completions."""
        engine = Engine(self.params, self.config, stop_ids=(), context=context, slots=len(prompts))
        requests = [Request(tuple(prompt), new_tokens) for prompt in prompts.tolist()]
        return np.array([completion.tokens for completion in engine.generate(requests)])


class Theirs:
    """transformers on a checkpoint, with settings EXPERTS/CACHE[/compiled]."""

    def __init__(self, path: Path, dtype: str, settings: str) -> None:
        experts, self.cache, *rest = settings.split("/")
        self.compiled = rest == ["compiled"]
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="eager", experts_implementation=experts
        ).eval()

    def logits(self, prompts: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.tensor(prompts)).logits.float().numpy()

    def generate(self, prompts: np.ndarray, new_tokens: int, context: int) -> np.ndarray:
        tokens = torch.tensor(prompts)
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        if self.cache != "dynamic":
            options |= {"cache_implementation": self.cache, "disable_compile": not self.compiled}
        if self.compiled:
            options |= {"compile_config": transformers.CompileConfig(mode="default", fullgraph=False)}
            options["compile_config"]._compile_all_devices = True
        with torch.inference_mode():
            out = self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), eos_token_id=None, pad_token_id=0, **options
            )
        return out[:, tokens.shape[1] :].numpy()


# Measurements --------------------------------------------------------------------------------------------------------


def in_turns(functions: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measures every function, round by round; the order rotates, and an uncounted first round compiles."""
    values: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(rounds + 1):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            measured = functions[name]()
            if turn:
                values[name].append(measured)
    return values


def seconds(function: Callable[[], object], clock: str) -> float:
    start = CLOCKS[clock]()
    function()
    return CLOCKS[clock]() - start


def with_ratios(rates: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Tokens per second of every side, and ours over each of theirs."""
    found: dict[str, dict[str, Any]] = {}
    for name, values in rates.items():
        ratios = [ours / their for ours, their in zip(rates[OURS], values, strict=True)]
        found[name] = {
            "tokens_per_second": asdict(Spread.of(values)),
            "ours_over_it": asdict(Spread.of(ratios)),
            "rounds": list(values),
        }
    return found


def random_prompts(options: argparse.Namespace, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(options.seed).integers(0, options.vocab, (batch, length))


def agreement(ours: Ours, theirs: Theirs, options: argparse.Namespace) -> dict[str, Any]:
    """Differences of the prompts' logits, relative to the largest logit, and the share of greedy tokens that are equal.

    With random weights, rounding decides a few expert choices: where the last chosen and the first rejected expert are
    nearly tied, the sides diverge at that position and at those that attend to it.
    """
    prompts = random_prompts(options, options.batch, options.prompt)
    left, right = ours.logits(prompts), theirs.logits(prompts)
    difference = np.abs(left - right).max(axis=-1) / np.abs(right).max()
    context = options.prompt + options.long
    equal = ours.generate(prompts, options.long, context) == theirs.generate(prompts, options.long, context)
    return {
        "median_logit_difference": float(np.median(difference)),
        "positions_within_1e-4": float((difference < 1e-4).mean()),
        "largest_logit_difference": float(difference.max()),
        "equal_tokens": float(equal.mean()),
        "equal_completions": float(equal.all(axis=1).mean()),
        "tokens": equal.size,
    }


def compare_decode(sides: Mapping[str, Ours | Theirs], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second between the ends of a short and a long completion.

    Raises PuzzleError if the long one did not take longer, since nothing was measured then.
    """
    prompts, context = random_prompts(options, options.batch, options.prompt), options.prompt + options.long

    def added_seconds(side: Ours | Theirs) -> float:
        short, long = (
            seconds(lambda n=n: side.generate(prompts, n, context), options.clock)
            for n in (options.short, options.long)
        )
        return long - short

    added = in_turns({name: lambda side=side: added_seconds(side) for name, side in sides.items()}, options.rounds)
    tokens = options.batch * (options.long - options.short)
    for name, values in added.items():
        if min(values) <= 0:
            raise PuzzleError(
                f"{name}: {options.long} tokens took {-min(values):.3f} s less than {options.short}: noise is larger "
                "than the difference; raise --long, or use --clock cpu on a busy machine"
            )
    return with_ratios({name: [tokens / value for value in values] for name, values in added.items()})


def compare_prefill(sides: Mapping[str, Ours | Theirs], options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Prompt tokens per second until the first token."""
    prompts = random_prompts(options, batch, options.prefill_tokens)

    def rate(side: Ours | Theirs) -> float:
        return prompts.size / seconds(lambda: side.generate(prompts, 1, options.prefill_tokens + 1), options.clock)

    return with_ratios(in_turns({name: lambda side=side: rate(side) for name, side in sides.items()}, options.rounds))


@dataclass
class Steps:
    """Decode steps at the end of a context with all slots busy; caches hold random numbers."""

    params: Params
    config: ModelConfig
    context: int
    steps: int
    clock: str
    state: Slots

    @staticmethod
    def start(params: Params, config: ModelConfig, context: int, options: argparse.Namespace) -> Steps:
        dtype, key = params["embedding"].dtype, jax.random.key(options.seed)
        state = empty_slots(config, options.batch, context, dtype, CacheFormat(), log_probs=False, experts=False)
        noise = [
            cache._replace(
                k=jax.random.normal(key, cache.k.shape, dtype), v=jax.random.normal(key, cache.v.shape, dtype)
            )
            for cache in state.caches
        ]
        state = state._replace(caches=noise, logits=jax.random.normal(key, state.logits.shape))
        return Steps(params, config, context, options.long, options.clock, state)

    def seconds_per_step(self) -> float:
        rows = self.state.idle.shape[0]
        self.state = jax.block_until_ready(
            self.state._replace(
                positions=jnp.full(rows, self.context - self.steps, jnp.int32),
                counts=jnp.zeros(rows, jnp.int32),
                limits=jnp.full(rows, self.steps + 1, jnp.int32),
                idle=jnp.zeros(rows, bool),
            )
        )
        none, steps, target = jnp.zeros(0, jnp.int32), jnp.int32(self.steps), jnp.int32(rows)

        def run() -> None:
            self.state = decode(self.params, self.config, self.state, none, 0.0, steps, target, None, 1.0)
            jax.block_until_ready(self.state)

        return seconds(run, self.clock) / self.steps

    def held_bytes(self) -> int:
        return sum(cache.k.nbytes + cache.v.nbytes for cache in self.state.caches)

    def promised_bytes(self) -> int:
        return self.state.idle.shape[0] * cache_bytes(self.config, self.context, self.state.caches[0].k.itemsize)


def compare_windows(params: Params, config: ModelConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per step and cache bytes by context, for the model with all layers windowed and with all layers full."""
    rows = {}
    for name, window in (("windowed", options.window), ("full", None)):
        uniform = config.with_blocks(tuple(BlockConfig(block.num_experts, window) for block in config.blocks))
        for context in options.contexts:
            rows[f"{name} {context}"] = Steps.start(params, uniform, context, options)
    measured = in_turns({name: row.seconds_per_step for name, row in rows.items()}, options.rounds)
    return [
        {
            "layers": name.split()[0],
            "context": row.context,
            "seconds_per_step": asdict(Spread.of(measured[name])),
            "cache_bytes": row.held_bytes(),
            "formula_bytes": row.promised_bytes(),
        }
        for name, row in rows.items()
    ]


# What is shown -------------------------------------------------------------------------------------------------------


def machine(options: argparse.Namespace) -> str:
    cores, load = len(os.sched_getaffinity(0)), " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{platform.machine()}, cores {cores}, load {load}, {options.clock} seconds, {options.dtype}, "
        f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def agreed(found: Mapping[str, Any]) -> str:
    return (
        f"logits of the prompts differ by {found['median_logit_difference']:.1e} of the largest logit (median), "
        f"{found['positions_within_1e-4']:.2%} of positions by less than 1e-4; "
        f"{found['equal_tokens']:.2%} of {found['tokens']} greedy tokens are equal"
    )


def spread(found: Mapping[str, Any], form: str = ",.0f", scale: float = 1.0) -> str:
    median, low, high = (format(found[key] * scale, form) for key in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def speeds(console: Console, title: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("", "tokens/s", "ours / it", title=title, title_justify="left")
    for name, row in found.items():
        table.add_row(name, spread(row["tokens_per_second"]), spread(row["ours_over_it"], ".2f"))
    console.print(table)


def windows(console: Console, title: str, found: Sequence[Mapping[str, Any]]) -> None:
    table = Table("layers", "context", "ms per step", "cache bytes", "formula", title=title, title_justify="left")
    for row in found:
        time_of = spread(row["seconds_per_step"], ".2f", 1e3)
        held, formula = f"{row['cache_bytes']:,}", f"{row['formula_bytes']:,}"
        table.add_row(row["layers"], str(row["context"]), time_of, held, formula)
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("layers", 12),
        ("hidden", 192),
        ("intermediate", 192),
        ("experts", 32),
        ("top-k", 4),
        ("heads", 8),
        ("kv-heads", 2),
        ("head-dim", 32),
        ("vocab", 8192),
        ("window", 128),
        ("seed", 0),
        ("rounds", 5),
        ("batch", 16),
        ("prompt", 128),
        ("short", 8),
        ("long", 72),
        ("prefill-tokens", 2000),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--measure", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--prefill-batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument(
        "--malloc", choices=("keep", "default"), default="keep", help="what glibc does with freed memory"
    )
    parser.add_argument("--form", choices=("bf16", "mxfp4"), default="bf16", help="of the checkpoint")
    parser.add_argument("--theirs", nargs="+", default=["grouped_mm/dynamic"], help="settings of transformers")
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {QUICK}")
    parser.add_argument("--json", type=Path, help="where to write everything")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


if __name__ == "__main__":
    main()
