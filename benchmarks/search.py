"""The cost of scoring and the quality of its scores, on the embedded parent and on a random model of 24 layers.

    cost        exact replace-one scores against running the whole model for every alternative, in interleaved rounds
                with equal scores; the bound for L layers and a head worth h of them is (L + h) / ((L + 1) / 2 + h)
    ranks       Spearman's correlation with gold scores (exact, on other traces) of exact scores on few traces, of the
                lens, and of both together
    sets        gold scores of all methods' best expert sets, chosen on calibration traces, against removal_error's
    adaptive    layers run and the child's held-out KL, adaptive scores against exact scores of all traces
    additive    predicted against real KL of random architectures

All but the first need the traces, ranking and costs of a finished search:

    python benchmarks/search.py --run runs/tiny [--part cost ranks sets adaptive additive]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from rich.console import Console
from scipy.stats import spearmanr

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.generate.batches import MicroBatch, micro_batches
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.child import Child, ChildBlock
from puzzle_jax.model.network import embed
from puzzle_jax.model.spec import init_params
from puzzle_jax.search.context import Search
from puzzle_jax.search.parent import read_parent
from puzzle_jax.search.recipe import EMBEDDED_PARENT, Recipe, ScoreSettings, SpaceSettings
from puzzle_jax.search.refine.accept import Difference
from puzzle_jax.search.score.adaptive import in_random_order
from puzzle_jax.search.score.alternatives import IndexedAlternatives
from puzzle_jax.search.score.lens import fit_lens
from puzzle_jax.search.score.measurements import Fill, ScoreTable
from puzzle_jax.search.score.replace_one import METRICS, Alternative, Answers, ReplaceOne
from puzzle_jax.search.score.space_scorer import LENS_TRACES
from puzzle_jax.search.score.whole_children import score_children
from puzzle_jax.settings.files import RECIPES

CONSOLE = Console(width=120)


def spearman(one: Any, other: Any) -> float:
    return float(spearmanr(one, other)[0])  # pyright: ignore[reportArgumentType]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="directory of a finished search with default settings")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--gold", type=int, default=192, help="held-out traces of gold scores")
    options = parser.parse_args()
    enable_compilation_cache()
    if "cost" in options.part:
        cost()
    rest = [part for part in options.part if part != "cost"]
    if rest and options.run is None:
        parser.error(f"{', '.join(rest)} need --run")
    found = _Found(options.run, options.gold) if rest else None
    for part in rest:
        PARTS[part](found)


# Cost ---------------------------------------------------------------------------------------------------------------


def cost() -> None:
    tall = ModelConfig(
        vocab_size=2_048,
        hidden_size=96,
        intermediate_size=64,
        num_heads=6,
        num_kv_heads=3,
        head_dim=16,
        experts_per_token=2,
        blocks=tuple(BlockConfig(16, None if layer % 2 else 32) for layer in range(24)),
    )
    tiny = read_parent(EMBEDDED_PARENT)
    for name, config, params in (
        ("embedded parent, 6 layers", tiny.config, tiny.params),
        ("random model, 24 layers", tall, init_params(tall, jax.random.key(0))),
    ):
        source = np.random.default_rng(0)
        prompts = source.integers(0, config.vocab_size, (8, 128))
        traces = [
            Trace("t", "low", n, {}, tuple(row[:64]), tuple(row[64:]), None, False)
            for n, row in enumerate(prompts.tolist())
        ]
        (batch,) = micro_batches(traces, tokens_per_batch=1024)
        masks = [np.isin(np.arange(16), source.permutation(16)[:12]) for _ in range(8)]
        wanted = [
            (layer, Alternative(mask, block.window)) for layer, block in enumerate(config.blocks) for mask in masks
        ]
        run = ReplaceOne(params, config, keep_every=config.num_layers)
        ways: dict[str, Callable[[], Any]] = {
            "from inside the layer": lambda run=run, batch=batch, wanted=wanted: run(batch, wanted),
            "whole model": lambda run=run, batch=batch, wanted=wanted: whole_model(run, batch, wanted),
        }
        values = {way: call() for way, call in ways.items()}
        apart = np.abs(values["from inside the layer"] - values["whole model"])[..., 0].max()
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(3):
            for way, call in ways.items():
                start = time.perf_counter()
                call()
                seconds[way].append(time.perf_counter() - start)
        ratios = [whole / inside for inside, whole in zip(*seconds.values(), strict=True)]
        head = _head_in_layers(run, batch)
        layers = config.num_layers
        bound = (layers + head) / ((layers + 1) / 2 + head)
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        inside, whole = (statistics.median(of_way) for of_way in seconds.values())
        CONSOLE.print(
            f"{name}: {len(wanted)} alternatives, {inside:.2f} s against {whole:.2f} s: {middle:.2f}x "
            f"({low:.2f} to {high:.2f}); a head is worth {head:.2f} layers, bound {bound:.2f}, {middle / bound:.0%} "
            f"of it; KLs differ by {apart:.1e} at most"
        )


def whole_model(run: ReplaceOne, batch: MicroBatch, wanted: list[tuple[int, Alternative]]) -> np.ndarray:
    """METRICS of every alternative from a pass of the whole model each, as many in a call as `run` takes."""
    rows, seq = batch.tokens.shape
    start = embed(run.params, batch.tokens)
    parent = start
    for index, choice in enumerate(run.choices):
        parent = run.layer(index, parent, choice)
    values = np.zeros((len(wanted), rows, len(METRICS)))
    for first in range(0, len(wanted), run.per_call):
        group = wanted[first : first + run.per_call]
        x = start[:, None].repeat(run.per_call, axis=1).reshape(-1, seq, start.shape[-1])
        for index, own in enumerate(run.choices):
            masks = np.repeat(own.expert_mask[None], run.per_call, axis=0)
            for slot, (layer, choice) in enumerate(group):
                if layer == index:
                    masks[slot] = choice.expert_mask
            x = run.layer(index, x, Alternative(np.tile(masks, (rows, 1)), own.window))
        states = x.reshape(rows, run.per_call, seq, -1)
        values[first : first + len(group)] = run.compared(parent, states, Answers.of(batch))[: len(group)]
    return values


def _head_in_layers(run: ReplaceOne, batch: MicroBatch) -> float:
    """Seconds to compare a call's alternatives with the parent, relative to those of one layer for them."""
    seq = batch.tokens.shape[1]
    x = embed(run.params, batch.tokens)
    states = x[:, None].repeat(run.per_call, axis=1)
    flat, answers = states.reshape(-1, seq, x.shape[-1]), Answers.of(batch)

    def best(call: Callable[[], Any]) -> float:
        jax.block_until_ready(call())
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    head = best(lambda: run.compared(x, states, answers))
    layers = [best(lambda i=i: run.layer(i, flat, run.choices[i])) for i in (0, 1)]
    return head / statistics.mean(layers)


