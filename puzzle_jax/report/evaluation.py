"""An evaluation on one screen: what every model answers, what it differs in, how fast it is, and the frontier.

The same tables are printed in the terminal (rich) and written as markdown, from the content of evaluation.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from puzzle_jax.report.tables import Section


@dataclass(frozen=True)
class EvaluationReport:
    """Everything that is shown.

    Attributes:
      evaluation: content of evaluation.json.
    """

    evaluation: Mapping[str, Any]

    def sections(self) -> Iterator[Section]:
        """The tables in reading order."""
        yield self._answers()
        if self.evaluation["comparisons"]:
            yield self._differences()
        if self.evaluation["throughput"]:
            yield self._speeds()
            if self.evaluation["comparisons"]:
                yield self._frontier()

    def verdicts(self) -> list[str]:
        """For every model but the reference: does its curve lie above the reference's?"""
        if not self.evaluation["points"]:
            return []
        return [
            sentence
            for name, comparison in self.evaluation["comparisons"].items()
            for sentence in self._verdict(name, comparison)
        ]

    def show(self, console: Console) -> None:
        """Prints the tables and the verdicts."""
        for section in self.sections():
            console.print(section.table())
        for sentence in self.verdicts():
            console.print(sentence, highlight=False)

    def markdown(self) -> str:
        """The same as text for a file."""
        parts = ["# Evaluation", *(section.markdown() for section in self.sections()), *self.verdicts()]
        if self.evaluation["points"]:
            parts.append("![accuracy against request rate](frontier.png)")
        return "\n\n".join(parts) + "\n"

    # Tables ---------------------------------------------------------------------------------------------------------

    def _answers(self) -> Section:
        rows = []
        for name, efforts in self.evaluation["summaries"].items():
            for effort, summary in efforts.items():
                everything = summary["all"]
                quantiles = " / ".join(f"{value:.0f}" for value in everything["token_quantiles"].values())
                rows.append(
                    [
                        f"{name}, {effort}",
                        _share_range(everything),
                        *(f"{task['accuracy']:.1%}" for task in summary["tasks"].values()),
                        f"{everything['mean_tokens']:.1f}",
                        quantiles,
                        f"{everything['truncated']:.1%}",
                    ]
                )
            overall = self.evaluation["overall"][name]
            blank = [""] * (len(rows[-1]) - 2)
            rows.append([f"{name}, all", _range(overall, "{:.1%}"), *blank])
        first = next(iter(next(iter(self.evaluation["summaries"].values())).values()))
        asked = first["all"]["answers"]
        quantiles = " / ".join(f"{q}%" for q in first["all"]["token_quantiles"])
        return Section(
            "Answers",
            ["", "accuracy", *first["tasks"], "mean tokens", quantiles, "truncated"],
            rows,
            (
                f"{asked} problems per effort and model; intervals of 95%; {quantiles} are quantiles of tokens.",
                *self._unscored(),
            ),
        )

    def _unscored(self) -> Iterator[str]:
        for name, efforts in self.evaluation["summaries"].items():
            count = sum(summary["all"].get("unscored", 0) for summary in efforts.values())
            if count:
                yield f"{count} answers of {name} could not be scored and count as wrong."

    def _differences(self) -> Section:
        rows = []
        for name, comparison in self.evaluation["comparisons"].items():
            for effort, entry in comparison["efforts"].items():
                everything = entry["all"]
                rows.append(
                    [
                        f"{name}, {effort}",
                        _range({**everything, "value": everything["difference"]}, "{:+.1%}"),
                        f"{everything['won']} / {everything['lost']}",
                        f"{everything['p_value']:.2g}",
                        *(f"{task['difference']:+.1%}" for task in entry["tasks"].values()),
                        _range(entry["retention"], "{:.1%}"),
                        _range(entry["relative_tokens"], "{:.3f}"),
                    ]
                )
            blank = [""] * (len(rows[-1]) - 2)
            rows.append([f"{name}, all", _range(comparison["overall"], "{:+.1%}"), *blank])
        tasks = next(iter(next(iter(self.evaluation["comparisons"].values()))["efforts"].values()))["tasks"]
        return Section(
            f"Compared with {self.evaluation['reference']} on the same problems",
            ["", "accuracy", "won / lost", "p", *tasks, "retention", "tokens"],
            rows,
            (
                f"Paired bootstrap over problems, {self.evaluation['settings']['bootstrap']} draws; "
                "won / lost: problems that only one of the two solves, p: McNemar's exact test.",
            ),
        )

    def _speeds(self) -> Section:
        throughput = self.evaluation["throughput"]
        rows = []
        for workload, models in throughput["workloads"].items():
            lengths = throughput["scenarios"].get(workload)
            what = f"{workload} ({lengths[0]} in, {lengths[1]} out)" if lengths else f"{workload} effort"
            for name, entry in models.items():
                speed, relative = entry["tokens_per_second"], entry["relative"]
                rows.append(
                    [
                        f"{what}, {name}",
                        str(entry["batch"]),
                        f"{speed['median']:,.0f} ({speed['low']:,.0f} to {speed['high']:,.0f})",
                        f"{relative['median']:.2f} ({relative['low']:.2f} to {relative['high']:.2f})",
                    ]
                )
        return Section(
            "Generated tokens per second",
            ["", "batch", "tokens/s", f"over {self.evaluation['reference']}"],
            rows,
            (
                f"Medians and quartiles over rounds on {throughput['device']}; batches are the largest that "
                f"{throughput['cache_memory']:,} bytes of cache hold; an effort has each model's own lengths.",
            ),
        )

    def _frontier(self) -> Section:
        points = self.evaluation["points"]
        reference = self.evaluation["reference"]
        highest = list(points[reference])[-1]
        rows = []
        for name, efforts in points.items():
            for effort, point in efforts.items():
                compared = self.evaluation["comparisons"].get(name)
                relative = compared["efforts"][effort]["relative_request_rate"] if compared else None
                rows.append(
                    [
                        f"{name}, {effort}",
                        _range(point["rate"], "{:.3f}"),
                        _range(point["accuracy"], "{:.1%}"),
                        _range(relative, "{:.3f}") if relative else "",
                    ]
                )
        return Section(
            "Accuracy and request rate",
            ["", f"rate ({reference}, {highest} = 1)", "accuracy", f"rate over {reference}'s at the effort"],
            rows,
            ("Request rate: tokens per second over mean generated tokens.",),
        )

    def _verdict(self, name: str, comparison: Mapping[str, Any]) -> Iterator[str]:
        reference = self.evaluation["reference"]
        common, reachable = comparison["common"], comparison["reachable"]
        if common["gap"] is None:
            yield (
                f"{name} and {reference} share no range of request rates, so that whether the curve of {name} lies "
                f"above that of {reference} has no answer."
            )
        else:
            low, high = common["gap"]["low"], common["gap"]["high"]
            yield (
                f"Over the request rates {low:.3f} to {high:.3f} that both cover, the curve of {name} is "
                f"{_position(common)} that of {reference}: {_certainty(common)}"
            )
        if reachable["gap"] is None:
            yield f"{name} does not reach every request rate that {reference} serves."
        else:
            high = reachable["gap"]["high"]
            yield (
                f"Over all request rates that {reference} serves (up to {high:.3f}), by the best accuracy at a rate or "
                f"faster, {name} is {_position(reachable)} {reference}: {_certainty(reachable)}"
            )


def _position(above: Mapping[str, Any]) -> str:
    return "everywhere above" if above["gap"]["accuracy"] > 0 else "not everywhere above"


def _certainty(above: Mapping[str, Any]) -> str:
    gap, bound = above["gap"], above["lower_bound"]
    said = "none" if bound is None else f"{100 * bound:+.1f}"
    more = "" if above["answered"] == 1 else f", and {1 - above['answered']:.1%} cannot be compared"
    return (
        f"the smallest gap is {100 * gap['accuracy']:+.1f} points at {gap['rate']:.3f} (95% lower bound: {said}); "
        f"it is above zero in {above['probability']:.1%} of bootstrap draws{more}."
    )


def _share_range(summary: Mapping[str, Any]) -> str:
    return f"{summary['accuracy']:.1%} ({summary['low']:.1%} to {summary['high']:.1%})"


def _range(estimate: Mapping[str, Any], form: str) -> str:
    """A value with its interval; a side without limit is open."""
    if estimate["value"] is None:
        return "-"
    low, high = (form.format(x) if x is not None else "?" for x in (estimate["low"], estimate["high"]))
    return f"{form.format(estimate['value'])} ({low} to {high})"
