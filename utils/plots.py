"""Draw accuracy against cost from the evaluation files of finished runs.

    python -m utils.plots runs/boost runs/joint              # anytime.png and budgeted.png in runs/boost
    python -m utils.plots runs/k4 runs/k8 runs/k12 --output figures --svg

Reads every anytime*.json and dynamic*.json that eval_cifar100.py or eval_imagenet.py left in the folders. Sizes of one
model (same architecture and method, other flags) become one budgeted curve: at each budget the size with the best
hold-out accuracy. Training leaves an anytime.json of its last epoch; where the folder has an anytime file with a suffix
(--save_suffix), those with a suffix are drawn and anytime.json is not. Other ensembles and policies are curves of their own.
"""
from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from adaptive_inference import combine_sizes
from utils.catalog import method_title, title_of
from utils.cli import OneLineParser
from utils.errors import UserError, user_errors
from utils.files import atomic_write
from utils.paper import ANYTIME, BUDGETED, Published
from utils.reading import reading_words

# Okabe and Ito's palette, distinguishable with every common form of colour blindness.
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
INK, PALE = "#333333", "#8A8A8A"
MILLIONS = "$10^6$"

ARCHITECTURES = {"msdnet": "MSDNet without rescaling", "msdnet_ge": "MSDNet",
                 "ranet": "RANet", "ranet_ge": "RANet with rescaling"}
PAPER_BACKBONES = {"msdnet": "MSDNet", "ranet": "RANet"}
FAMILIES = {"eq9": "shares of eq. 9, one solution per budget", "released": "released sweep, shares proportional to $q^n$",
            "patience": "one point per patience: exits in a row with one answer"}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e30


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of(check: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(check, value))


def _has(fields: dict[str, Callable[[Any], bool]], value: Any) -> bool:
    return isinstance(value, dict) and all(key in value and check(value[key]) for key, check in fields.items())


# What the figures need of an evaluation file.
POINT = {"budget": lambda x: x is None or _is_number(x),
         **dict.fromkeys(("valid_mean_macs", "valid_top1", "test_mean_macs", "test_top1"), _is_number)}
HEADER = {"format": lambda x: x == 1, "config": lambda x: isinstance(x, dict), "n_test": lambda x: type(x) is int and x > 0,
          "macs": partial(_is_list_of, _is_number), **dict.fromkeys(("name", "dataset", "method", "arch"), _is_text)}
FIELDS = {"anytime": {**HEADER, "top1": partial(_is_list_of, _is_number)},
          "dynamic": {**HEADER, "family": lambda x: x in [*FAMILIES], "flat": lambda x: isinstance(x, bool),
                      "split_hash": lambda x: x is None or _is_text(x), "points": partial(_is_list_of, partial(_has, POINT))}}


def plot_runs(folders: Sequence[str | Path], output: str | Path | None = None, *, paper: str = "auto",
              separate: bool = False, svg: bool = False) -> list[Path]:
    """Draw anytime.png and budgeted.png, as far as the folders have results of that kind.

    Args:
        folders: of runs, with evaluation files.
        output: folder for the figures, made if absent; default: the first run's.
        paper: compare with the paper's numbers for "msdnet" or "ranet", for the runs' own networks ("auto") or not at
            all ("none"); within the costs that the runs cover.
        separate: draw the sizes of one model as curves of their own.
        svg: write .svg files too.
    Returns:
        The files written.
    Raises:
        UserError: nothing to draw, or results that do not belong into one figure.
    """
    results = [result for folder in folders for result in read_results(Path(folder))]
    datasets = sorted({str(result["dataset"]) for result in results})
    if len(datasets) > 1:
        raise UserError(f"these runs are of different data sets ({', '.join(datasets)}); draw one figure for each")
    anytime = group_sizes([result for result in results if "points" not in result], separate)
    budgeted = group_sizes([result for result in results if "points" in result], separate)
    curves = [budgeted_curve(group) for group in budgeted]  # refuses different splits before anything is written
    figures = {}
    if anytime:
        figures["anytime"] = draw_anytime(anytime, published(ANYTIME, results, paper))
    if budgeted:
        # The paper's budgeted numbers come from the released sweep and compare with nothing else.
        comparable = [group[0] for group in budgeted if group[0]["family"] == "released"]
        figures["budgeted"] = draw_budgeted(budgeted, curves, published(BUDGETED, comparable, paper))
    return [path for name, figure in figures.items()
            for path in save(figure, Path(output or folders[0]) / name, svg=svg)]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The evaluation files of a run; a name suffix given to the evaluation becomes part of the run's name.

    Raises:
        UserError: when there are none, or one is incomplete or something else.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass the --result_dir of a run")
    paths = [*sorted(folder.glob("anytime*.json")), *sorted(folder.glob("dynamic*.json"))]
    if not paths:
        raise UserError(f"{folder} has no anytime*.json or dynamic*.json; evaluate its checkpoint first: "
                        f"python eval_cifar100.py --evaluate-from {folder}/model_best.pth")
    results = []
    for path in paths:
        kind = "dynamic" if path.name.startswith("dynamic") else "anytime"
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            content = None
        if not _has(FIELDS[kind], content) or kind == "anytime" and len(content["top1"]) != len(content["macs"]):
            raise UserError(f"{path} is not a complete evaluation file; write it again with eval_cifar100.py")
        suffix = path.stem.removeprefix(kind).removeprefix("_flat")
        results.append({**{key: content[key] for key in FIELDS[kind]}, "name": content["name"] + suffix, "suffix": suffix,
                        **{key: content[key] for key in ("ensemble", "policy") if _is_text(content.get(key))}})
    suffixed = any("points" not in result and result["suffix"] and "ensemble" not in result for result in results)
    return [result for result in results if not suffixed or "points" in result or result["suffix"]]


