"""Training methods side by side, from the runs of msdnet_scripts/compare_methods.sh: a table and a figure.

    python -m utils.methods_table results/compare_methods        # methods.md and methods.png in that folder
    python -m utils.methods_table published/cifar100_methods --output figures/cifar100_methods_small.png

The runs differ in their method alone and are judged after their last epoch, each in both prediction modes; evaluations
with --ensemble get rows of their own. Runs of a method that differ in their seed are shown as their mean. What a run is, its
results.json says, whatever its folder is called.
"""
from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.core.errors import UserError, user_errors
from utils.core.files import atomic_write, read_json
from utils.core.tables import Table
from utils.options.catalog import METHODS, method_title, title_of
from utils.options.parser import OneLineParser
from utils.reports.finished_runs import FinishedRun, differences, read_evaluation, read_runs, require_folder, seeds_together
from utils.reports.style import COLOURS, INK, LINES, MARKERS, MILLIONS, TOP1, dress, new_figure, plain, png_file, save
from utils.runs.result_files import ENSEMBLES, RESULTS, reading_words, result_name

# What may differ: the method, its own flags, and the network that it starts from.
FLAGS = frozenset({"method", "checkpoint", "ensemble_reweight"}).union(*(method.flags for method in METHODS.values()))
# What is read of results.json besides the run itself.
COSTS = {"epochs": [{"seconds": float}], "versions": {"device": str, "threads": int, "torch": str},
         "peak_rss_bytes": (int, None), "peak_cuda_bytes": (int, None)}
OLDER_COSTS = {"peak_rss_bytes": None, "peak_cuda_bytes": None}
PALETTE = (*COLOURS, INK)
# Where the table reads the budgeted curves, as shares of the way from the cost of the first exit to that of the last.
READ_AT = (0.25, 0.5, 0.75)


class Row(NamedTuple):
    """A method, or the same network with its exits read as another ensemble; the mean over the seeds.

    Attributes:
        anytime, dynamic: contents of the evaluation files of every seed.
        line: number of the ensemble among those of the method, 0 for the usual one.
        train_s: seconds in training steps; None for another ensemble, and where they are not known.
        memory_bytes: largest memory of the training program, likewise; on a GPU that of PyTorch's tensors.
    """

    anytime: list[dict[str, Any]]
    dynamic: list[dict[str, Any]]
    line: int
    train_s: float | None
    memory_bytes: int | None

    @property
    def label(self) -> str:
        seeds = f" (n = {len(self.anytime)})" if len(self.anytime) > 1 else ""
        return ", ".join([method_title(self.anytime[0]["method"]), *reading_words(self.anytime[0])]) + seeds

    @property
    def number(self) -> int:
        """Of the method, which settles colour and marker."""
        return list(METHODS).index(self.anytime[0]["method"])

    @property
    def millions(self) -> list[float]:
        """Cost of every exit in 10^6 MACs."""
        return [macs / 1e6 for macs in self.anytime[0]["macs"]]

    @property
    def top1(self) -> list[float]:
        """Of every exit."""
        return [statistics.fmean(of_seeds) for of_seeds in zip(*(content["top1"] for content in self.anytime))]

    @property
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean 10^6 MACs on the test set, rising, and top-1; for several seeds where all their curves have been."""
        curves = [np.array(sorted((point["test_mean_macs"] / 1e6, point["test_top1"]) for point in content["points"])).T
                  for content in self.dynamic]
        costs = curves[0][0]
        costs = costs[(costs >= max(curve[0][0] for curve in curves)) & (costs <= min(curve[0][-1] for curve in curves))]
        return costs, np.mean([np.interp(costs, *curve) for curve in curves], axis=0)


class Comparison(NamedTuple):
    """All that is shown.

    Attributes:
        rows: those of a method together.
        title: what the runs have in common.
        machines: on which they were trained.
        memory: what memory was measured.
        notes: folders that were left out, and why.
    """

    rows: list[Row]
    title: str
    machines: str
    memory: str
    notes: list[str]


def read_comparison(folder: Path) -> Comparison:
    """The finished runs in the folders in `folder`.

    Raises:
        UserError: when there are none, they differ in more than their method and seed, methods have no seed in common, or one is
            not evaluated as the others are.
    """
    require_folder(folder)
    runs, notes = read_runs(sorted(path.parent for path in folder.glob(f"*/{RESULTS}")))
    if not runs:
        raise UserError(f"{folder} holds no finished run" + "".join(f"; {line}" for line in notes))
    runs.sort(key=lambda run: (METHODS[run.method].second_stage, list(METHODS).index(run.method), run.seed))
    first, rows, groups = runs[0], [], seeds_together(runs)
    # With milestones, --lr_step is of the weight network's rate alone, which some methods have.
    own = FLAGS | ({"lr_step"} if first.settings["lr_type"] == "multistep" else set())
    for i, group in enumerate(groups):
        run = group[0]
        if other := differences(first, run, own):
            raise UserError(f"{first.folder} and {run.folder} differ in {other[0]}; here runs may differ in their "
                            "method and seed alone")
        if not {run.seed for run in groups[0]} & {run.seed for run in group}:
            raise UserError(f"{first.folder} and {run.folder} differ in seed; methods need a seed in common")
        if i and groups[i - 1][0].method == run.method:
            raise UserError(f"{groups[i - 1][0].folder} and {run.folder} are of the same method; keep one of them in "
                            f"{folder}")
        of_seeds = []
        for run in group:
            stages = _stages(run, runs)
            if not stages:
                notes.append(f"{run.folder} started from {run.settings['checkpoint']}, which is not among these runs: what "
                             "its training cost is not known.")
            of_seeds.append(list(_rows(run, [read_json(stage.folder / RESULTS, COSTS, OLDER_COSTS) for stage in stages])))
        rows += _mean(of_seeds, group)
    costs = [read_json(run.folder / RESULTS, COSTS, OLDER_COSTS) for run in runs]
    machines = dict.fromkeys("{device}, {threads} CPU thread{s}, torch {torch}".format(
        **cost["versions"], s="s" if cost["versions"]["threads"] > 1 else "") for cost in costs)
    memory = dict.fromkeys("on the GPU" if cost["peak_cuda_bytes"] else "resident" for cost in costs)
    epochs = len(costs[0]["epochs"])
    seeds = {run.seed for run in runs}
    title = (f"Methods at equal recipe: {first.settings['arch']}, {title_of(first.dataset)}, {epochs} "
             f"epoch{'s' if epochs > 1 else ''}, {f'seed {first.seed}' if len(seeds) == 1 else 'mean over n seeds'}")
    return Comparison(rows, title, "; ".join(machines), " or ".join(memory), notes)


def _stages(run: FinishedRun, runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The run, and the one whose network it started from; [] where that is not among `runs`."""
    if run.settings["checkpoint"] is None:
        return [run]
    start = Path(run.settings["checkpoint"]).parent.name
    return next(([run, other] for other in runs if other is not run and other.folder.name == start), [])


