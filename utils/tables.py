"""Aligned text tables."""
from __future__ import annotations

from collections.abc import Sequence


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
