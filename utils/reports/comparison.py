"""Methods side by side, from the folders of finished and evaluated runs: one table and one figure."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.core.files import read_json
from utils.core.tables import format_table, millions
from utils.options.catalog import method_title, title_of
from utils.reports.finished_runs import read_evaluation
from utils.reports.style import COLOURS, INK, LINES, MARKERS, MILLIONS, TOP1, dress, new_figure, plain
from utils.runs.result_files import RESULTS, reading_words, stem

FOOTPRINT = "footprint.json"   # what `utils.footprint` wrote of the training
# What is read of it and of results.json.
PEAKS = {"peak_rss_bytes": int, "peak_cuda_bytes": int}
TRAINED = {"config": {"seed": int}, "epochs": [{"seconds": float}],
           "versions": {"device": str, "threads": int, "torch": str}}
PALETTE = (*COLOURS, INK)
# Where the table reads the budgeted curves, as shares of the way from the cost of the first exit to that of the last.
READ_AT = (0.25, 0.5, 0.75)


class Row(NamedTuple):
    """A method, or another reading of its exits.

    Attributes:
        anytime, dynamic: the evaluation files.
        colour: number of its method, which settles its colour.
        line: number of the reading of its exits, 0 for the usual one, which settles the kind of line.
        train_s: seconds in training steps, with those of the run it started from; None for another reading.
        memory_bytes: peak of the training program, likewise; on a GPU that of PyTorch's tensors.
        on_gpu: whether it is.
        epochs, seed, versions: of the run.
    """

    anytime: dict[str, Any]
    dynamic: dict[str, Any]
    colour: int
    line: int
    train_s: float | None
    memory_bytes: int | None
    on_gpu: bool
    epochs: int
    seed: int
    versions: dict[str, Any]

    @property
    def label(self) -> str:
        return ", ".join([method_title(self.anytime["method"]), *reading_words(self.anytime)])

    @property
    def millions(self) -> list[float]:
        """Cost of every exit in 10^6 MACs."""
        return [macs / 1e6 for macs in self.anytime["macs"]]

    @property
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean 10^6 MACs on the test set, rising, and top-1."""
        points = sorted((point["test_mean_macs"] / 1e6, point["test_top1"]) for point in self.dynamic["points"])
        return tuple(np.asarray(points).T)


def read_row(run: Path, reading: Mapping[str, Any], *, after: Path | None = None, colour: int = 0, line: int = 0) -> Row:
    """The figures of a run's folder.

    Args:
        reading: of its exits, as evaluation files say it (`utils.runs.result_files.stem`); {} for the usual one.
        after: folder of the run that it started from.
        colour, line: see `Row`.
    Raises:
        UserError: when a file is damaged.
        FileNotFoundError: when it is missing.
    """
    anytime, dynamic = (read_evaluation(run / f"{stem(mode, reading)}.json") for mode in ("anytime", "dynamic"))
    trained, footprint = read_json(run / RESULTS, TRAINED), read_json(run / FOOTPRINT, PEAKS)
    train_s = memory = None
    if not reading:
        folders = [run, *([after] if after else [])]
        train_s = sum(epoch["seconds"] for folder in folders for epoch in read_json(folder / RESULTS, TRAINED)["epochs"])
        peaks = [read_json(folder / FOOTPRINT, PEAKS) for folder in folders]
        memory = max(peak["peak_cuda_bytes"] or peak["peak_rss_bytes"] for peak in peaks)
    return Row(anytime, dynamic, colour, line, train_s, memory, footprint["peak_cuda_bytes"] > 0, len(trained["epochs"]),
               trained["config"]["seed"], trained["versions"])


# The table

def text(rows: Sequence[Row]) -> str:
    """The table for the terminal."""
    columns, cells = _cells(rows)
    return format_table(columns, cells, title="\n".join(_heading(rows)))


