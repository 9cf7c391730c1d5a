"""An evaluation on one screen: every model's answers, its differences from the reference, speeds, and the frontier.

The same tables are printed in the terminal (rich) and written as markdown, from the content of evaluation.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console

from puzzle_jax.files import Json
from puzzle_jax.report.comparison import ComparisonTable
from puzzle_jax.report.html import render
from puzzle_jax.report.tables import Section


@dataclass(frozen=True)
class EvaluationReport:
    """The tables and verdicts of the content of an evaluation.json."""

    evaluation: Mapping[str, Json]

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
        """Sentences that say, for every model but the reference, whether its curve lies above the reference's."""
        compared = self.evaluation["comparisons"].items() if self.evaluation["points"] else ()
        return [sentence for name, comparison in compared for sentence in self._verdict(name, comparison)]

    def show(self, console: Console) -> None:
        """Prints the tables and the verdicts."""
        for section in self.sections():
            console.print(section.table())
        for sentence in self.verdicts():
            console.print(sentence, highlight=False)

    def html(self, images: Mapping[str, bytes]) -> str:
        """A page that opens offline, with embedded images: one table of all models, then everything else."""
        table = ComparisonTable(self.evaluation)
        verdicts = [table.verdict(name) for name in self.evaluation["comparisons"]]
        return render(
            "evaluation", verdicts=verdicts, table_of_all=table.section(), sections=list(self.sections()), images=images
        )

    def markdown(self) -> str:
        """The tables and verdicts as text for a file."""
        parts = ["# Evaluation", *(section.markdown() for section in self.sections()), *self.verdicts()]
        if self.evaluation["points"]:
            parts.append("![accuracy against request rate](frontier.png)")
        return "\n\n".join(parts) + "\n"

    # Tables ---------------------------------------------------------------------------------------------------------

    def _answers(self) -> Section:
        rows: list[list[str]] = []
        for name, efforts in self.evaluation["summaries"].items():
            for effort, summary in efforts.items():
                everything = summary["all"]
                accuracies = [f"{task['accuracy']:.1%}" for task in summary["tasks"].values()]
                quantiles = " / ".join(f"{value:.0f}" for value in everything["token_quantiles"].values())
                tokens = [f"{everything['mean_tokens']:.1f}", quantiles, f"{everything['truncated']:.1%}"]
                accuracy = _range({**everything, "value": everything["accuracy"]}, "{:.1%}")
                rows.append([f"{name}, {effort}", accuracy, *accuracies, *tokens])
            rows.append(_overall(name, self.evaluation["overall"][name], "{:.1%}", rows))
        first = next(iter(next(iter(self.evaluation["summaries"].values())).values()))
        asked = first["all"]["answers"]
        quantiles = " / ".join(f"{q}%" for q in first["all"]["token_quantiles"])
        remarks = [f"{asked} problems per effort and model; intervals of 95%; {quantiles} are quantiles of tokens."]
        for name, efforts in self.evaluation["summaries"].items():
            if count := sum(summary["all"].get("unscored", 0) for summary in efforts.values()):
                remarks.append(f"{count} answers of {name} could not be scored and count as wrong.")
        heading = ["", "accuracy", *first["tasks"], "mean tokens", quantiles, "truncated"]
        return Section("Answers", heading, rows, tuple(remarks))

    def _differences(self) -> Section:
        rows: list[list[str]] = []
        for name, comparison in self.evaluation["comparisons"].items():
            for effort, entry in comparison["efforts"].items():
                everything = entry["all"]
                difference = _range({**everything, "value": everything["difference"]}, "{:+.1%}")
                test = [f"{everything['won']} / {everything['lost']}", f"{everything['p_value']:.2g}"]
                by_task = [f"{task['difference']:+.1%}" for task in entry["tasks"].values()]
                ratios = _range(entry["retention"], "{:.1%}"), _range(entry["relative_tokens"], "{:.3f}")
                ends = entry.get("ended") or {"difference": None}  # an evaluation from before it was compared
                ended = _range({**ends, "value": ends["difference"]}, "{:+.1%}")
                rows.append([f"{name}, {effort}", difference, *test, *by_task, *ratios, ended])
            rows.append(_overall(name, comparison["overall"], "{:+.1%}", rows))
        tasks = next(iter(next(iter(self.evaluation["comparisons"].values()))["efforts"].values()))["tasks"]
        title = f"Compared with {self.evaluation['reference']} on the same problems"
        remark = (
            f"Paired bootstrap over problems, {self.evaluation['settings']['bootstrap']} draws; "
            "won / lost: problems that only one of the two solves, p: McNemar's exact test."
        )
        heading = ["", "accuracy", "won / lost", "p", *tasks, "retention", "tokens", "ended by itself"]
        return Section(title, heading, rows, (remark,))

    def _speeds(self) -> Section:
        throughput = self.evaluation["throughput"]
        rows = []
        for workload, models in throughput["workloads"].items():
            lengths = throughput["scenarios"].get(workload)
            what = f"{workload} ({lengths[0]} in, {lengths[1]} out)" if lengths else f"{workload} effort"
            for name, entry in models.items():
                speeds = _quartiles(entry["tokens_per_second"], "{:,.0f}"), _quartiles(entry["relative"], "{:.2f}")
                rows.append([f"{what}, {name}", str(entry["batch"]), *speeds])
        remark = (
            f"Medians and quartiles over rounds on {throughput['device']}; batches are the largest that "
            f"{throughput['cache_memory']:,} bytes of cache hold; an effort has each model's own lengths."
        )
        heading = ["", "batch", "tokens/s", f"over {self.evaluation['reference']}"]
        return Section("Generated tokens per second", heading, rows, (remark,))

    def _frontier(self) -> Section:
        points, reference = self.evaluation["points"], self.evaluation["reference"]
        highest = list(points[reference])[-1]
        rows = []
        for name, efforts in points.items():
            for effort, point in efforts.items():
                compared = self.evaluation["comparisons"].get(name)
                relative = compared and compared["efforts"][effort]["relative_request_rate"]
                measured = [_range(point["rate"], "{:.3f}"), _range(point["accuracy"], "{:.1%}")]
                rows.append([f"{name}, {effort}", *measured, _range(relative, "{:.3f}") if relative else ""])
        heading = ["", f"rate ({reference}, {highest} = 1)", "accuracy", f"rate over {reference}'s at the effort"]
        remark = "Request rate: tokens per second over mean generated tokens."
        return Section("Accuracy and request rate", heading, rows, (remark,))

    def _verdict(self, name: str, comparison: Mapping[str, Json]) -> Iterator[str]:
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


