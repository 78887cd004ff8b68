"""Tables as aligned text and as Markdown."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """A table whose first column says what a row is.

    Attributes:
        title: a line above it.
        columns: their headings.
        rows: cells are shown with str(); short rows are filled up.
        notes: lines below it.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def _cells(self) -> list[list[str]]:
        return [[*map(str, row), *[""] * (len(self.columns) - len(row))] for row in self.rows]

    def text(self) -> str:
        """Aligned columns, the first one to the left."""
        width = max(len(str(row[0])) for row in [self.columns, *self.rows])
        cells = [[row[0].ljust(width), *row[1:]] for row in self._cells()]
        return "\n".join([format_table([self.columns[0].ljust(width), *self.columns[1:]], cells, self.title), *self.notes])

    def markdown(self) -> str:
        """The same for a README; lines of notes follow as a paragraph."""
        def line(cells: Sequence[str]) -> str:
            return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

        lines = [f"**{self.title}**", "", line(self.columns), line(["---", *["---:"] * (len(self.columns) - 1)]),
                 *map(line, self._cells())]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])


def format_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> str:
    """Right-aligned table with a rule under its heading; cells are converted with str()."""
    cells = [[str(c) for c in columns], *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(([title] if title else []) + lines)


def millions(macs: float) -> str:
    """MACs in units of 10^6, two decimals."""
    return f"{macs / 1e6:.2f}"
