"""The answer of a search on one screen: who was compared, at what cost, with what quality, and what the child is.

The same rows are printed in the terminal (rich) and written as markdown. Left out: figures and the HTML page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from puzzle_jax.config import BlockConfig, ModelConfig


class Architecture(Protocol):
    """What the report needs of a candidate."""

    @property
    def blocks(self) -> tuple[BlockConfig, ...]: ...


class Deployment(Protocol):
    """What the report needs of a scenario."""

    @property
    def name(self) -> str: ...
    @property
    def input_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def batch(self) -> int: ...


@dataclass(frozen=True)
class SearchReport:
    """Everything that the table shows.

    Attributes:
      evaluation: content of evaluation.json, by model name, the parent first.
      architectures: by the same names.
      parent: the parent's configuration.
      efforts: columns of accuracy.
      scenario: the deployment that speeds and KV bytes are for.
      child: where the child's checkpoint lies.
    """

    evaluation: Mapping[str, Any]
    architectures: Mapping[str, Architecture]
    parent: ModelConfig
    efforts: Sequence[str]
    scenario: Deployment
    child: Path

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Heading and one row per measure, with a column per model."""
        names = list(self.evaluation)
        parent = self.evaluation["parent"]

        def ratio(key: str) -> list[str]:
            return [f"{_amount(e[key])} ({e[key] / parent[key]:.0%})" for e in self.evaluation.values()]

        def speed(of: Any, reference: float) -> str:
            return f"{of:,.0f} ({of / reference:.2f}x)"

        entries = list(self.evaluation.values())
        rows = [
            ["parameters", *ratio("parameters")],
            ["checkpoint bytes", *ratio("checkpoint_bytes")],
            ["expert bytes", *ratio("expert_bytes")],
            ["KV bytes per request", *ratio("kv_bytes")],
            [
                "predicted tokens/s",
                *(speed(e["predicted_tokens_per_second"], parent["predicted_tokens_per_second"]) for e in entries),
            ],
            [
                "measured tokens/s",
                *(
                    speed(e["throughput"]["tokens_per_second"], parent["throughput"]["tokens_per_second"])
                    for e in entries
                ),
            ],
            [
                "  quartiles",
                *(f"{e['throughput']['low']:,.0f} to {e['throughput']['high']:,.0f}" for e in entries),
            ],
            ["predicted KL", *(f"{e['predicted_kl']:.4f}" for e in entries)],
            ["held-out KL", *(f"{e['heldout']['kl']:.4f} ±{e['heldout']['kl_se']:.4f}" for e in entries)],
        ]
        for effort in self.efforts:
            of_effort = [e["efforts"][effort] for e in entries]
            rows.append([f"accuracy, {effort}", *(f"{x['accuracy']:.1%} ±{x['accuracy_se']:.1%}" for x in of_effort)])
            rows.append([f"  mean tokens, {effort}", *(f"{x['mean_tokens']:.1f}" for x in of_effort)])
        rows.append(["meets the target", *("no" if e["missed"] else "yes" for e in entries)])
        rows[-1][1] = "-"
        return ["", *(name.replace("_", " ") for name in names)], rows

    def layers(self) -> list[str]:
        """One line per layer: experts kept as a bar, and the attention of parent and child."""
        lines = []
        for index, (old, new) in enumerate(zip(self.parent.blocks, self.architectures["child"].blocks, strict=True)):
            bar = "█" * new.num_experts + "·" * (old.num_experts - new.num_experts)
            if old.num_experts > 64:
                kept = round(32 * new.num_experts / old.num_experts)
                bar = "█" * kept + "·" * (32 - kept)
            change = "" if old.window == new.window else f"  (was {_window(old)})"
            count = f"{new.num_experts:>3} of {old.num_experts}"
            lines.append(f"layer {index:>2}  {bar}  {count} experts  {_window(new)}{change}")
        return lines

    def misses(self) -> list[str]:
        """One line for every limit that a baseline breaks."""
        found = []
        for name, entry in self.evaluation.items():
            if name != "parent" and entry["missed"]:
                found.append(f"{name.replace('_', ' ')} cannot meet the target: {'; '.join(entry['missed'])}")
        return found

    def caption(self) -> str:
        s = self.scenario
        return f"scenario {s.name}: {s.batch} requests of {s.input_tokens} input and {s.output_tokens} output tokens"

    def show(self, console: Console) -> None:
        """Prints the table, the layers, and where the child is."""
        heading, rows = self.rows()
        table = Table(caption=self.caption(), caption_justify="left")
        for position, name in enumerate(heading):
            style = "bold" if name == "child" else None
            table.add_column(name, justify="left" if position == 0 else "right", style=style, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for line in self.misses():
            console.print(line, highlight=False)
        for line in self.layers():
            console.print(line, highlight=False)
        console.print(f"The child is saved in [bold]{self.child}[/bold]", highlight=False, soft_wrap=True)

    def markdown(self) -> str:
        """The same as text for a file."""
        heading, rows = self.rows()
        lines = [f"| {' | '.join(heading)} |", f"|---|{'---:|' * (len(heading) - 1)}"]
        lines += [f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows]
        parts = [
            "\n".join(lines),
            self.caption(),
            *self.misses(),
            "```\n" + "\n".join(self.layers()) + "\n```",
        ]
        return "\n\n".join(parts) + "\n"


def _window(block: BlockConfig) -> str:
    return "full attention" if block.window is None else f"window {block.window}"


def _amount(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f}{unit}"
    return f"{value:.0f}"