def markdown(rows: Sequence[Row]) -> str:
    """The same table in Markdown."""
    columns, cells = _cells(rows)
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *cells]
    return "\n\n".join([*_heading(rows), "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)]) + "\n"


def _heading(rows: Sequence[Row]) -> list[str]:
    first, machine = rows[0], rows[0].versions
    threads = f"{machine['threads']} CPU thread{'s' if machine['threads'] > 1 else ''}"
    memory = "of the GPU that PyTorch's tensors took" if first.on_gpu else "resident"
    return [title(rows),
            f"Last epoch, {first.anytime['n_test']} test images, top-1 in percent. exit n (10^6 MACs): on all images.",
            "mean x: of the budgeted curve at x 10^6 MACs per image on average, interpolated between its points; "
            f"{first.anytime['n_valid']} held-out images.",
            f"train s: in training steps. peak MiB: {memory}, of the training program.",
            f"{machine['device']}, {threads}, torch {machine['torch']}"]


def title(rows: Sequence[Row]) -> str:
    """What the runs have in common."""
    first = rows[0]
    epochs = f"{first.epochs} epoch{'s' if first.epochs > 1 else ''}"
    return f"Methods at equal recipe: {first.anytime['arch']}, {title_of(first.anytime['dataset'])}, {epochs}, seed {first.seed}"


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    lowest, highest = max(row.millions[0] for row in rows), min(row.millions[-1] for row in rows)
    costs = [lowest + share * (highest - lowest) for share in READ_AT]
    same_macs = len({str(row.millions) for row in rows}) == 1
    exits = [f"exit {n + 1}" + (f" ({millions(macs)})" if same_macs else "") for n, macs in enumerate(rows[0].anytime["macs"])]
    columns = ["method", *exits, *(f"mean {cost:.2f}" for cost in costs), "train s", "peak MiB"]
    cells = []
    for row in rows:
        tops = [f"{top1:.2f}" + ("" if same_macs else f" ({x:.2f})") for top1, x in zip(row.anytime["top1"], row.millions)]
        budgeted = [f"{top1:.2f}" for top1 in np.interp(costs, *row.curve)]
        trained = ["", ""] if row.train_s is None else [f"{row.train_s:.1f}", f"{row.memory_bytes / 2**20:.0f}"]
        cells.append([row.label, *tops, *budgeted, *trained])
    return columns, cells


# The figure

def draw(rows: Sequence[Row]):
    """Accuracy of every exit, accuracy under an average budget, training time and peak memory, a panel each."""
    figure = new_figure(11, 8.2)
    figure.suptitle(plain(f"{title(rows)}, {rows[0].anytime['n_test']:,} test images"), fontsize=12, color=INK)
    trained = [row for row in rows if row.train_s is not None]
    (anytime, budgeted), (seconds, memory) = figure.subplots(2, 2, height_ratios=[3, 0.5 + 0.3 * len(trained)])
    for axes, name, x_label in ((anytime, "Anytime prediction: every exit", f"MACs to reach the exit ({MILLIONS})"),
                                (budgeted, "Budgeted batch prediction", f"mean MACs per test image ({MILLIONS})")):
        dress(axes, name, x_label, TOP1)
    for row in rows:
        look = {"color": PALETTE[row.colour % len(PALETTE)], "linestyle": LINES[row.line % len(LINES)], "linewidth": 1.6}
        filled = "none" if row.line else look["color"]
        anytime.plot(row.millions, row.anytime["top1"], marker=MARKERS[row.colour % len(MARKERS)], markersize=5,
                     markerfacecolor=filled, label=plain(row.label), **look)
        budgeted.plot(*row.curve, **look)
    figure.legend(*anytime.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    _bars(seconds, trained, [row.train_s for row in trained], "Training time", "seconds in training steps", "{:.0f}")
    _bars(memory, trained, [row.memory_bytes / 2**20 for row in trained], "Peak memory of training",
          "MiB on the GPU" if trained[0].on_gpu else "MiB resident", "{:.0f}")
    return figure


def _bars(axes, rows: Sequence[Row], values: Sequence[float], name: str, x_label: str, form: str) -> None:
    dress(axes, name, x_label)
    axes.grid(False, axis="y")
    bars = axes.barh([plain(row.label) for row in rows], values, color=[PALETTE[row.colour % len(PALETTE)] for row in rows],
                     height=0.65)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9, color=INK)
    axes.invert_yaxis()   # the first method on top, as in the table
    axes.margins(x=0.12)
