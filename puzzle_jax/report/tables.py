"""A table that is shown in the terminal (rich) and written as markdown, with the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Section:
    """A table with a title ("" for none) and sentences below it; a row's first cell is its name.

    The terminal shows the column `emphasised` bold.
    """

    title: str
    heading: list[str]
    rows: list[list[str]]
    remarks: tuple[str, ...] = ()
    emphasised: str | None = None

    def table(self) -> Table:
        """The table for the terminal."""
        caption = " ".join(self.remarks) or None
        table = Table(title=self.title or None, title_justify="left", caption=caption, caption_justify="left")
        for position, name in enumerate(self.heading):
            style = "bold" if name == self.emphasised else None
            table.add_column(name, justify="right" if position else "left", style=style, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table for a file, with an empty line between paragraphs."""
        rows = [_row(self.heading), f"|---|{'---:|' * (len(self.heading) - 1)}", *map(_row, self.rows)]
        return "\n\n".join([*([f"## {self.title}"] if self.title else []), "\n".join(rows), *self.remarks])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.strip().replace('|', '&#124;') for cell in cells)} |"
