"""Draw the ablations of the paper's figure 5 from the runs of msdnet_scripts/ablation_cifar100.sh, and print their numbers.

    python -m utils.ablation results/ablation_cifar100        # ablation.png in that folder
    python -m utils.ablation results/ablation_cifar100 --output figures/cifar100_ablation.png --markdown

One panel for each factor: temperature, batch size, and what is switched off. Every run differs from the reference, which all
panels show, in one factor, and in its seed: of several seeds the mean and the range are shown. What a run is, its results.json
says, whatever its folder is called.
"""
from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from utils.core.errors import UserError, user_errors
from utils.core.tables import Table
from utils.options.catalog import TEMPERATURE, title_of
from utils.options.parser import OneLineParser
from utils.reports.finished_runs import FinishedRun, by_exit, differences, read_runs, require_folder, seeds_together
from utils.reports.style import COLOURS, INK, LEGEND, MARKERS, MILLIONS, TOP1, dress, new_figure, plain, png_file, save

# What a panel varies, and its title.
PANELS = {"temperature": "Temperature $t$", "batch_size": "Batch size", "switch": "Gradient rescaling, frozen sum"}
# The switches, by network and --trainable_ensemble.
SWITCHES = {("msdnet_ge", False): "as proposed", ("msdnet", False): "without rescaling", ("msdnet_ge", True): "trainable sum"}
FLAGS = {"method", "ensemble_reweight", "batch_size", "arch", "trainable_ensemble"}   # that make the factors


class Factors(NamedTuple):
    """Where a run stands in every panel."""

    temperature: float
    batch_size: int
    switch: str


REFERENCE = Factors(TEMPERATURE, 64, "as proposed")
Groups = Mapping[Factors, Sequence[FinishedRun]]   # the runs of every setting, which differ in their seed


def factors(run: FinishedRun) -> Factors:
    """Where a run stands in every panel.

    Raises:
        UserError: when it is none of the paper's settings.
    """
    settings = run.settings
    if run.method not in ("boost", "joint"):
        raise UserError(f"{run.folder} is none of the settings of this ablation: it was trained with --method {run.method}")
    temperatures = {0.0} if run.method == "joint" else set(settings["ensemble_reweight"])
    switch = SWITCHES.get((settings["arch"], settings["trainable_ensemble"]))
    if switch is None or len(temperatures) > 1:
        raise UserError(f"{run.folder} is none of the settings of this ablation: MSDNet with one temperature, and either without "
                        "rescaling or with a trainable ensemble")
    return Factors(temperatures.pop(), settings["batch_size"] * settings["processes"], switch)


def read_settings(folder: Path) -> tuple[Groups, list[str]]:
    """The finished runs in the folders in `folder`, and why others there are in no panel, a line each.

    Raises:
        UserError: when there is no reference among them, or they differ in more than the factors and the seed, or not at all.
    """
    require_folder(folder)
    runs, left_out = read_runs(sorted(path.parent for path in folder.glob("*/results.json")))
    groups: dict[Factors, list[FinishedRun]] = {}
    for group in seeds_together(runs):
        place = factors(group[0])   # first, since another method differs in flags of its own as well
        if other := differences(runs[0], group[0], FLAGS):
            raise UserError(f"{runs[0].folder} and {group[0].folder} differ in {other[0]}, which is no part of the ablation")
        same = groups.setdefault(place, group)
        if same is not group:
            raise UserError(f"{same[0].folder} and {group[0].folder} are of the same setting; keep one of them in {folder}")
    if REFERENCE not in groups:
        raise UserError(f"{folder} holds no finished run with temperature 0.5, batch size 64, gradient rescaling and a frozen "
                        "sum, with which all others are compared" + "".join(f"; {line}" for line in left_out))
    for place, group in groups.items():
        if sum(a != b for a, b in zip(place, REFERENCE)) > 1:
            left_out += [f"{run.folder} differs from the reference in more than one factor and is in no panel" for run in group]
    return groups, left_out


