"""`puzzle evaluate`: an evaluation, then its table, report and frontier."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from puzzle_jax.consoles import plain_console
from puzzle_jax.evaluate.run import Evaluation
from puzzle_jax.evaluate.settings import Settings
from puzzle_jax.files import write_beside
from puzzle_jax.report.evaluation import EvaluationReport
from puzzle_jax.report.figures import frontier_figure

_TABLE_WIDTH = 150  # about what the tables need


def run(settings: Settings) -> None:
    """Evaluates; answers are saved as they come, so that after an interrupt the same command continues from them."""
    console = plain_console(width=_TABLE_WIDTH)
    evaluate(settings, console).show(console)
    where = Text.assemble("Everything is in ", (str(settings.out), "bold"))
    console.print(where, highlight=False, soft_wrap=True)


def evaluate(settings: Settings, console: Console) -> EvaluationReport:
    """Evaluates, and writes everything to `settings.out`."""
    evaluation = Evaluation(settings, console).run()
    report = EvaluationReport(evaluation)
    write_beside(settings.out / "report.md", report.markdown().encode())
    images = {}
    if evaluation["points"]:
        images["frontier.png"] = frontier_figure(evaluation["points"], evaluation["reference"])
        write_beside(settings.out / "frontier.png", images["frontier.png"])
    write_beside(settings.out / "report.html", report.html(images).encode())
    return report
