"""How all figures of the project look, and how they are written. Matplotlib is loaded when the first one is drawn."""
from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from utils.core.errors import UserError
from utils.core.files import atomic_write

# Okabe and Ito's palette, distinguishable with every common form of colour blindness.
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
INK, PALE = "#333333", "#8A8A8A"
MILLIONS = "$10^6$"
TOP1 = "top-1 accuracy (%)"
LEGEND = {"loc": "best", "framealpha": 0.9, "edgecolor": "#CCCCCC"}


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, sizes in inches, that needs no display."""
    # Matplotlib refuses to start with the name of a backend that is not installed, such as a notebook's inherited from outside.
    # No backend is used here.
    backend = os.environ.pop("MPLBACKEND", None)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    if backend is not None:
        os.environ["MPLBACKEND"] = backend
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)   # its cache is nobody's concern here
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Any, title: str, x_label: str, y_label: str = "") -> None:
    """Title, axis labels, a pale grid behind the curves, and no frame on top and right."""
    axes.set_title(title, fontsize=11, color=INK)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(True, color="#E3E3E3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def plain(text: str) -> str:
    """Text from outside as matplotlib shows it unchanged: a dollar begins no formula, bytes that are no text become "?"."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def png_file(output: str | Path) -> Path:
    """The path given to --output.

    Raises:
        UserError: when it does not end in .png.
    """
    output = Path(output)
    if output.suffix != ".png":
        raise UserError(f"--output {output}: the figure is a PNG file; give it a name that ends in .png")
    return output


def save(figure: Any, stem: Path, *, svg: bool = False) -> list[Path]:
    """Write a figure as `stem`.png, and .svg on request; returns the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".png"), *([stem.with_suffix(".svg")] if svg else [])]
    for path in paths:
        with atomic_write(path) as file:
            figure.savefig(file, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
