"""The tables of docs/costs.md: published speed-ups beside the roofline's, and how much each assumption changes them.

    python benchmarks/estimate.py             prints the tables
    python benchmarks/estimate.py --write     puts them into docs/costs.md, between its marks

Needs only the config.json of both models (benchmarks/published), and no accelerator.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from puzzle_jax.costs.assumptions import Assumptions, Efficiencies, Efficiency, Operations, default_assumptions
from puzzle_jax.costs.deployments import get_scenario
from puzzle_jax.costs.estimate import compare, estimate
from puzzle_jax.costs.estimate_command import read_architecture
from puzzle_jax.costs.hardware import Hardware, hardware_named
from puzzle_jax.costs.roofline import Roofline
from puzzle_jax.costs.routing import Profile
from puzzle_jax.costs.scenario import Scenario

DOCUMENT = Path(__file__).parent.parent / "docs" / "costs.md"
PUBLISHED = Path(__file__).parent / "published"
CHILD, PARENT = (read_architecture(PUBLISHED / f"{name}.json") for name in ("gpt-oss-puzzle-88B", "gpt-oss-120b"))

ROWS = {"h100x8-64k": "1.63", "h100x8-4k": "1.22", "h100x1-64k": "up to 2.82"}
ASSUMED, H100 = default_assumptions(), hardware_named("h100")


@dataclass(frozen=True)
class Setting:
    """Everything that an estimate depends on besides the models and the lengths."""

    assumptions: Assumptions = ASSUMED
    hardware: Hardware = H100
    profile: Profile | None = None
    changes: dict[str, Any] = field(default_factory=dict)  # replaced fields of the scenario

    def roofline(self) -> Roofline:
        return Roofline(self.hardware, self.assumptions, self.profile)

    def speedup(self, scenario: Scenario) -> float:
        return compare(CHILD, PARENT, replace(scenario, **self.changes), self.roofline()).speedup


def assuming(**changes: Any) -> Setting:
    return Setting(assumptions=replace(ASSUMED, **changes))


def reaching(kind: str, **shares: float) -> Setting:
    """Assumes other shares of peak performance for one kind of operation."""
    reached = ASSUMED.efficiency
    return assuming(efficiency=replace(reached, **{kind: replace(getattr(reached, kind), **shares)}))


def zipf(exponent: float) -> Profile:
    """Loads that fall with an expert's rank; those of the first few are similar."""
    return tuple((rank + 8.0) ** -exponent for rank in range(128))


VARIANTS: Sequence[tuple[str, str, Setting, str, Setting]] = (
    ("cache, both models", "FP8", Setting(), "bfloat16", Setting(changes={"kv_bytes_per_value": 2})),
    ("usable memory", "0.85", assuming(usable_memory=0.85), "0.95", assuming(usable_memory=0.95)),
    ("reserve per device", "1 GB", assuming(reserve_bytes=10**9), "4 GB", assuming(reserve_bytes=4 * 10**9)),
    ("largest batch", "128", assuming(max_batch=128), "1024", assuming(max_batch=1024)),
    ("prefill tokens per step", "4096", assuming(prefill_tokens=4096), "16384", assuming(prefill_tokens=16384)),
    ("rows of a tile", "16", assuming(tile_rows=16), "128", assuming(tile_rows=128)),
    ("attention, bandwidth", "0.5", reaching("attention", bandwidth=0.5), "0.9", reaching("attention", bandwidth=0.9)),
    ("attention, rate", "0.2", reaching("attention", rate=0.2), "0.8", reaching("attention", rate=0.8)),
    ("experts, bandwidth", "0.3", reaching("experts", bandwidth=0.3), "0.9", reaching("experts", bandwidth=0.9)),
    ("experts, rate", "0.2", reaching("experts", rate=0.2), "0.8", reaching("experts", rate=0.8)),
    ("dense, bandwidth", "0.5", reaching("dense", bandwidth=0.5), "0.9", reaching("dense", bandwidth=0.9)),
    ("dense, rate", "0.35", reaching("dense", rate=0.35), "0.85", reaching("dense", rate=0.85)),
    ("head, bandwidth", "0.5", reaching("head", bandwidth=0.5), "0.9", reaching("head", bandwidth=0.9)),
    ("link, share of bandwidth", "0.3", assuming(link_efficiency=0.3), "0.9", assuming(link_efficiency=0.9)),
    (
        "link, latency",
        "3 us",
        Setting(hardware=replace(H100, link_latency_seconds=3e-6)),
        "12 us",
        Setting(hardware=replace(H100, link_latency_seconds=12e-6)),
    ),
    (
        "launch of an operation",
        "1 us",
        Setting(hardware=replace(H100, launch_seconds=1e-6)),
        "4 us",
        Setting(hardware=replace(H100, launch_seconds=4e-6)),
    ),
    ("host per step", "0", assuming(step_seconds=0), "2 ms", assuming(step_seconds=0.002)),
    ("passes over logits", "2", assuming(sampling_passes=2), "8", assuming(sampling_passes=8)),
    (
        "routing",
        "Zipf 0.5",
        Setting(profile=zipf(0.5)),
        "Zipf 1",
        Setting(profile=zipf(1.0)),
    ),
)

