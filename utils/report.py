"""Tables of finished runs: the paper's tables 1 and 2 with this project's rows in them, and everything else in tables of its own.

    python -m utils.report runs/msdnet_boost runs/msdnet_joint runs/msdnet_boost_seed1
    python -m utils.report published/*/*/ --markdown
    python -m utils.report                               # the table of all published runs in docs/results.md

Reads results.json and dynamic*.json, and nothing else; what cannot be read is named below the tables. Only runs of the paper's
networks with the paper's schedule enter the paper's tables; headline is the last epoch. Runs that differ in nothing but --seed,
and the hold-out drawn with it, become mean +- standard deviation; runs on other data, or judged on other test images, are never
averaged or subtracted from each other.
"""
from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.core.errors import UserError, user_errors
from utils.core.tables import Table, millions
from utils.options.catalog import TEMPERATURE, method_title, title_of
from utils.options.flags import build_parser
from utils.options.network import NETWORK
from utils.options.parser import OneLineParser
from utils.reports import paper
from utils.reports.finished_runs import (
    FinishedRun,
    by_exit,
    differences,
    kinds_of_epoch,
    mean_and_deviation,
    read_evaluation,
    read_runs,
    seeds_together,
    training_flags,
)
from utils.reports.published_runs import published_runs
from utils.runs.result_files import FAMILIES, reading_words

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED, PAGE = ROOT / "published", ROOT / "docs/results.md"
NOT_RUN = "not run"
MOST_BUDGETS = 8
Group = Sequence[FinishedRun]   # that differ in their seed only


def is_papers(run: FinishedRun, dataset: str, backbone: str) -> bool:
    """Whether a run is what the paper's table of this data set has under this backbone: its network, data and schedule."""
    expected = {"dataset": dataset, "arch": paper.ARCHITECTURES[backbone], "training images": paper.TRAINING_IMAGES[dataset],
                "test images": paper.TEST_IMAGES[dataset], **paper.TRAINING, **paper.SCHEDULES[dataset]}
    return (has_costs(run.macs, paper.ANYTIME[dataset, backbone].millions)
            and was_trained_with(run, expected, paper.IMAGES_PER_STEP[dataset])
            and (run.method == "joint" or (run.method == "boost" and set(run.settings["ensemble_reweight"]) == {TEMPERATURE})))


def has_costs(macs: Sequence[float], millions: Sequence[float]) -> bool:
    """Whether the exits of a network cost what is published of one, in 10^6 MACs of four digits."""
    return len(macs) == len(millions) and all(abs(a / (1e6 * b) - 1) < 5e-4 for a, b in zip(macs, millions))


def was_trained_with(run: FinishedRun, settings: dict[str, Any], images_per_step: int) -> bool:
    """Whether a run has these settings and was trained and tested to their last epoch."""
    return (all(run.settings[name] == value for name, value in settings.items())
            and run.settings["tested epoch"] == settings["epochs"]
            and run.settings["batch_size"] * run.settings["processes"] == images_per_step)


def differ_in_method(a: FinishedRun, b: FinishedRun) -> bool:
    """Whether one is BoostNet and the other its joint baseline, all else equal."""
    return {a.method, b.method} == {"boost", "joint"} and not differences(
        a, b, {"method", "ensemble_reweight", "trainable_ensemble"})


# Cells

def mean(group: Group, best: bool = False) -> list[float]:
    """(n_exits,) mean top-1 of the last epoch, or of the epoch that the test set likes best."""
    return [statistics.fmean(values) for values in by_exit(group, best)]


def shown(group: Group, best: bool = False) -> list[str]:
    """Cells of a group: value, or mean +- standard deviation."""
    return [mean_and_deviation(values) for values in by_exit(group, best)]


def signed(a: Sequence[float], b: Sequence[float]) -> list[str]:
    return [f"{x - y:+.2f}" for x, y in zip(a, b)]


def of_seeds(group: Group) -> str:
    return f", n = {len(group)}" if len(group) > 1 else ""


# Tables