def group_sizes(results: Sequence[dict], separate: bool) -> list[list[dict]]:
    """Results that share one colour: the sizes of a model together, everything else alone."""
    models: dict[tuple, list[dict]] = {}
    for result in results:
        model = tuple(result.get(key) for key in ("arch", "method", "suffix", "family", "flat"))
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
                  papers: Sequence[tuple[str, Published]]):
    """Test accuracy against the mean cost on the test set; sizes behind a combined curve stay visible as thin lines."""
    families = {group[0]["family"] for group in groups}
    subtitle = FAMILIES[families.pop()] if len(families) == 1 else ""
    axes = new_axes("Budgeted batch prediction", groups[0][0], f"mean MACs per test image ({MILLIONS})", subtitle)
    right = 1.04 * max(point["test_mean_macs"] for curve in curves for point in curve) / 1e6
    names = labels([group[0] for group in groups], [len(group) for group in groups], name_family=not subtitle)
    for colour, marker, name, group, curve in zip(cycle(COLOURS), cycle(MARKERS), names, groups, curves):
        for result in group if len(group) > 1 else []:
            axes.plot(*positions(result["points"]), color=colour, linewidth=0.9, alpha=0.45)
        axes.plot(*positions(curve), color=colour, linewidth=1.8, marker=marker, markersize=4, label=name)
    finish(axes, papers, right)
    return axes.figure


def positions(points: Sequence[dict]) -> tuple[list[float], list[float]]:
    """Test cost in 10^6 MACs and test accuracy."""
    return [point["test_mean_macs"] / 1e6 for point in points], [point["test_top1"] for point in points]


def labels(results: Sequence[dict], sizes: Sequence[int] | None = None, name_family: bool = False) -> list[str]:
    """What the legend calls each result: method and network, and more where that is not enough to tell them apart."""
    found = []
    for result, size in zip(results, sizes or [1] * len(results), strict=True):
        method, arch = result["method"], result["arch"]
        words = [f"{method_title(method)}, {ARCHITECTURES.get(arch, arch)}", *reading_words(result)]
        words += [f"{size} sizes combined"] if size > 1 else []
        # Of patience the words of the reading tell already.
        families = {"eq9": ["eq. 9"], "released": ["released sweep"]}
        words += families.get(result["family"], []) if name_family else []
        words += ["flat curve"] if result.get("flat") else []
        found.append(", ".join(words))
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


# Looks

def plain(text: str) -> str:
    """Text from outside as matplotlib shows it unchanged: a dollar begins no formula, bytes that are no text become "?"."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def new_axes(title: str, result: dict, x_label: str, subtitle: str = ""):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    heading = f"{title}: {plain(title_of(result['dataset']))}, {result['n_test']:,} test images"
    axes.set_title(f"{heading}\n{subtitle}" if subtitle else heading, fontsize=11, color=INK)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel("top-1 accuracy (%)", color=INK)
    axes.grid(True, color="#E3E3E3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return axes


def finish(axes, papers: Sequence[tuple[str, Published]], right: float) -> None:
    """Add the paper's points that lie within the figure, and the legend."""
    for (backbone, numbers), star, cross in zip(papers, "*P", "x+", strict=False):
        for method, accuracies, marker, colour in (("BoostNet", numbers.boostnet, star, INK),
                                                   ("baseline", numbers.baseline, cross, PALE)):
            near = [(x, y) for x, y in zip(numbers.millions, accuracies, strict=True) if x <= right]
            if near:
                axes.plot(*zip(*near, strict=True), linestyle="none", marker=marker, markersize=7, color=colour,
                          markerfacecolor="none", label=f"paper's {method}, {PAPER_BACKBONES[backbone]} ({numbers.source})")
    axes.set_xlim(right=right)
    axes.legend(loc="lower right", fontsize=8.5, framealpha=0.9, edgecolor="#CCCCCC")


def save(figure, stem: Path, *, svg: bool) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".png"), *([stem.with_suffix(".svg")] if svg else [])]
    for path in paths:
        with atomic_write(path) as file:
            figure.savefig(file, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("python -m utils.plots", description=__doc__.splitlines()[0])
    parser.add_argument("result_dirs", nargs="+", metavar="RESULT_DIR", help="folder of a run that has been evaluated")
    parser.add_argument("--output", metavar="DIR", help="where the figures go; default: the first RESULT_DIR")
    parser.add_argument("--paper", choices=["auto", "msdnet", "ranet", "none"], default="auto",
                        help="the paper's numbers to show (in the budgeted figure only beside a released sweep); "
                             "default: those for the data set and networks of the runs, if any")
    parser.add_argument("--separate", action="store_true", help="do not combine the sizes of one model")
    parser.add_argument("--svg", action="store_true", help="write .svg files beside the .png files")
    args = parser.parse_args(argv)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # its cache is nobody's concern here
    with user_errors():
        for path in plot_runs(args.result_dirs, args.output, paper=args.paper, separate=args.separate, svg=args.svg):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
