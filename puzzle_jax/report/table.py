"""The result of a search on one screen: the models compared, their costs and quality, and the child's layers.

The same rows are printed in the terminal (rich) and written as markdown. Left out: figures and the HTML page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from puzzle_jax.files import Json
from puzzle_jax.report.tables import Section

BUSY = 0.03
"""Relative standard error of a predicted speed above which the table warns about it."""

WORST = "*"
"""Marks the task and the effort at which the child is worst."""

BAR = 32  # most characters of a layer's bar


@dataclass(frozen=True)
class SearchReport:
    """Everything that the table shows.

    Attributes:
      evaluation: content of evaluation.json, by model name, the parent first.
      efforts: efforts whose accuracy is shown where it was measured.
      scenarios: name, batch, input_tokens and output_tokens of each deployment.
      child: directory of the child's checkpoint.
    """

    evaluation: Mapping[str, Json]
    efforts: Sequence[str]
    scenarios: Sequence[Mapping[str, Json]]
    child: Path

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Heading and one row per measure, with a column per model."""
        entries = list(self.evaluation.values())
        sizes = ("parameters", "checkpoint_bytes", "expert_bytes")
        rows = [
            *([size.replace("_", " "), *_ratios([e[size] for e in entries])] for size in sizes),
            *(row for scenario in self.scenarios for row in self._scenario_rows(scenario)),
            ["predicted KL", *(f"{e['predicted_kl']:.4f}" for e in entries)],
            *self._expected_rows(),
            ["held-out KL", *(f"{e['heldout']['kl']:.4f} ±{e['heldout']['kl_se']:.4f}" for e in entries)],
        ]
        for effort in self.measured_efforts:
            of_effort = [e["efforts"][effort] for e in entries]
            rows.append([f"accuracy, {effort}", *(f"{x['accuracy']:.1%} ±{x['accuracy_se']:.1%}" for x in of_effort)])
            rows.append([f"  mean tokens, {effort}", *(f"{x['mean_tokens']:.1f}" for x in of_effort)])
            rows += self._ended_rows(effort)
        rows.append(["meets the target", *("no" if e["missed"] else "yes" for e in entries)])
        rows[-1][1] = "-"
        return ["", *(name.replace("_", " ") for name in self.evaluation)], rows

    def _expected_rows(self) -> list[list[str]]:
        """The KL that was expected of the child, if the evaluation has it: of no other model is one measured."""
        found = [entry.get("expected_kl") for entry in self.evaluation.values()]
        if not any(found):
            return []
        return [["expected KL", *("-" if x is None else f"{x['kl']:.4f} ±{x['kl_se']:.4f}" for x in found)]]

    def _ended_rows(self, effort: str) -> list[list[str]]:
        """Tokens over the parent's, and shares of answers that ended by themselves with their difference from the
        parent's in points, both with 95% intervals; none where the evaluation does not have them."""
        entries = list(self.evaluation.values())
        compared = [entry["compared"][effort] for entry in entries if "compared" in entry]
        if len(compared) != len(entries) - 1:
            return []
        tokens = ["-", *(_within(of["tokens"], of["tokens"]["value"], "{:.2f}") for of in compared)]
        shares = [f"{1 - entry['efforts'][effort]['truncated']:.1%}" for entry in entries]
        points = [
            {end: None if (x := of["ended"][end]) is None else 100 * x for end in ("low", "high")} for of in compared
        ]
        falls = [
            _within(ends, 100 * of["ended"]["difference"], "{:+.1f}") for ends, of in zip(points, compared, strict=True)
        ]
        ended = [shares[0], *(f"{share}, {fall}" for share, fall in zip(shares[1:], falls, strict=True))]
        return [[f"  tokens over the parent's, {effort}", *tokens], [f"  ended by itself, {effort}", *ended]]

    @property
    def measured_efforts(self) -> list[str]:
        """Efforts at which accuracy was measured: none where the search had no task."""
        return [effort for effort in self.efforts if all(effort in e["efforts"] for e in self.evaluation.values())]

    def _scenario_rows(self, scenario: Mapping[str, Json]) -> list[list[str]]:
        """Rows of cache bytes, batches where the scenario leaves them open, and speeds; with the scenario's name where
        there are several."""
        found = [entry["scenarios"][scenario["name"]] for entry in self.evaluation.values()]
        where = f", {scenario['name']}" if len(self.scenarios) > 1 else ""
        predicted = _speeds([x["predicted_tokens_per_second"] for x in found], [x["predicted_error"] for x in found])
        rows = [[f"KV bytes per request{where}", *_ratios([x["kv_bytes"] for x in found])]]
        if scenario["batch"] is None:
            rows.append([f"requests together{where}", *(str(x["batch"]) for x in found)])
        rows.append([f"predicted tokens/s{where}", *predicted])
        if all(x["throughput"] for x in found):
            measured = [x["throughput"] for x in found]
            rows.append([f"measured tokens/s{where}", *_speeds([x["tokens_per_second"] for x in measured])])
            rows.append(["  quartiles", *(f"{x['low']:,.0f} to {x['high']:,.0f}" for x in measured)])
        return rows

    def groups(self) -> Section | None:
        """Held-out KL and accuracy by task and effort; the child's highest KL, and where its accuracy falls most below
        the parent's, are marked. None if the evaluation does not have them."""
        entries = self.evaluation
        if not all("heldout_kl" in entry for entry in entries.values()):
            return None
        child, parent = entries["child"], entries["parent"]
        names = [(kind, name) for kind in ("tasks", "efforts") for name in child["heldout_kl"][kind]]
        right = [(kind, name) for kind in ("tasks", "efforts") for name in child.get(kind, {})]
        falls = {(k, n): parent[k][n]["accuracy"] - child[k][n]["accuracy"] for k, n in right}
        worst_kl = {max(of, key=lambda at: child["heldout_kl"][at[0]][at[1]]["kl"]) for of in _by_kind(names)}
        worst_fall = {max(of, key=lambda at: falls[at]) for of in _by_kind(right)}
        rows = []
        for at in names:
            told = [f"{e['heldout_kl'][at[0]][at[1]]['kl']:.4f}" for e in entries.values()]
            rows.append([f"held-out KL, {at[1]}", *_marked(told, entries, at in worst_kl)])
        for at in right:
            told = [f"{e[at[0]][at[1]]['accuracy']:.1%}" for e in entries.values()]
            rows.append([f"accuracy, {at[1]}", *_marked(told, entries, at in worst_fall and falls[at] > 0)])
        remark = (
            "The task and the effort with the child's highest KL, and those at which its accuracy falls most below the "
            f"parent's, are marked {WORST}."
        )
        heading = ["", *(name.replace("_", " ") for name in entries)]
        return Section("By task and effort", heading, rows, (remark,), emphasised="child")

    def layers(self) -> list[str]:
        """One line per layer: experts kept, also as a bar, and attention, with the parent's where it differs."""
        lines = []
        parent, child = (self.evaluation[name]["layers"] for name in ("parent", "child"))
        for index, (old, new) in enumerate(zip(parent, child, strict=True)):
            kept, of = new["num_local_experts"], old["num_local_experts"]
            width = min(of, BAR)
            bar = f"{'█' * round(width * kept / of):·<{width}}"
            window, was = _window(new["sliding_window"]), _window(old["sliding_window"])
            change = "" if window == was else f"  (was {was})"
            lines.append(f"layer {index:>2}  {bar}  {kept:>3} of {of} experts  {window}{change}")
        return lines

    def misses(self) -> list[str]:
        """One line for every model but the parent that does not meet the target, with the limits that it violates."""
        return [
            f"{name.replace('_', ' ')} cannot meet the target: {'; '.join(entry['missed'])}"
            for name, entry in self.evaluation.items()
            if name != "parent" and entry["missed"]
        ]

    def caption(self) -> str:
        """A sentence on the scenarios, on what was not measured, and on timings that disagree."""
        scenarios = "; ".join(
            "scenario {name}: {together} of {input_tokens} input and {output_tokens} output tokens together".format(
                together="as many requests as fit" if s["batch"] is None else f"{s['batch']} requests", **s
            )
            for s in self.scenarios
        )
        if not self.measured_efforts:
            scenarios += "; accuracy was not measured, since there is no task"
        errors = [x["predicted_error"] for entry in self.evaluation.values() for x in entry["scenarios"].values()]
        if max(errors) > BUSY:
            scenarios += (
                f"; timings disagree, so that predicted speeds are uncertain by up to {max(errors):.0%}, as on a "
                "machine that does other work too: run the search again when it is quiet"
            )
        return scenarios

    def show(self, console: Console) -> None:
        """Prints the table, the layers, and where the child is."""
        console.print(self._section().table())
        if (groups := self.groups()) is not None:
            console.print(groups.table())
        for line in (*self.misses(), *self.layers()):
            console.print(line, highlight=False)
        where = Text.assemble("The child is saved in ", (str(self.child), "bold"))
        console.print(where, highlight=False, soft_wrap=True)

    def markdown(self) -> str:
        """The table as text for a file."""
        layers = "```\n" + "\n".join(self.layers()) + "\n```"
        groups = [] if (section := self.groups()) is None else [section.markdown()]
        return "\n\n".join([self._section().markdown(), *self.misses(), layers, *groups]) + "\n"

    def _section(self) -> Section:
        return Section("", *self.rows(), (self.caption(),), emphasised="child")