def panel_settings(groups: Groups, panel: str) -> dict[float | str, Sequence[FinishedRun]]:
    """The runs that differ from the reference in nothing but this panel's factor, in order of the factor."""
    found = {getattr(place, panel): group for place, group in groups.items()
             if place._replace(**{panel: getattr(REFERENCE, panel)}) == REFERENCE}
    order = SWITCHES.values() if panel == "switch" else sorted(found)
    return {value: found[value] for value in order if value in found}


def title(groups: Groups) -> str:
    """What all runs have in common."""
    run, seeds = groups[REFERENCE][0], {run.seed for group in groups.values() for run in group}
    epochs = run.settings["epochs"]
    of_seeds = f"seed {run.seed}" if len(seeds) == 1 else "mean and range over n seeds"
    return (f"Ablations: {title_of(run.dataset)}, MSDNet with {len(run.macs)} exits, {epochs} epoch{'s' if epochs > 1 else ''}, "
            f"{of_seeds}, {run.n_test:,} test images, last epoch")


def label(value: float | str, group: Sequence[FinishedRun]) -> str:
    """A value of a factor, with the number of seeds behind its figures."""
    text = value if isinstance(value, str) else f"{value:g}"
    return f"{text} (n = {len(group)})" if len(group) > 1 else text


def table(groups: Groups) -> Table:
    """Accuracy of every exit, the settings of a panel under each other and the reference in each."""
    rows = [["10^6 MACs", *(f"{macs / 1e6:.2f}" for macs in groups[REFERENCE][0].macs)]]
    for panel in PANELS:
        for value, group in panel_settings(groups, panel).items():
            cells = [f"{statistics.fmean(tops):.2f}" + (f" ({min(tops):.2f} to {max(tops):.2f})" if len(group) > 1 else "")
                     for tops in by_exit(group)]
            rows.append([f"{panel.replace('_', ' ')} {label(value, group)}".removeprefix("switch "), *cells])
    return Table(title(groups), ["top-1 % at exit", *map(str, range(1, len(rows[0])))], rows)


def draw(groups: Groups):
    """The figure: accuracy of every exit against its cost, a panel for each factor, all on the same axes."""
    figure = new_figure(12.6, 4.4)
    figure.suptitle(plain(title(groups)), fontsize=12, color=INK)
    for panel, axes in zip(PANELS, figure.subplots(1, len(PANELS), sharey=True)):
        for i, (value, group) in enumerate(panel_settings(groups, panel).items()):
            reference, tops = value == getattr(REFERENCE, panel), by_exit(group)
            millions = [macs / 1e6 for macs in group[0].macs]
            colour, layer = (INK, 3) if reference else (COLOURS[i % len(COLOURS)], 2)
            axes.plot(millions, [statistics.fmean(values) for values in tops], marker=MARKERS[i % len(MARKERS)], markersize=5,
                      color=colour, linewidth=2.2 if reference else 1.4, label=label(value, group), zorder=layer)
            if len(group) > 1:
                axes.fill_between(millions, [min(values) for values in tops], [max(values) for values in tops],
                                  color=colour, alpha=0.15, linewidth=0, zorder=layer - 1)
        dress(axes, PANELS[panel], f"cost of the exit ({MILLIONS} MACs)")
        axes.legend(title="black: reference", title_fontsize=8, fontsize=9, **LEGEND)
    figure.axes[0].set_ylabel(TOP1, color=INK)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("python -m utils.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="folder that holds the run folders")
    parser.add_argument("--output", metavar="FILE", help="the .png file; default: ablation.png in DIR")
    parser.add_argument("--markdown", action="store_true", help="the table for a README in place of aligned text")
    args = parser.parse_args(argv)
    with user_errors():
        folder = Path(args.folder)
        output = png_file(args.output or folder / "ablation.png")
        groups, left_out = read_settings(folder)
        [file] = save(draw(groups), output)
        numbers = table(groups)
        print("\n".join([numbers.markdown() if args.markdown else numbers.text(), *left_out, str(file)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
