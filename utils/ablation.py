"""Draw the ablations of the paper's figure 5 from the runs of msdnet_scripts/ablation_cifar100.sh.

    python -m utils.ablation results/ablation_cifar100        # ablation.png in that folder
    python -m utils.ablation results/ablation_cifar100 --output figures/cifar100_ablation.png

One panel for each factor: temperature, batch size, and what is switched off. Every run differs from the reference, which all
panels show, in one factor; what a run is, its results.json says, whatever its folder is called.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from utils.core.errors import UserError, user_errors
from utils.options.catalog import title_of
from utils.options.parser import OneLineParser
from utils.report import Run, read_run
from utils.reports.style import COLOURS, INK, LEGEND, MARKERS, MILLIONS, TOP1, dress, new_figure, plain, save

# What a panel varies, and its title.
PANELS = {"temperature": "Temperature $t$", "batch size": "Batch size", "switch": "Gradient rescaling, frozen sum"}
REFERENCE = {"temperature": 0.5, "batch size": 64, "switch": "as proposed"}


def factors(run: Run) -> dict[str, float | str]:
    """Where a run stands in every panel.

    Raises:
        UserError: when it is none of the paper's settings.
    """
    settings = run.settings
    if run.method not in ("boost", "joint"):
        raise UserError(f"{run.folder} is none of the settings of this ablation: it was trained with --method {run.method}")
    temperatures = {0.0} if run.method == "joint" else set(settings["ensemble_reweight"])
    switches = {("msdnet_ge", False): "as proposed", ("msdnet", False): "without rescaling",
                ("msdnet_ge", True): "trainable sum"}
    switch = switches.get((settings["arch"], settings["trainable_ensemble"]))
    if switch is None or len(temperatures) > 1:
        raise UserError(f"{run.folder} is none of the settings of this ablation: MSDNet with one temperature, and either without "
                        "rescaling or with a trainable ensemble")
    return {"temperature": temperatures.pop(), "batch size": settings["batch_size"] * run.processes, "switch": switch}


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """The finished runs in the folders in `folder`, and why others there are in no panel, a line each.

    Raises:
        UserError: when there is no reference among them, or they differ in more than the factors, or not at all.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass the one that holds the runs of the ablation")
    found = {path.parent: read_run(path.parent) for path in sorted(folder.glob("*/results.json"))}
    left_out = [f"{path} is not finished and left out" for path, run in found.items() if run is None]
    runs = [run for run in found.values() if run]
    if not any(factors(run) == REFERENCE for run in runs):
        raise UserError(f"{folder} holds no finished run with temperature 0.5, batch size 64, gradient rescaling and a frozen "
                        "sum, with which all others are compared")
    varied = {"ensemble_reweight", "batch_size", "arch", "trainable_ensemble", "method"}
    fixed = {name: value for name, value in runs[0].settings.items() if name not in varied}
    for run in runs[1:]:
        other = [name for name, value in fixed.items() if run.settings[name] != value]
        if other or run.test["n_test"] != runs[0].test["n_test"] or run.seed != runs[0].seed:
            raise UserError(f"{runs[0].folder} and {run.folder} differ in {other[0] if other else 'seed or test set'}, which is "
                            "no part of the ablation")
    places: dict[tuple, Run] = {}
    for run in runs:
        place = factors(run)
        same = places.setdefault(tuple(place.values()), run)
        if same is not run:
            raise UserError(f"{same.folder} and {run.folder} are of the same setting; keep one of them in {folder}")
        if sum(place[name] != value for name, value in REFERENCE.items()) > 1:
            left_out.append(f"{run.folder} differs from the reference in more than one factor and is in no panel")
    return runs, left_out


def panel_runs(runs: Sequence[Run], panel: str) -> dict[float | str, Run]:
    """The runs that differ from the reference in nothing but this panel's factor, in order of the factor."""
    found = {}
    for run in runs:
        place = factors(run)
        if all(place[name] == value for name, value in REFERENCE.items() if name != panel):
            found[place[panel]] = run
    order = ["as proposed", "without rescaling", "trainable sum"] if panel == "switch" else sorted(found)
    return {value: found[value] for value in order if value in found}


def draw(runs: Sequence[Run]):
    """The figure: accuracy of every exit against its cost, a panel for each factor, all on the same axes."""
    figure = new_figure(12.6, 4.4)
    settings, test = runs[0].settings, runs[0].test
    epochs = f"{settings['epochs']} epoch{'s' if settings['epochs'] > 1 else ''}"
    figure.suptitle(plain(f"Ablations: {title_of(test['dataset'])}, MSDNet with {len(test['macs'])} exits, {epochs}, "
                          f"seed {runs[0].seed}, {test['n_test']:,} test images, last epoch"), fontsize=12, color=INK)
    for panel, axes in zip(PANELS, figure.subplots(1, len(PANELS), sharey=True)):
        for i, (value, run) in enumerate(panel_runs(runs, panel).items()):
            reference = value == REFERENCE[panel]
            axes.plot([macs / 1e6 for macs in run.test["macs"]], run.test["top1"], marker=MARKERS[i % len(MARKERS)], markersize=5,
                      color=INK if reference else COLOURS[i % len(COLOURS)], linewidth=2.2 if reference else 1.4,
                      label=f"{value:g}" if isinstance(value, (int, float)) else value, zorder=3 if reference else 2)
        dress(axes, PANELS[panel], f"cost of the exit ({MILLIONS} MACs)")
        axes.legend(title="black: reference", title_fontsize=8, fontsize=9, **LEGEND)
    figure.axes[0].set_ylabel(TOP1, color=INK)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("python -m utils.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="folder that holds the run folders")
    parser.add_argument("--output", metavar="FILE", help="the .png file; default: ablation.png in DIR")
    args = parser.parse_args(argv)
    with user_errors():
        folder = Path(args.folder)
        output = Path(args.output or folder / "ablation.png")
        if output.suffix != ".png":
            raise UserError(f"--output {output}: the figure is a PNG file; give it a name that ends in .png")
        runs, left_out = read_runs(folder)
        for line in [*left_out, *save(draw(runs), output)]:
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