def _rows(run: FinishedRun, costs: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """The rows of a run.

    Args:
        costs: of its stages.
    """
    found = [(path, read_evaluation(path)) for path in run.folder.glob("anytime*.json")]
    found = [(path, content) for path, content in found if path.stem == result_name("anytime", content)]   # no --save_suffix
    order = [None, *ENSEMBLES]
    if not any(content["ensemble"] is None for _, content in found):
        raise UserError(f"{run.folder / 'anytime.json'} is missing; evaluate the last epoch with eval_cifar100.py")
    found.sort(key=lambda pair: (order.index(pair[1]["ensemble"]), pair[0]))
    for line, (path, anytime) in enumerate(found):
        other = run.folder / f"{result_name('dynamic', anytime)}.json"
        dynamic = read_evaluation(other)
        for file, content in ((path, anytime), (other, dynamic)):
            if content["epoch"] != run.settings["tested epoch"]:
                raise UserError(f"{file} is of epoch {content['epoch']} and not of the last one; evaluate "
                                "model_latest.pth again")
        if dynamic["family"] != "eq9" or dynamic["flat"] or len(dynamic["points"]) < 2:
            raise UserError(f"{other} is not a whole curve of budgets; evaluate with --evalmode dynamic alone again")
        peaks = [cost["peak_cuda_bytes"] or cost["peak_rss_bytes"] for cost in costs]
        known = line == 0 and costs
        train_s = sum(epoch["seconds"] for cost in costs for epoch in cost["epochs"])
        yield Row([anytime], [dynamic], line, train_s if known else None,
                  max(peaks) if known and None not in peaks else None)


def _mean(of_seeds: Sequence[Sequence[Row]], runs: Sequence[FinishedRun]) -> Iterator[Row]:
    """A row for each ensemble from the rows that every seed has.

    Raises:
        UserError: when one seed was read as an ensemble that another was not.
    """
    for run, rows in zip(runs, of_seeds):
        if [row.label for row in rows] != [row.label for row in of_seeds[0]]:
            raise UserError(f"{runs[0].folder} and {run.folder} were not evaluated with the same --ensemble")
    for rows in zip(*of_seeds):
        seconds, peaks = [row.train_s for row in rows], [row.memory_bytes for row in rows]
        yield Row([row.anytime[0] for row in rows], [row.dynamic[0] for row in rows], rows[0].line,
                  None if None in seconds else statistics.fmean(seconds), None if None in peaks else max(peaks))


def table(found: Comparison) -> Table:
    """Top-1 of every exit and at some budgets, and what training cost."""
    rows = found.rows
    lowest, highest = max(row.millions[0] for row in rows), min(row.millions[-1] for row in rows)
    costs = [lowest + share * (highest - lowest) for share in READ_AT]
    same_macs = len({str(row.millions) for row in rows}) == 1
    exits = [f"exit {n}" + (f" ({macs:.2f})" if same_macs else "") for n, macs in enumerate(rows[0].millions, 1)]
    result = Table(found.title, ["method", *exits, *(f"mean {cost:.2f}" for cost in costs), "train s", "peak MiB"])
    for row in rows:
        every_exit = [f"{top1:.2f}" + ("" if same_macs else f" ({macs:.2f})")
                      for top1, macs in zip(row.top1, row.millions)]
        at_costs = np.interp(costs, *row.curve, left=np.nan, right=np.nan)   # a curve says nothing beyond its ends
        result.rows.append([row.label, *every_exit, *("" if np.isnan(top1) else f"{top1:.2f}" for top1 in at_costs),
                            "" if row.train_s is None else f"{row.train_s:.1f}",
                            "" if row.memory_bytes is None else f"{row.memory_bytes / 2**20:.0f}"])
    result.notes = [
        f"Last epoch, {rows[0].anytime[0]['n_test']} test images, top-1 in percent. exit n (10^6 MACs): on all images.",
        "mean x: of the budgeted curve at x 10^6 MACs per image on average, interpolated between its points; "
        f"{rows[0].dynamic[0].get('n_valid')} held-out images.",
        "train s: in training steps, with those of the run it started from. "
        f"peak MiB: {found.memory}, of the training program.",
        f"{found.machines}.", *found.notes]
    return result


def draw(found: Comparison):
    """Accuracy of every exit, accuracy under an average budget, training time and peak memory, a panel each."""
    rows = found.rows
    figure = new_figure(11, 8.2)
    figure.suptitle(plain(f"{found.title}, {rows[0].anytime[0]['n_test']:,} test images"), fontsize=12, color=INK)
    n_methods = sum(not row.line for row in rows)
    (anytime, budgeted), (seconds, memory) = figure.subplots(2, 2, height_ratios=[3, 0.5 + 0.3 * n_methods])
    for axes, name, x_label in ((anytime, "Anytime prediction: every exit", f"MACs to reach the exit ({MILLIONS})"),
                                (budgeted, "Budgeted batch prediction", f"mean MACs per test image ({MILLIONS})")):
        dress(axes, name, x_label, TOP1)
    for row in rows:
        look = {"color": _colour(row), "linestyle": LINES[row.line % len(LINES)], "linewidth": 1.6}
        anytime.plot(row.millions, row.top1, marker=MARKERS[row.number % len(MARKERS)], markersize=5,
                     markerfacecolor="none" if row.line else look["color"], label=plain(row.label), **look)
        budgeted.plot(*row.curve, **look)
    figure.legend(*anytime.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    _bars(seconds, [(row, row.train_s) for row in rows], "Training time", "seconds in training steps")
    _bars(memory, [(row, row.memory_bytes and row.memory_bytes / 2**20) for row in rows], "Peak memory of training",
          f"MiB {found.memory}")
    return figure


def _colour(row: Row) -> str:
    return PALETTE[row.number % len(PALETTE)]


def _bars(axes: Any, values: Sequence[tuple[Row, float | None]], name: str, x_label: str) -> None:
    dress(axes, name, x_label)
    axes.grid(False, axis="y")
    known = [(row, value) for row, value in values if value is not None]
    bars = axes.barh([plain(row.label) for row, _ in known], [value for _, value in known],
                     color=[_colour(row) for row, _ in known], height=0.65)
    axes.bar_label(bars, [f"{value:.0f}" for _, value in known], padding=3, fontsize=9, color=INK)
    axes.invert_yaxis()   # the first method on top, as in the table
    axes.margins(x=0.12)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("python -m utils.methods_table", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="folder that holds the run folders")
    parser.add_argument("--output", metavar="FILE", help="the .png file, with a .md beside it; default: methods.png in DIR")
    parser.add_argument("--svg", action="store_true", help="write the figure as .svg too")
    args = parser.parse_args(argv)
    with user_errors():
        folder = Path(args.folder)
        output = png_file(args.output or folder / "methods.png")
        found = read_comparison(folder)
        result = table(found)
        files = [*save(draw(found), output.with_suffix(""), svg=args.svg), output.with_suffix(".md")]
        with atomic_write(files[-1]) as file:
            file.write(f"{result.markdown()}\n".encode())
        print(result.text(), "", *files, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
