"""Draw accuracy against cost from the evaluation files of finished runs.

    python -m utils.plots runs/boost runs/joint              # anytime.png and budgeted.png in runs/boost
    python -m utils.plots runs/k4 runs/k8 runs/k12 --output figures --svg

Reads every anytime*.json and dynamic*.json that eval_cifar100.py or eval_imagenet.py left in the folders. Sizes of one
model (same architecture and method, other flags) become one budgeted curve: at each budget the size with the best
hold-out accuracy. Training leaves an anytime.json of its last epoch; where the folder has an anytime file with a suffix
(--save_suffix), those with a suffix are drawn and anytime.json is not. Other ensembles and policies are curves of their own.
Where evaluation with --calibrate has left a file, or with --reliability, reliability.png shows accuracy against confidence at
every exit. --ideal adds to each budgeted curve what a perfect score would reach.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import MappingProxyType

from adaptive_inference import combine_sizes
from utils.core.errors import UserError, user_errors
from utils.options.catalog import arch_title, method_title, title_of
from utils.options.parser import OneLineParser
from utils.reports.finished_runs import kinds_of_epoch, read_evaluations, read_reliability
from utils.reports.paper import ANYTIME, BACKBONES, BUDGETED, Published
from utils.reports.style import COLOURS, INK, LEGEND, LINES, MARKERS, MILLIONS, PALE, TOP1, dress, new_figure, plain, save
from utils.runs.result_files import FAMILIES, reading_words


def plot_runs(folders: Sequence[str | Path], output: str | Path | None = None, *, paper: str = "auto",
              separate: bool = False, svg: bool = False, reliability: bool = False, ideal: bool = False) -> list[Path]:
    """Draw anytime.png, budgeted.png and reliability.png, as far as the folders have results of that kind.

    Args:
        folders: of runs, with evaluation files.
        output: folder for the figures, made if absent; default: the first run's.
        paper: compare with the paper's numbers for "msdnet" or "ranet", for the runs' own networks ("auto") or not at
            all ("none"); within the costs that the runs cover.
        separate: draw the sizes of one model as curves of their own.
        svg: write .svg files too.
        reliability: draw reliability.png also where no exit was calibrated.
        ideal: add to each budgeted curve what leaving at the first exit that is right would reach.
    Returns:
        The files written.
    Raises:
        UserError: nothing to draw, or results that do not belong into one figure.
    """
    found = [(Path(folder), result) for folder in folders for result in read_evaluations(Path(folder))]
    results = [result for _, result in found]
    judged = sorted({f"{result['dataset']}, {result['n_test']:,} images" for result in results})
    if len(judged) > 1:
        raise UserError(f"these runs are of different test sets ({'; '.join(judged)}); draw one figure for each")
    anytime = group_sizes([result for result in results if "points" not in result], separate)
    budgeted = group_sizes([result for result in results if "points" in result], separate)
    curves = [budgeted_curve(group) for group in budgeted]  # refuses different splits before anything is written
    ideals = {id(result): ideal_of(folder, result) for folder, result in found if ideal and "points" in result}
    if ideal and not budgeted:
        raise UserError(f"--ideal adds to budgeted curves, and {folders[0]} has no dynamic*.json; evaluate with --evalmode "
                        "dynamic")
    diagrams = [diagram for folder in folders for diagram in read_reliability(Path(folder))]
    figures = {}
    if anytime:
        figures["anytime"] = draw_anytime(anytime, published(ANYTIME, results, paper))
    if budgeted:
        # The paper's budgeted numbers come from the released sweep and compare with nothing else.
        comparable = [group[0] for group in budgeted if group[0]["family"] == "released"]
        figures["budgeted"] = draw_budgeted(budgeted, curves, published(BUDGETED, comparable, paper), ideals)
    if reliability and not diagrams:
        raise UserError(f"{folders[0]} has no reliability*.json; anytime evaluation writes one")
    if reliability or any(diagram["calibration"] for diagram in diagrams):
        figures["reliability"] = draw_reliability(diagrams)
    return [path for name, figure in figures.items()
            for path in save(figure, Path(output or folders[0]) / name, svg=svg)]


def group_sizes(results: Sequence[dict], separate: bool) -> list[list[dict]]:
    """Results that share one colour: the sizes of a model together, everything else alone."""
    models: dict[tuple, list[dict]] = {}
    for result in results:
        model = tuple(result.get(key) for key in ("arch", "method", "suffix", "family", "flat", "epoch_kind"))
        models.setdefault(model, []).append(result)
    groups = []
    for members in models.values():
        configs = {json.dumps(member["config"], sort_keys=True) for member in members}
        # Two runs of one configuration, such as two seeds, are no sizes.
        groups += [[member] for member in members] if separate or len(configs) < len(members) else [members]
    return groups


def budgeted_curve(group: Sequence[dict]) -> list[dict]:
    """Points of a group of `group_sizes` as one curve."""
    if len(group) == 1:
        return group[0]["points"]
    try:
        return combine_sizes(group)
    except UserError as error:
        raise UserError(f"{error}; or pass --separate to draw one curve for each") from None


# The two figures

def draw_anytime(groups: Sequence[Sequence[dict]], papers: Sequence[tuple[str, Published]]):
    """Staircase of the accuracy that is available once a given cost is spent."""
    results = [result for group in groups for result in group]
    axes = new_axes("Anytime prediction", results[0], f"MACs spent on the image ({MILLIONS})")
    right = 1.04 * max(result["macs"][-1] for result in results) / 1e6
    names, markers = iter(labels(results)), cycle(MARKERS)
    for colour, group in zip(cycle(COLOURS), groups):
        for line, result in zip(cycle(LINES), group):
            millions = [macs / 1e6 for macs in result["macs"]]
            # The last exit's accuracy stays available at any higher cost.
            axes.step([*millions, right], [*result["top1"], result["top1"][-1]], where="post", label=next(names),
                      color=colour, linestyle=line, linewidth=1.6,
                      marker=next(markers), markersize=5, markevery=list(range(len(millions))))
    finish(axes, papers, right)
    return axes.figure


def draw_budgeted(groups: Sequence[Sequence[dict]], curves: Sequence[list[dict]],
                  papers: Sequence[tuple[str, Published]], ideals: Mapping[int, Mapping[str, float]] = MappingProxyType({})):
    """Test accuracy against the mean cost on the test set; sizes behind a combined curve stay visible as thin lines.

    Args:
        ideals: points of a perfect score, by the id of the result.
    """
    families = {group[0]["family"] for group in groups}
    subtitle = FAMILIES[families.pop()].subtitle if len(families) == 1 else ""
    axes = new_axes("Budgeted batch prediction", groups[0][0], f"mean MACs per test image ({MILLIONS})", subtitle)
    stars: list[tuple[float, float]] = []
    right = 1.04 * max(point["test_mean_macs"] for curve in curves for point in curve) / 1e6
    names = labels([group[0] for group in groups], [len(group) for group in groups], name_family=not subtitle)
    for colour, marker, name, group, curve in zip(cycle(COLOURS), cycle(MARKERS), names, groups, curves):
        for result in group if len(group) > 1 else []:
            axes.plot(*positions(result["points"]), color=colour, linewidth=0.9, alpha=0.45)
        axes.plot(*positions(curve), color=colour, linewidth=1.8, marker=marker, markersize=4, label=name)
        for point in (ideals[id(result)] for result in group if id(result) in ideals):
            position = point["mean_macs"] / 1e6, point["top1"]
            if position not in stars:   # two curves of one network have the same
                stars.append(position)
                axes.plot(*position, linestyle="none", marker="*", markersize=11, color=colour, markeredgecolor=INK,
                          label=f"ideal score, {name}" if len(group) == 1 else None)
    finish(axes, papers, right)
    return axes.figure


def draw_reliability(results: Sequence[dict]):
    """Accuracy against mean confidence in bins of equally many test images, one panel per exit; dashed with temperatures."""
    n_exits, about = max(len(result["bins"]) for result in results), results[0]
    columns = min(n_exits, 5)
    n_rows = -(-n_exits // columns)
    figure = new_figure(2 + 2 * columns, 1.2 + 2.1 * n_rows)
    figure.suptitle(f"Reliability of the confidence: {plain(title_of(about['dataset']))}, {about['n_test']:,} test images",
                    fontsize=11, color=INK)
    panels = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False)
    weights = [result["weights_hash"] or result["name"] for result in results]   # one colour with and without temperatures
    runs, names = list(dict.fromkeys(weights)), labels(results)
    for n, axes in enumerate(panels.flat):
        if n >= n_exits:
            axes.set_axis_off()
            continue
        dress(axes, f"exit {n + 1}", "confidence" if n >= n_exits - columns else "", "accuracy" if n % columns == 0 else "")
        axes.plot([0, 1], [0, 1], color=PALE, linewidth=0.8)
        errors: dict[int, list[str]] = {}
        for result, name, run in zip(results, names, map(runs.index, weights)):
            if n < len(result["bins"]):
                bins, calibrated = result["bins"][n], result["calibration"] is not None
                axes.plot(bins["confidence"], bins["accuracy"], color=COLOURS[run % len(COLOURS)], linewidth=1.4, markersize=3,
                          linestyle="--" if calibrated else "-", marker=MARKERS[run % len(MARKERS)],
                          markerfacecolor="none" if calibrated else None, label=name)
                errors.setdefault(run, []).append(f"{100 * result['ece'][n]:.1f}")
        for line, (run, values) in enumerate(errors.items()):
            axes.text(0.03, 0.97 - 0.09 * line, f"ECE {', '.join(values)} %", transform=axes.transAxes, va="top", fontsize=7.5,
                      color=COLOURS[run % len(COLOURS)])
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return figure


def ideal_of(folder: Path, result: dict) -> dict:
    """What leaving at the first exit that is right, or at the first where none is, would reach with a curve's weights.

    Raises:
        UserError: where no file tells.
    """
    for found in read_reliability(folder):
        same = ("weights_hash", "ensemble", "temperatures")
        if found["weights_hash"] and all(found[name] == result[name] for name in same):
            return found["ideal"]
    path = folder / "arrays_dynamic.npz"
    if path.is_file():
        from utils.evaluation.published import load_arrays  # here, because it loads torch
        from utils.evaluation.reliability import ideal_score
        about, parts = load_arrays(path)
        if about.get("weights_hash") == result["weights_hash"] and about.get("epoch") == result["epoch"] and "test" in parts:
            return ideal_score(parts["test"].correct, result["macs"])
    raise UserError(f"--ideal: {folder} says nothing of single test images for the weights of {result['name']}; evaluate the "
                    "same checkpoint with --evalmode anytime")


def positions(points: Sequence[dict]) -> tuple[list[float], list[float]]:
    """Test cost in 10^6 MACs and test accuracy."""
    return [point["test_mean_macs"] / 1e6 for point in points], [point["test_top1"] for point in points]


def labels(results: Sequence[dict], sizes: Sequence[int] | None = None, name_family: bool = False) -> list[str]:
    """What the legend calls each result: method and network, and more where that is not enough to tell them apart."""
    found = []
    for result, size, kind in zip(results, sizes or [1] * len(results), kinds_of_epoch(results), strict=True):
        words = [f"{method_title(result['method'])}, {arch_title(result['arch'])}", *reading_words(result), kind]
        words += [f"{size} sizes combined"] if size > 1 else []
        words += [FAMILIES[result["family"]].short] if name_family else []
        words += ["flat curve"] if result.get("flat") else []
        found.append(", ".join(filter(None, words)))
    return [plain(f"{label} ({result['name']})" if found.count(label) > 1 else label)
            for label, result in zip(found, results, strict=True)]


def published(table: dict, results: Sequence[dict], paper: str) -> list[tuple[str, Published]]:
    """(backbone, numbers) of the paper that the results can be compared with."""
    if paper == "none" or not results:
        return []
    dataset = results[0]["dataset"]
    if paper != "auto" and (dataset, paper) not in table:
        raise UserError(f"the paper has no numbers for {paper} on {title_of(dataset)}; leave --paper out")
    backbones = dict.fromkeys(result["arch"].removesuffix("_ge") for result in results) if paper == "auto" else [paper]
    return [(backbone, table[dataset, backbone]) for backbone in backbones if (dataset, backbone) in table]


def new_axes(title: str, result: dict, x_label: str, subtitle: str = ""):
    """The only axes of a new figure."""
    axes = new_figure(7.2, 4.6).add_subplot()
    heading = f"{title}: {plain(title_of(result['dataset']))}, {result['n_test']:,} test images"
    dress(axes, f"{heading}\n{subtitle}" if subtitle else heading, x_label, TOP1)
    return axes


def finish(axes, papers: Sequence[tuple[str, Published]], right: float) -> None:
    """Add the paper's points that lie within the figure, and the legend."""
    for (backbone, numbers), star, cross in zip(papers, "*P", "x+", strict=False):
        for method, accuracies, marker, colour in (("BoostNet", numbers.boostnet, star, INK),
                                                   ("baseline", numbers.baseline, cross, PALE)):
            near = [(x, y) for x, y in zip(numbers.millions, accuracies, strict=True) if x <= right]
            if near:
                axes.plot(*zip(*near, strict=True), linestyle="none", marker=marker, markersize=7, color=colour,
                          markerfacecolor="none", label=f"paper's {method}, {BACKBONES[backbone]} ({numbers.source})")
    axes.set_xlim(right=right)
    axes.legend(fontsize=8.5, **LEGEND)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("python -m utils.plots", description=__doc__.splitlines()[0])
    parser.add_argument("result_dirs", nargs="+", metavar="RESULT_DIR", help="folder of a run that has been evaluated")
    parser.add_argument("--output", metavar="DIR", help="where the figures go; default: the first RESULT_DIR")
    parser.add_argument("--paper", choices=["auto", "msdnet", "ranet", "none"], default="auto",
                        help="the paper's numbers to show (in the budgeted figure only beside a released sweep); "
                             "default: those for the data set and networks of the runs, if any")
    parser.add_argument("--separate", action="store_true", help="do not combine the sizes of one model")
    parser.add_argument("--reliability", action="store_true",
                        help="draw reliability.png as well, which is drawn anyway where evaluation with --calibrate has been run")
    parser.add_argument("--ideal", action="store_true",
                        help="add what a perfect score would reach: every image leaves at its first right exit, at exit 1 if "
                             "none is right")
    parser.add_argument("--svg", action="store_true", help="write .svg files beside the .png files")
    args = parser.parse_args(argv)
    with user_errors():
        for path in plot_runs(args.result_dirs, args.output, paper=args.paper, separate=args.separate, svg=args.svg,
                               reliability=args.reliability, ideal=args.ideal):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