def _within(interval: Mapping[str, Json], value: float | None, form: str) -> str:
    """A value with the ends of its interval."""
    if value is None:
        return "-"
    low, high = ("?" if interval[end] is None else form.format(interval[end]) for end in ("low", "high"))
    return f"{form.format(value)} ({low} to {high})"


def _by_kind(names: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Names of tasks, and names of efforts, if there are several of them."""
    by_kind = [[at for at in names if at[0] == kind] for kind in ("tasks", "efforts")]
    return [of for of in by_kind if len(of) > 1]


def _marked(told: Sequence[str], models: Mapping[str, Json], worst: bool) -> list[str]:
    """The cells of a row, with the child's marked if it is the worst."""
    return [f"{cell} {WORST}" if worst and name == "child" else cell for cell, name in zip(told, models, strict=True)]


def _window(window: int | None) -> str:
    return "full attention" if window is None else f"window {window}"


def _ratios(values: Sequence[int | float]) -> list[str]:
    """Amounts, each with its share of the first."""
    return [f"{_amount(value)} ({value / values[0]:.0%})" for value in values]


def _speeds(values: Sequence[float], errors: Sequence[float] | None = None) -> list[str]:
    """Rates, each with its ratio to the first and, where there are errors, the ratio's standard error."""
    told = []
    for value, error in zip(values, errors or [0.0] * len(values), strict=True):
        ratio = value / values[0]
        told.append(f"{value:,.0f} ({ratio:.2f}x{f' ±{ratio * error:.2f}' if error else ''})")
    return told


def _amount(value: int | float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f}{unit}"
    return f"{value:.0f}"