def _overall(name: str, estimate: Mapping[str, Json], form: str, rows: list[list[str]]) -> list[str]:
    """The row for all efforts together, which follows those of each effort."""
    return [f"{name}, all", _range(estimate, form), *[""] * (len(rows[-1]) - 2)]


def _position(above: Mapping[str, Json]) -> str:
    return "everywhere above" if above["gap"]["accuracy"] > 0 else "not everywhere above"


def _certainty(above: Mapping[str, Json]) -> str:
    gap, bound = above["gap"], above["lower_bound"]
    lower = "none" if bound is None else f"{100 * bound:+.1f}"
    more = "" if above["answered"] == 1 else f", and {1 - above['answered']:.1%} cannot be compared"
    return (
        f"the smallest gap is {100 * gap['accuracy']:+.1f} points at {gap['rate']:.3f} (95% lower bound: {lower}); "
        f"it is above zero in {above['probability']:.1%} of bootstrap draws{more}."
    )


def _quartiles(values: Mapping[str, float], form: str) -> str:
    return _range({**values, "value": values["median"]}, form)


def _range(estimate: Mapping[str, Json], form: str) -> str:
    """A value with its interval; an end without a limit is shown as "?"."""
    if estimate["value"] is None:
        return "-"
    low, high = (form.format(x) if x is not None else "?" for x in (estimate["low"], estimate["high"]))
    return f"{form.format(estimate['value'])} ({low} to {high})"
