"""Tables of finished runs: the paper's tables 1 and 2 with this project's rows in them, and everything else in tables of its own.

    python -m utils.report runs/msdnet_boost runs/msdnet_joint runs/msdnet_boost_seed1
    python -m utils.report published/*/* --markdown

Reads results.json and dynamic*.json, never a checkpoint. Only runs of the paper's networks with the paper's schedule enter the
paper's tables; headline is the last epoch. Runs that differ in nothing but --seed, and the hold-out drawn with it, become mean
+- standard deviation; runs judged on other test images are never averaged.
"""
from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.core.errors import UserError, user_errors
from utils.core.tables import Table, millions
from utils.options.catalog import METHODS, TEMPERATURE, method_title, title_of
from utils.options.flags import FREE_ON_RESUME, NETWORK, build_parser
from utils.options.parser import OneLineParser
from utils.reports import paper
from utils.runs.folder import RESULTS
from utils.runs.result_files import FAMILIES, FIELDS, HEADER, has, is_list_of, is_number, read_results, reading_words

NOT_RUN = "not run"
# How a run was judged, and what chance decided, make no other training.
NOT_TRAINING = FREE_ON_RESUME - {"checkpoint", "start_epoch"} | {"seed", "paper_protocol"}
MOST_BUDGETS = 8
# What the tables need of the test figures in results.json.
TEST = {**{name: HEADER[name] for name in ("dataset", "method", "arch", "config", "n_test", "macs")},
        "top1": FIELDS["anytime"]["top1"], "epoch": is_number}


@dataclass
class Run:
    """A finished run.

    Attributes:
        settings: flags that make the training, by dest name, but not its seed; None for one without effect.
        n_train, data_hash: training images, and what the data are; None in files of an older version.
        test: content of its anytime file of the last epoch.
        on_test: (n_exits,) top-1 in the epoch that the test set likes best; None without --paper_protocol.
    """

    folder: Path
    seed: int
    settings: dict[str, Any]
    processes: int
    n_train: int | None
    split_hash: str | None
    data_hash: str | None
    test: dict[str, Any]
    on_test: list[float] | None

    @property
    def dataset(self) -> str:
        return self.test["dataset"]

    @property
    def method(self) -> str:
        return self.test["method"]


def read_run(folder: Path) -> Run | None:
    """The run in `folder`; None when it has no results yet, or is not finished.

    Raises:
        UserError: when there is no such folder, or its results.json is something else.
    """
    path = folder / RESULTS
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass the --result_dir of a training run")
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text())
        config, test = results["config"], results.get("test")
        if test is None:
            return None
        defaults = vars(build_parser().parse_args([]))
        settings = {name: config.get(name, default) for name, default in defaults.items() if name not in NOT_TRAINING}
        for name, value in settings.items():
            if not _is_setting(value, defaults[name]):
                raise ValueError(f"{name} cannot be {value!r}")
        if not METHODS[test["method"]].boosted:   # temperatures are 0 whatever the flag says
            settings["ensemble_reweight"] = None
        if not has(TEST, test):
            raise ValueError("its test figures are incomplete")
        on_test = results["best_on_test"]["top1"] if "best_on_test" in results else None
        run = Run(folder, int(config["seed"]), settings, int(results.get("processes", 1)), results.get("n_train"),
                  results["split_hash"], results.get("data_hash"), {name: test[name] for name in TEST}, on_test)
        if not len(run.test["macs"]) == len(run.test["top1"]) == len(on_test or run.test["top1"]):
            raise ValueError("its figures are not one number for each exit")
        if on_test and not is_list_of(is_number, on_test):
            raise ValueError("its best epoch has no accuracies")
        return run
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is not the {RESULTS} of a run: {type(error).__name__} {error}") from error


def _is_setting(value: Any, default: Any) -> bool:
    """Whether a flag of results.json can have had this value."""
    if default is None:
        return value is None or isinstance(value, (str, int, float, list))
    if isinstance(default, list):
        return is_list_of(is_number, value)
    return type(value) in ((int, float) if type(default) is float else (type(default),))