# Worth --------------------------------------------------------------------------------------------------------------


class _Found:
    """Artifacts of a finished search, and gold scores of its whole space on held-out traces."""

    def __init__(self, directory: Path, gold: int) -> None:
        given = yaml.safe_load((RECIPES / "tiny.yaml").read_text())
        recipe = Recipe(
            scenario=Scenario(**given["scenario"]),
            target=Target(**given["target"]),
            space=SpaceSettings(windows=tuple(given["space"]["windows"])),
            run=directory,
        )
        self.search = Search(recipe, CONSOLE)
        self.space = self.search.ranked_space()
        self.indexed = IndexedAlternatives.around(self.space)
        self.run = ReplaceOne(self.search.parent.params, self.search.parent.config)
        self.calibration, self.heldout = self.search.traces("calibration"), self.search.traces("heldout")
        self.gold_traces = in_random_order(self.heldout)[:gold]
        self.gold = ScoreTable.empty(self.indexed.listed, self.heldout)
        start = time.perf_counter()
        Fill(self.gold, self.run, range(len(self.indexed.listed)), self.gold_traces)()
        listed, seconds = len(self.indexed.listed), time.perf_counter() - start
        CONSOLE.print(f"gold: {listed} alternatives on {gold} held-out traces, {seconds:.0f} s")


def ranks(found: _Found) -> None:
    gold, order = found.gold.means(), in_random_order(found.calibration)
    everything = range(len(found.indexed.listed))
    lens = fit_lens(
        found.run, micro_batches([found.calibration[n] for n in order[:LENS_TRACES]], tokens_per_batch=1024)
    )
    looked = ScoreTable.empty(found.indexed.listed, found.calibration)
    Fill(looked, lens, everything, order)()
    first = ScoreTable.empty(found.indexed.listed, found.calibration)
    first.values[:, order[:LENS_TRACES]] = looked.values[:, order[:LENS_TRACES]]
    CONSOLE.print(f"lens on {LENS_TRACES} traces: Spearman with gold {spearman(first.means(), gold):.3f}")
    for traces in (8, 16, 32):
        correlations: dict[str, list[float]] = {"exact": [], "exact and lens together": []}
        for start in range(0, 8 * traces, traces):
            table = ScoreTable.empty(found.indexed.listed, found.calibration)
            Fill(table, found.run, everything, order[start : start + traces])()
            # The lens sees what it would in a search that draws these traces first: LENS_TRACES, these among them.
            seen = (order[start:] + order[:start])[:LENS_TRACES]
            table.lens = np.full(looked.values.shape[:2], np.nan)
            table.lens[:, seen] = looked.values[:, seen, 0]
            for values, scores in zip(correlations.values(), (table.means(), table.estimates()), strict=True):
                values.append(spearman(scores, gold))
        for what, values in correlations.items():
            shown = ", ".join(f"{value:.3f}" for value in sorted(values))
            mean = statistics.mean(values)
            CONSOLE.print(f"{what}, {traces} traces: Spearman with gold {mean:.3f} in the mean of eight draws: {shown}")