def papers_table(dataset: str, backbone: str, groups: Sequence[Group]) -> Table:
    """The paper's table of this data set and backbone, this project's rows under the paper's, and the differences.

    Args:
        groups: those that belong into it (`is_papers`).
    """
    numbers: paper.Published = paper.ANYTIME[dataset, backbone]
    table = Table(f"Paper's {numbers.source}: {title_of(dataset)}, {paper.BACKBONES[backbone]}, top-1 % on the test set",
                  ["exit", *map(str, range(1, len(numbers.millions) + 1))],
                  [["10^6 MACs", *(f"{m:#.4g}".rstrip(".") for m in numbers.millions)]])
    for method, name, published in (("joint", "baseline", numbers.baseline), ("boost", "BoostNet", numbers.boostnet)):
        table.rows.append([f"{name}, paper", *(f"{top1:.2f}" for top1 in published)])
        ours = [group for group in groups if group[0].method == method]
        if not ours:
            table.rows.append([f"{name}, here", *[NOT_RUN] * len(published)])
        for group, label in zip(ours, distinct(ours)):
            amp = group[0].settings["amp"]
            label += f", --amp {amp}" if amp != "off" and "--amp" not in label else ""
            table.rows += [[f"{name}{label}, here{of_seeds(group)}", *shown(group)],
                           ["  less the paper", *signed(mean(group), published)],
                           *best_rows(group, published)]
    table.rows += [["BoostNet less baseline, paper", *signed(numbers.boostnet, numbers.baseline)],
                   *gain_row(groups, "BoostNet less baseline, here")]
    table.notes.append("The paper's checkpoints were chosen by test accuracy; rows here are of the last epoch unless they say "
                       "otherwise.")
    return table


def best_rows(group: Group, published: Sequence[float] | None = None) -> Iterator[list[str]]:
    """Rows of the epoch that test data chose, where all runs of the group know it."""
    if all(run.on_test for run in group):
        yield ["  best epoch on the test set", *shown(group, best=True)]
        if published:
            yield ["    less the paper", *signed(mean(group, best=True), published)]
        yield ["    less the last epoch", *signed(mean(group, best=True), mean(group))]


def gain_row(groups: Sequence[Group], label: str) -> Iterator[list[str]]:
    """The row that says what boosting gains, where there are BoostNet and its baseline and nothing else."""
    if len(groups) == 2 and differ_in_method(*(group[0] for group in groups)):
        joint, boost = sorted(groups, key=lambda group: group[0].method == "boost")
        yield [label, *signed(mean(boost), mean(joint))]


def own_tables(groups: Iterable[Group]) -> list[Table]:
    """Runs that are not the paper's, those of one network and number of epochs side by side."""
    kinds: dict[tuple, list[Group]] = {}
    for group in groups:
        run = group[0]
        kinds.setdefault((run.dataset, run.n_test, network(run), run.settings["tested epoch"], tuple(run.macs)), []).append(group)
    tables = []
    for (dataset, n_test, flags, epochs, macs), members in kinds.items():
        table = Table(f"{title_of(dataset)}, {flags}, {epochs} epoch{'s' if epochs > 1 else ''}: "
                      f"top-1 % on {n_test:,} test images, last epoch",
                      ["exit", *map(str, range(1, len(macs) + 1))], [["10^6 MACs", *map(millions, macs)]])
        recipes = [recipe for recipe in paper.RECIPES
                   if recipe.settings["dataset"] == dataset and has_costs(macs, recipe.millions)]
        table.rows += [[f"{recipe.title}, published", *(f"{top1:.2f}" for top1 in recipe.top1)] for recipe in recipes]
        for group, label in zip(members, distinct(members)):
            table.rows.append([f"{method_title(group[0].method)}{label}{of_seeds(group)}", *shown(group)])
            table.rows += [[f"  less {recipe.title}, published", *signed(mean(group), recipe.top1)] for recipe in recipes
                           if was_trained_with(group[0], recipe.settings, recipe.images_per_step)]
            table.rows += best_rows(group)
        table.rows += gain_row(members, "BoostNet less joint training")
        table.notes.append("Not the paper's network or schedule: not to be compared with its tables.")
        if recipes:
            table.notes.append("Published rows are of weights chosen by test accuracy; a run is compared with them where its "
                               "recipe is theirs.")
        tables.append(table)
    return tables