def seeds_together(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs that differ only in their seed.

    Raises:
        UserError: when two are of the same seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        data = [run.dataset, run.n_train, run.data_hash, run.test["n_test"], run.test["macs"]]
        groups.setdefault(json.dumps([run.settings, run.processes, data], sort_keys=True), []).append(run)
    for group in groups.values():
        seen: dict[int, Run] = {}
        for run in group:
            same = seen.setdefault(run.seed, run)
            if same is not run:
                # The seed and the training labels determine the hold-out.
                other = "" if same.split_hash == run.split_hash else " and trained on other images"
                raise UserError(f"{same.folder} and {run.folder} are runs of the same flags, seed {run.seed} included{other}; "
                                "give one")
    return list(groups.values())


def is_papers(run: Run, backbone: str) -> bool:
    """Whether a run is what the paper's table has under this backbone: its network, its data, its schedule."""
    numbers = paper.ANYTIME.get((run.dataset, backbone))
    if numbers is None or run.settings["arch"] != paper.ARCHITECTURES[backbone] or len(run.test["macs"]) != len(numbers.millions):
        return False
    if (run.n_train, run.test["n_test"]) != (paper.TRAINING_IMAGES[run.dataset], paper.TEST_IMAGES[run.dataset]):
        return False
    same_network = all(abs(macs / (1e6 * told) - 1) < 5e-4 for macs, told in zip(run.test["macs"], numbers.millions))
    expected = {**paper.TRAINING, **paper.SCHEDULES[run.dataset]}
    same_training = all(run.settings[name] == value for name, value in expected.items())
    same_step = run.settings["batch_size"] * run.processes == paper.IMAGES_PER_STEP[run.dataset]
    same_method = run.method == "joint" or (run.method == "boost"
                                            and set(run.settings["ensemble_reweight"]) == {TEMPERATURE})
    return same_network and same_training and same_step and same_method and run.test["epoch"] == expected["epochs"]


# Cells

def mean(group: Sequence[Run], best: bool = False) -> list[float]:
    """(n_exits,) mean top-1 of the last epoch, or of the epoch that the test set likes best."""
    return [statistics.fmean(values) for values in zip(*((run.on_test if best else run.test["top1"]) for run in group))]


def shown(group: Sequence[Run], best: bool = False) -> list[str]:
    """Cells of a group: value, or mean +- standard deviation."""
    values = list(zip(*((run.on_test if best else run.test["top1"]) for run in group)))
    if len(group) == 1:
        return [f"{value:.2f}" for value, in values]
    return [f"{statistics.fmean(v):.2f} +- {statistics.stdev(v):.2f}" for v in values]


def signed(a: Sequence[float], b: Sequence[float]) -> list[str]:
    return [f"{x - y:+.2f}" for x, y in zip(a, b)]


def of_seeds(group: Sequence[Run]) -> str:
    return f", n = {len(group)}" if len(group) > 1 else ""


# Tables

def papers_table(dataset: str, backbone: str, groups: Sequence[Sequence[Run]]) -> Table:
    """The paper's table of this data set and backbone, this project's rows under the paper's, and the differences."""
    numbers: paper.Published = paper.ANYTIME[dataset, backbone]
    table = Table(f"Paper's {numbers.source}: {title_of(dataset)}, {paper.BACKBONES[backbone]}, top-1 % on the test set",
                  ["exit", *map(str, range(1, len(numbers.millions) + 1))],
                  [["10^6 MACs", *(f"{m:#.4g}".rstrip(".") for m in numbers.millions)]])
    found = {}
    for method, name, told in (("joint", "baseline", numbers.baseline), ("boost", "BoostNet", numbers.boostnet)):
        table.rows.append([f"{name}, paper", *(f"{top1:.2f}" for top1 in told)])
        ours = found[method] = [group for group in groups if group[0].method == method and is_papers(group[0], backbone)]
        if not ours:
            table.rows.append([f"{name}, here", *[NOT_RUN] * len(told)])
        for group, label in zip(ours, distinct(ours)):
            amp = group[0].settings["amp"]
            label += f", --amp {amp}" if amp != "off" and "--amp" not in label else ""
            table.rows += [[f"{name}{label}, here{of_seeds(group)}", *shown(group)],
                           ["  less the paper", *signed(mean(group), told)],
                           *best_rows(group, told)]
    gains = [f"{b - a:+.2f}" for a, b in zip(numbers.baseline, numbers.boostnet)]
    table.rows.append(["BoostNet less baseline, paper", *gains])
    if len(found["joint"]) == len(found["boost"]) == 1:
        table.rows.append(["BoostNet less baseline, here", *signed(mean(*found["boost"]), mean(*found["joint"]))])
    table.notes.append("The paper's checkpoints were chosen by test accuracy; rows here are of the last epoch unless they say "
                       "otherwise.")
    return table


def best_rows(group: Sequence[Run], told: Sequence[float] | None = None) -> Iterator[list[str]]:
    """Rows of the epoch that test data chose, where all runs of the group know it."""
    if all(run.on_test for run in group):
        yield ["  best epoch on the test set", *shown(group, best=True)]
        if told:
            yield ["    less the paper", *signed(mean(group, best=True), told)]
        yield ["    less the last epoch", *signed(mean(group, best=True), mean(group))]


def own_tables(groups: Sequence[Sequence[Run]]) -> list[Table]:
    """Runs that are not the paper's, those of one network and number of epochs side by side."""
    kinds: dict[tuple, list[Sequence[Run]]] = {}
    for group in groups:
        run = group[0]
        kinds.setdefault((run.dataset, run.test["n_test"], network(run), run.settings["epochs"], tuple(run.test["macs"])),
                         []).append(group)
    tables = []
    for (dataset, n_test, flags, epochs, macs), members in kinds.items():
        table = Table(f"{title_of(dataset)}, {flags}, {epochs} epoch{'s' if epochs > 1 else ''}: top-1 % on {n_test:,} "
                      "test images, last epoch",
                      ["exit", *map(str, range(1, len(macs) + 1))], [["10^6 MACs", *map(millions, macs)]])
        for group, label in zip(members, distinct(members)):
            method = group[0].method
            table.rows += [[f"{method_title(method)}{label}{of_seeds(group)}", *shown(group)], *best_rows(group)]
        if len(members) == 2 and differ_in_method(*(group[0] for group in members)):
            joint, boost = sorted(members, key=lambda group: group[0].method == "boost")
            table.rows.append(["BoostNet less joint training", *signed(mean(boost), mean(joint))])
        table.notes.append("Not the paper's network or schedule: not to be compared with its tables.")
        tables.append(table)
    return tables


def differ_in_method(a: Run, b: Run) -> bool:
    """Whether one is BoostNet and the other its joint baseline, all else equal."""
    others = set(a.settings) - {"method", "ensemble_reweight", "trainable_ensemble"}
    return {a.method, b.method} == {"boost", "joint"} and all(a.settings[name] == b.settings[name] for name in others)


def network(run: Run) -> str:
    """The network as flags, defaults left out."""
    parser = build_parser()
    given = vars(parser.parse_args([]))
    listed = [f"{parser.spelling(name)} {flag_text(run.settings[name])}" for name in NETWORK
              if name != "arch" and run.settings[name] != given[name]]
    return " ".join([run.settings["arch"], *listed])


def flag_text(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def distinct(groups: Sequence[Sequence[Run]]) -> list[str]:
    """What tells the groups of a method apart: the settings, besides method, in which they differ, or their folders."""
    parser, settings = build_parser(), [group[0].settings for group in groups]
    names = [name for name in (settings[0] if settings else ()) if name not in ("method", *NETWORK)
             and len({str(s[name]) for s in settings if s[name] is not None}) > 1]
    labels = ["".join(f", {parser.spelling(name)} {flag_text(s[name])}" for name in names if s[name] is not None)
              for s in settings]
    told = [(group[0].method, label) for group, label in zip(groups, labels)]
    return [f"{label} ({group[0].folder.name})" if told.count(pair) > 1 else label
            for group, label, pair in zip(groups, labels, told)]


def budget_tables(folders: Sequence[Path]) -> list[Table]:
    """Accuracy at budgets of all budgeted evaluations in the folders; those that can be compared side by side."""
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    for folder in folders:
        for result in read_results(folder) if any(folder.glob("dynamic*.json")) else []:
            if "points" in result and result["family"] != "patience":   # which has no budgets
                asked = tuple(point[FAMILIES[result["family"]].key] for point in result["points"])
                kinds.setdefault((result["dataset"], result["n_test"], json.dumps(result["config"], sort_keys=True),
                                  result["family"], result["flat"], result["split_hash"], asked), []).append(result)
    tables = []
    for (dataset, n_test, _, family, flat, _, asked), results in kinds.items():
        picked = sorted({round(i * (len(asked) - 1) / (MOST_BUDGETS - 1)) for i in range(MOST_BUDGETS)})
        told = FAMILIES[family]
        table = Table(f"Budgeted batch, {title_of(dataset)}, {results[0]['arch']} with {len(results[0]['macs'])} exits, "
                      f"{told.title}{', flat curve' if flat else ''}: top-1 % on {n_test:,} test images, 10^6 MACs per image",
                      [told.column, *(told.show(asked[i]) for i in picked)])
        for result in results:
            points = [result["points"][i] for i in picked]
            table.rows += [[f"{', '.join([method_title(result['method']), *reading_words(result)])} ({result['name']})",
                            *(f"{point['test_top1']:.2f}" for point in points)],
                           ["  MACs spent", *(millions(point["test_mean_macs"]) for point in points)]]
        tables.append(table)
    return tables


def report(folders: Sequence[Path]) -> list[Table]:
    """All tables of the runs in `folders`, the paper's first.

    Raises:
        UserError: when a folder holds no run.
    """
    found = [(folder, read_run(folder)) for folder in folders]
    groups = seeds_together([run for _, run in found if run])
    papers, others = [], list(groups)
    for dataset, backbone in paper.ANYTIME:
        if any(run and run.dataset == dataset for _, run in found):
            papers.append(papers_table(dataset, backbone, groups))
            others = [group for group in others if not is_papers(group[0], backbone)]
    tables = [*papers, *own_tables(others), *budget_tables(folders)]
    unfinished = [f"{folder} holds no finished run and is left out." for folder, run in found if run is None]
    if not tables:
        raise UserError(" ".join(unfinished) or "nothing to report")
    tables[-1].notes += unfinished
    return tables


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("python -m utils.report", description=__doc__.splitlines()[0])
    parser.add_argument("result_dirs", nargs="+", metavar="RESULT_DIR", help="folder of a training run")
    parser.add_argument("--markdown", action="store_true", help="tables for a README in place of aligned text")
    args = parser.parse_args(argv)
    with user_errors():
        tables = report([Path(folder) for folder in args.result_dirs])
        print("\n\n".join(table.markdown() if args.markdown else table.text() for table in tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