FULL = Efficiency(1.0, 1.0)
FLOOR = replace(
    ASSUMED,
    max_batch=10**6,
    tile_rows=1,
    efficiency=Efficiencies(FULL, FULL, FULL, FULL),
    link_efficiency=1.0,
    operations=Operations(0, 0, 0),
    step_seconds=0,
    sampling_passes=0,
)
SILENT = replace(H100, link_latency_seconds=0, link_bytes_per_second=1e30)


def published() -> str:
    """NVIDIA's reported speed-ups beside the estimates, by the precision of the cache."""
    lines = ["| scenario | published | both FP8 | error | both bfloat16 | child FP8, parent bfloat16 | batches (FP8) |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in (*ROWS, "h100x1-4k", "h100x1-8k"):
        scenario, wide = get_scenario(name), get_scenario(f"{name}-bf16")
        found, in_wide = compare(CHILD, PARENT, scenario), compare(CHILD, PARENT, wide)
        mixed = found.model.throughput / in_wide.baseline.throughput
        text = ROWS.get(name, "")
        error = f"{100 * (found.speedup / float(text) - 1):+.0f}%" if re.fullmatch(r"[\d.]+", text) else ""
        batches = f"{found.model.batch} / {found.baseline.batch}"
        lines.append(
            f"| {name} | {text} | {found.speedup:.2f} | {error} | {in_wide.speedup:.2f} | {mixed:.2f} | {batches} |"
        )
    return "\n".join(lines)


def sensitivity() -> str:
    """Speed-ups with one assumption changed at a time."""
    lines = ["| assumption | moved to | " + " | ".join(ROWS) + " |", "|---|---|" + "---|" * len(ROWS)]

    def add(name: str, value: str, setting: Setting) -> None:
        speedups = " | ".join(f"{setting.speedup(get_scenario(row)):.2f}" for row in ROWS)
        lines.append(f"| {name} | {value} | {speedups} |")

    add("as assumed", "", Setting())
    for name, low, at_low, high, at_high in VARIANTS:
        add(name, low, at_low)
        add("", high, at_high)
    return "\n".join(lines)


def ladder() -> str:
    """From a plain roofline to the estimate, adding one assumption at a time, for 4K tokens in and out."""
    scenario = get_scenario("h100x8-4k")
    steps: list[tuple[str, Callable[[Setting], Setting]]] = [
        ("bytes and operations alone, any batch that fits", lambda s: s),
        ("at most 256 requests", lambda s: replace(s, assumptions=replace(s.assumptions, max_batch=256))),
        (
            "shares of the peaks",
            lambda s: replace(s, assumptions=replace(s.assumptions, efficiency=ASSUMED.efficiency)),
        ),
        ("tiles of 64 rows", lambda s: replace(s, assumptions=replace(s.assumptions, tile_rows=64))),
        (
            "collectives",
            lambda s: replace(
                s, hardware=H100, assumptions=replace(s.assumptions, link_efficiency=ASSUMED.link_efficiency)
            ),
        ),
        ("launches, host, sampling", lambda s: replace(s, assumptions=ASSUMED)),
    ]
    lines = ["| counted, each beside those above | speed-up | of decoding alone | batches |", "|---|---|---|---|"]
    setting = Setting(FLOOR, SILENT)
    for name, change in steps:
        setting = change(setting)
        found = compare(CHILD, PARENT, scenario, setting.roofline())
        decode = found.model.batch / found.baseline.batch * found.baseline.decode_seconds / found.model.decode_seconds
        batches = f"{found.model.batch} / {found.baseline.batch}"
        lines.append(f"| {name} | {found.speedup:.3f} | {decode:.3f} | {batches} |")
    return "\n".join(lines)


def by_batch() -> str:
    """Speed-up by batch size at 4K tokens in and out, and what the parent's decode step spends its time on."""
    lines = ["| batch | speed-up | of decoding alone | parent's step, ms | experts in it | caches | the rest |"]
    lines.append("|---|---|---|---|---|---|---|")
    for batch in (8, 16, 32, 64, 128, 256, 512, 1024):
        scenario = get_scenario("h100x8-4k").at(batch)
        child, parent = estimate(CHILD, scenario), estimate(PARENT, scenario)
        parts, step = parent.breakdown["decode"], parent.decode_seconds
        shares = [parts["experts"] / step, parts["kv_reads"] / step]
        shares.append(1 - sum(shares))
        lines.append(
            f"| {batch} | {child.throughput / parent.throughput:.3f} | {step / child.decode_seconds:.3f} | "
            f"{1e3 * step:.2f} | " + " | ".join(f"{share:.0%}" for share in shares) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}")
    options = parser.parse_args()
    text = DOCUMENT.read_text() if options.write else ""
    for table in (published, sensitivity, ladder, by_batch):
        found, name = table(), table.__name__
        print(f"{found}\n")
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=found: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    if options.write:
        DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