def sets(found: _Found) -> None:
    """KL summed over layers, each cut alone to a count, on gold traces; sets are chosen on calibration traces."""
    table = ScoreTable.empty(found.indexed.listed, found.calibration)
    numbers = [n for of_layer in found.indexed.experts for n in of_layer if n is not None]
    Fill(table, found.run, numbers, in_random_order(found.calibration)[:96])()
    chosen, gold = table.means(), found.gold.means()
    for count in sorted({choice.count for choices in found.space.expert_choices for choice in choices})[:-1]:
        best, alone = 0.0, 0.0
        for choices, of_layer in zip(found.space.expert_choices, found.indexed.experts, strict=True):
            same = [(n, c) for n, c in zip(of_layer, choices, strict=True) if c.count == count and n is not None]
            best += gold[min(same, key=lambda pair: chosen[pair[0]])[0]]
            alone += next(gold[n] for n, c in same if "removal_error" in c.method.split("+"))
        CONSOLE.print(f"{count} experts: best of methods {best:.4f}, removal_error {alone:.4f}")


def adaptive(found: _Found) -> None:
    results = {}
    for method in ("exact", "adaptive"):
        # Enough that the lens drops none, so that both methods score the same alternatives.
        settings = ScoreSettings(method=method, keep_sets=0 if method == "exact" else len(found.indexed.listed))
        search = Search(replace(found.search.recipe, score=settings), CONSOLE)
        scorer = search.scorer()
        path = search.run / f"benchmark-{method}-book.safetensors"
        path.unlink(missing_ok=True)
        start = time.perf_counter()
        scored = scorer(found.space, path, "benchmark")
        seconds = time.perf_counter() - start
        path.unlink()
        layers = found.search.parent.config.num_layers
        pairs = scored.table.scored.sum(axis=1)
        work = sum((layers - layer) * pairs[n] for n, (layer, _) in enumerate(scored.indexed.listed))
        work += 0 if method == "exact" else LENS_TRACES * len(pairs)
        (child,) = search.problem_of(scored.space, scored.scores).solve()
        ((score,), kl, tokens) = score_children(
            search.parent.params, search.parent.config, [search.child(child)], found.heldout
        )
        results[method] = (work, seconds, kl[0])
        CONSOLE.print(
            f"{method}: {work:,.0f} layers run, {seconds:.0f} s, child's held-out KL {score.kl:.4f} ±{score.kl_se:.4f}"
        )
    (exact_work, exact_seconds, one), (work, seconds, other) = results["exact"], results["adaptive"]
    apart = Difference.between(other, one, tokens)
    CONSOLE.print(
        f"adaptive: {exact_work / work:.1f}x fewer layers, {exact_seconds / seconds:.1f}x less time, KL "
        f"{apart.mean:+.4f} ±{apart.se:.4f}"
    )


def additive(found: _Found, architectures: int = 60) -> None:
    source, config = np.random.default_rng(0), found.search.parent.config
    gold = found.indexed.scores(found.gold.means())
    children, predicted = [], []
    for _ in range(architectures):
        # From nearly the parent to nearly nothing: each architecture has its own probability of changing a layer.
        share, total, blocks = source.uniform(0.1, 1.0), 0.0, []
        for layer, (choices, windows) in enumerate(zip(found.space.expert_choices, found.space.windows, strict=True)):
            experts = int(source.integers(len(choices))) if source.random() < share else 0
            window = int(source.integers(len(windows))) if source.random() < share else 0
            total += gold.experts[layer][experts] + gold.attention[layer][window]
            blocks.append(ChildBlock(choices[experts].kept, windows[window]))
        children.append(Child(config, tuple(blocks)))
        predicted.append(total)
    traces = [found.heldout[n] for n in found.gold_traces]
    measured = score_children(found.search.parent.params, config, children, traces)
    real = [score.kl for score in measured.scores]
    changed = [(r, p) for r, p in zip(real, predicted, strict=True) if p > 0]
    ratio = np.median([r / p for r, p in changed])
    CONSOLE.print(
        f"{architectures} random architectures, KL {min(real):.3f} to {max(real):.3f}: Spearman of predicted and real "
        f"{spearman(predicted, real):.3f}, median real over predicted {ratio:.2f}"
    )


PARTS: dict[str, Callable[[Any], None]] = {
    "cost": lambda _: cost(),
    "ranks": ranks,
    "sets": sets,
    "adaptive": adaptive,
    "additive": additive,
}

if __name__ == "__main__":
    main()
