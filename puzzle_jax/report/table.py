"""The answer of a search on one screen: who was compared, at what cost, with what quality, and what the child is.

The same rows are printed in the terminal (rich) and written as markdown. Left out: figures and the HTML page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BAR = 32  # characters of a layer's bar, at most


@dataclass(frozen=True)
class SearchReport:
    """Everything that the table shows.

    Attributes:
      evaluation: content of evaluation.json: by model name, the parent first.
      efforts: columns of accuracy.
      scenario: the deployment that speeds and KV bytes are for: name, batch, input_tokens, output_tokens.
      child: where the child's checkpoint lies.
    """

    evaluation: Mapping[str, Any]
    efforts: Sequence[str]
    scenario: Mapping[str, Any]
    child: Path

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Heading and one row per measure, with a column per model."""
        names = list(self.evaluation)
        parent = self.evaluation["parent"]

        def ratio(key: str) -> list[str]:
            return [f"{_amount(e[key])} ({e[key] / parent[key]:.0%})" for e in self.evaluation.values()]

        def speed(of: Any, reference: Any) -> str:
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
        """One line per layer: experts kept, as a bar too, and the attention, with the parent's where it differs."""
        lines = []
        parent, child = (self.evaluation[name]["layers"] for name in ("parent", "child"))
        for index, (old, new) in enumerate(zip(parent, child, strict=True)):
            kept, of = new["num_local_experts"], old["num_local_experts"]
            width = min(of, BAR)
            filled = round(width * kept / of)
            bar = "█" * filled + "·" * (width - filled)
            window, was = _window(new["sliding_window"]), _window(old["sliding_window"])
            change = "" if window == was else f"  (was {was})"
            lines.append(f"layer {index:>2}  {bar}  {kept:>3} of {of} experts  {window}{change}")
        return lines

    def misses(self) -> list[str]:
        """One line for every limit that a baseline breaks."""
        found = []
        for name, entry in self.evaluation.items():
            if name != "parent" and entry["missed"]:
                found.append(f"{name.replace('_', ' ')} cannot meet the target: {'; '.join(entry['missed'])}")
        return found

    def caption(self) -> str:
        return (
            "scenario {name}: {batch} requests of {input_tokens} input and {output_tokens} output tokens together"
        ).format(**self.scenario)

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


def _window(window: int | None) -> str:
    return "full attention" if window is None else f"window {window}"


def _amount(value: int | float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f}{unit}"
    return f"{value:.0f}"
