"""Models side by side in one table: the accuracy of each, its tokens, and how many requests it serves.

Columns are models, the reference first; rows are measures at an effort. The rows are the same in the terminal, in
markdown and in HTML. Left out: accuracy by task, quartiles of speeds and McNemar's test, which `report.evaluation` has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from puzzle_jax.files import Json
from puzzle_jax.report.tables import Section

NONE = "-"


@dataclass(frozen=True)
class ComparisonTable:
    """The table of an evaluation.json's content, for all of its models or for those in `only`."""

    evaluation: Mapping[str, Json]
    only: Sequence[str] = ()

    @property
    def reference(self) -> str:
        return self.evaluation["reference"]

    @property
    def models(self) -> list[str]:
        """Names of the columns, in the order that `only` gives them."""
        return [name for name in self.only or self.evaluation["summaries"] if name in self.evaluation["summaries"]]

    @property
    def efforts(self) -> list[str]:
        return list(self.evaluation["summaries"][self.reference])

    def section(self, title: str = "") -> Section:
        """The table with a remark on how to read it."""
        rows = [row for effort in self.efforts for row in self._rows(effort)]
        rows += self._over_all()
        asked = self.evaluation["summaries"][self.reference][self.efforts[0]]["all"]["answers"]
        remarks = [
            f"{asked} problems per effort, the same for all models. Differences to {self.reference} in points, with "
            "95% intervals of a paired bootstrap; retention is accuracy over its accuracy."
        ]
        if self.evaluation["throughput"]:
            device = self.evaluation["throughput"]["device"]
            remarks.append(f"Tokens per second are medians on {device}, each model at its own lengths.")
        return Section(title, ["", *self.models], rows, tuple(remarks))

    def verdict(self, name: str) -> str:
        """One sentence that says how a model compares with the reference."""
        overall, comparison = self.evaluation["overall"], self.evaluation["comparisons"][name]
        own, theirs = overall[name]["value"], overall[self.reference]["value"]
        sentence = (
            f"{name} answers {own:.1%} of the problems over all efforts, {self.reference} {theirs:.1%} "
            f"({_points(comparison['overall']['value'])} points, {_interval(comparison['overall'])})"
        )
        rates = {effort: entry["relative_request_rate"] for effort, entry in comparison["efforts"].items()}
        if all(rate is not None and rate["value"] is not None for rate in rates.values()):
            served = [f"{rate['value']:.2f}x at {effort}" for effort, rate in rates.items()]
            listed = f"{', '.join(served[:-1])} and {served[-1]}" if len(served) > 1 else served[0]
            sentence += f", and serves {listed} effort as many requests per second"
            above, who = self._above(name)
            sentence += f"; it is more accurate at every rate that {who}" if above else ""
        return f"{sentence}."

    def _rows(self, effort: str) -> list[list[str]]:
        summaries = {name: self.evaluation["summaries"][name][effort]["all"] for name in self.models}
        compared = {name: self._compared(name, effort) for name in self.models}

        def row(title: str, cell: Mapping[str, str]) -> list[str]:
            return [f"{effort}: {title}", *(cell[name] for name in self.models)]

        def against(key: str, form: str) -> dict[str, str]:
            return {name: NONE if of is None else _value(of[key], form) for name, of in compared.items()}

        rows = [
            row("accuracy", {name: f"{of['accuracy']:.1%}" for name, of in summaries.items()}),
            row("difference", {n: _points(of["all"]["difference"] if of else None) for n, of in compared.items()}),
            row("95% interval", {n: _interval(of and of["all"]) for n, of in compared.items()}),
            row("retention", against("retention", "{:.1%}")),
            row("tokens", {name: f"{of['mean_tokens']:.1f}" for name, of in summaries.items()}),
            row("tokens of right answers", {name: _tokens(of) for name, of in summaries.items()}),
            row("ended by itself", {name: f"{1 - of['truncated']:.1%}" for name, of in summaries.items()}),
        ]
        if self.evaluation["throughput"]:
            speeds = self.evaluation["throughput"]["workloads"][effort]
            rates = {name: f"{speeds[name]['tokens_per_second']['median']:,.0f}" for name in self.models}
            rows.append(row("tokens/s", rates))
            rows.append(row(f"requests/s over {self.reference}'s", against("relative_request_rate", "{:.2f}x")))
        return rows

    def _over_all(self) -> list[list[str]]:
        """Rows over all efforts."""
        overall = self.evaluation["overall"]
        found = {name: self.evaluation["comparisons"].get(name) for name in self.models}
        rows = [
            ["all: accuracy", *(_value(overall[name], "{:.1%}") for name in self.models)],
            ["all: difference", *(_points(of["overall"]["value"] if of else None) for of in found.values())],
            ["all: 95% interval", *(_interval(of and of["overall"]) for of in found.values())],
        ]
        if self.evaluation["throughput"]:
            above = [NONE if of is None else "yes" if self._above(name)[0] else "no" for name, of in found.items()]
            rows.append([f"above the curve of {self.reference} everywhere", *above])
        return rows

    def _compared(self, name: str, effort: str) -> Mapping[str, Json] | None:
        comparison = self.evaluation["comparisons"].get(name)
        return comparison and comparison["efforts"][effort]

    def _above(self, name: str) -> tuple[bool, str]:
        """Returns whether the curve lies above the reference's, and who serves the rates at which that was asked.

        A model whose slowest effort is faster than the reference's fastest shares no rate with it: it is compared at
        every rate that the reference serves, by its best accuracy at that rate or faster (`evaluate.frontier`).
        """
        comparison = self.evaluation["comparisons"][name]
        for question, who in (("common", "both serve"), ("reachable", f"{self.reference} serves")):
            if comparison[question] and (gap := comparison[question]["gap"]):
                return gap["accuracy"] > 0, who
        return False, ""


def _tokens(summary: Mapping[str, Json]) -> str:
    tokens = summary.get("mean_right_tokens")
    return NONE if tokens is None else f"{tokens:.1f}"


def _value(estimate: Mapping[str, Json] | None, form: str) -> str:
    return NONE if estimate is None or estimate["value"] is None else form.format(estimate["value"])


def _points(difference: float | None) -> str:
    """A difference of accuracies in points."""
    return NONE if difference is None else f"{100 * difference:+.1f}"


def _interval(estimate: Mapping[str, Json] | None) -> str:
    """The ends of a difference's interval in points."""
    if estimate is None:
        return NONE
    low, high = ("?" if end is None else f"{100 * end:+.1f}" for end in (estimate["low"], estimate["high"]))
    return f"{low} to {high}"