def network(run: FinishedRun) -> str:
    """The network as flags, defaults left out."""
    flags = training_flags(run)
    return " ".join([run.settings["arch"], *(flags[name] for name in NETWORK if name != "arch" and name in flags)])


def distinct(groups: Sequence[Group]) -> list[str]:
    """What tells groups of one method apart: settings, besides method and network, in which they differ, or their folders."""
    parser, settings = build_parser(), [group[0].settings for group in groups]
    names = [name for name in (settings[0] if settings else ()) if name not in ("method", *NETWORK)
             and len({str(s[name]) for s in settings if s[name] is not None}) > 1]
    labels = ["".join(f", {words}" for name in names if s[name] is not None and (words := parser.words(name, s[name])))
              for s in settings]
    pairs = [(group[0].method, label) for group, label in zip(groups, labels)]
    return [f"{label} ({group[0].folder.name})" if pairs.count(pair) > 1 else label
            for group, label, pair in zip(groups, labels, pairs)]


def budget_tables(folders: Iterable[Path]) -> tuple[list[Table], list[str]]:
    """Accuracy at budgets of all budgeted evaluations in the folders, those that can be compared side by side, and a line for
    each that cannot be read.
    """
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    left_out = []
    for path in (path for folder in folders for path in sorted(folder.glob("dynamic*.json"))):
        try:
            result = read_evaluation(path)
        except (UserError, OSError) as error:
            left_out.append(f"{path} is left out: {error}")
            continue
        if result["family"] != "patience":   # which has no budgets
            wanted = tuple(point[FAMILIES[result["family"]].key] for point in result["points"])
            kinds.setdefault((result["dataset"], result["n_test"], json.dumps(result["config"], sort_keys=True),
                              result["family"], result["flat"], result["split_hash"], wanted), []).append(result)
    tables = []
    for (dataset, n_test, _, family, flat, _, wanted), results in kinds.items():
        picked = sorted({round(i * (len(wanted) - 1) / (MOST_BUDGETS - 1)) for i in range(MOST_BUDGETS)})
        words = FAMILIES[family]
        table = Table(f"Budgeted batch, {title_of(dataset)}, {results[0]['arch']} with {len(results[0]['macs'])} exits, "
                      f"{words.title}{', flat curve' if flat else ''}: top-1 % on {n_test:,} test images, 10^6 MACs per image",
                      [words.column, *(words.show(wanted[i]) for i in picked)])
        for result, kind in zip(results, kinds_of_epoch(results)):
            points = [result["points"][i] for i in picked]
            name = ", ".join(filter(None, [method_title(result["method"]), *reading_words(result), kind]))
            table.rows += [[f"{name} ({result['name']})", *(f"{point['test_top1']:.2f}" for point in points)],
                           ["  MACs spent", *(millions(point["test_mean_macs"]) for point in points)]]
        tables.append(table)
    return tables, left_out


def report(folders: Sequence[Path]) -> list[Table]:
    """All tables of the runs in `folders`, the paper's first.

    Raises:
        UserError: when a folder is missing, or there is nothing to report.
    """
    runs, left_out = read_runs(folders)
    groups = seeds_together(runs)
    places = {place: [group for group in groups if is_papers(group[0], *place)] for place in paper.ANYTIME}
    others = [group for group in groups if not any(group in members for members in places.values())]
    budgeted, unreadable = budget_tables(folders)
    tables = [*(papers_table(*place, members) for place, members in places.items()
                if any(run.dataset == place[0] for run in runs)), *own_tables(others), *budgeted]
    notes = left_out + unreadable
    if not tables:
        raise UserError(" ".join(notes) or "nothing to report")
    tables[-1].notes += notes
    return tables


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("python -m utils.report", description=__doc__.splitlines()[0])
    parser.add_argument("result_dirs", nargs="*", metavar="RESULT_DIR",
                        help="folder of a training run; without one, the table of all published runs in docs/results.md")
    parser.add_argument("--markdown", action="store_true", help="tables for a README in place of aligned text")
    args = parser.parse_args(argv)
    with user_errors():
        if not args.result_dirs:
            print(published_runs(PUBLISHED, PAGE))
            return 0
        tables = report([Path(folder) for folder in args.result_dirs])
        print("\n\n".join(table.markdown() if args.markdown else table.text() for table in tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
