"""What tables and figures read of finished runs: results.json of a training, and the files that evaluations left beside it."""
from __future__ import annotations

import json
import statistics
from argparse import Namespace
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.core.errors import UserError
from utils.core.files import misfit, read_json
from utils.options.catalog import DATASETS, METHODS
from utils.options.effects import TRAINING, without_effect
from utils.options.flags import BEFORE_THE_FLAG, FREE_ON_RESUME, build_parser, implied
from utils.options.network import stem_of
from utils.runs.result_files import CHOSEN, FAMILIES, RESULTS

# How a run was judged, and what chance decided, make no other training.
NOT_TRAINING = FREE_ON_RESUME - {"checkpoint", "start_epoch"} | {"seed", "paper_protocol"}

# Shapes (`utils.core.files.misfit`) of what is read, and what stands in for entries that older versions did not write.
RUN = {"format": 1, "processes": int, "n_train": (int, None), "data_hash": (str, None), "split_hash": (str, None),
       "config": {"seed": int, "arch": str, "epochs": int, "batch_size": int, "image_size": int, "ensemble_reweight": [float]},
       "test": {"dataset": tuple(DATASETS), "method": tuple(METHODS), "n_test": int, "macs": [float], "top1": [float],
                "epoch": int},
       "best_on_test": ({"top1": [float]}, None)}
OLDER_RUN = {"processes": 1, "n_train": None, "data_hash": None, "best_on_test": None}

EVALUATION = {"format": 1, "name": str, "dataset": str, "method": str, "arch": str, "config": dict, "n_test": int,
              "macs": [float], "ensemble": (str, None), "policy": str, "temperatures": ([float], []),
              "epoch": (int, None), "epoch_kind": (str, None), "ema": (float, None)}
POINT = {"budget": (float, None), "valid_mean_macs": float, "valid_top1": float, "test_mean_macs": float, "test_top1": float}
MODES = {"anytime": {**EVALUATION, "top1": [float]},
         "dynamic": {**EVALUATION, "split_hash": (str, None), "flat": bool, "family": tuple(FAMILIES), "points": [POINT]}}
OLDER_EVALUATION = {"ensemble": None, "policy": "confidence", "temperatures": [], "epoch": None, "epoch_kind": None,
                    "ema": None, "split_hash": None, "calibration": None, "weights_hash": None}
RELIABILITY = "reliability"
DIAGRAM = {**EVALUATION, "ece": [float], "bins": [{"confidence": [float], "accuracy": [float], "share": [float]}],
           "calibration": ([float], None), "weights_hash": (str, None), "ideal": {"top1": float, "mean_macs": float}}
ON_TEST = "best on test set"   # the kind of epoch that nothing honest can be compared with


@dataclass(frozen=True)
class FinishedRun:
    """A training that was tested after its last epoch.

    Attributes:
        settings: all that makes two runs comparable but their seed: the flags that make the training, by dest name (None for
            one without effect), and, in words, what the data and the number of processes were (None where an older version
            did not write it down).
        split_hash: of the hold-out, which the seed draws.
        macs, top1: (n_exits,) of the last epoch's network.
        on_test: (n_exits,) top-1 in the epoch that the test set likes best; None without --paper_protocol.
    """

    folder: Path
    seed: int
    settings: dict[str, Any]
    split_hash: str | None
    macs: list[float]
    top1: list[float]
    on_test: list[float] | None

    @property
    def dataset(self) -> str:
        return self.settings["dataset"]

    @property
    def method(self) -> str:
        return self.settings["method"]

    @property
    def n_test(self) -> int:
        return self.settings["test images"]


def read_run(folder: Path) -> FinishedRun | None:
    """The run in `folder`; None when it has no results yet, or is not finished.

    Raises:
        UserError: when its results.json is damaged or something else.
    """
    path = folder / RESULTS
    if not path.exists() or "test" not in read_json(path):
        return None
    results = read_json(path, RUN, OLDER_RUN)
    config, test = {"stem": stem_of(results["config"]), **BEFORE_THE_FLAG, **results["config"]}, results["test"]
    on_test = results["best_on_test"] and results["best_on_test"]["top1"]
    if not len(test["macs"]) == len(test["top1"]) == len(on_test or test["top1"]):
        raise UserError(f"{path} is damaged: its accuracies are not one number for each exit")
    settings = {name: config.get(name, default) for name, default in build_parser().defaults().items()
                if name not in NOT_TRAINING}
    settings |= {"dataset": test["dataset"], "method": test["method"], "processes": results["processes"],
                 "training images": results["n_train"], "test images": test["n_test"], "data": results["data_hash"],
                 "tested epoch": test["epoch"]}
    if not METHODS[test["method"]].boosted:   # temperatures are 0 whatever the flag says
        settings["ensemble_reweight"] = None
    if settings["lr_type"] == "multistep" and "meta_lr" not in METHODS[test["method"]].flags:   # nothing falls within an epoch
        settings["lr_step"] = None
    return FinishedRun(folder, config["seed"], settings, results["split_hash"], test["macs"], test["top1"], on_test)


def read_runs(folders: Iterable[Path]) -> tuple[list[FinishedRun], list[str]]:
    """The finished runs in `folders`, and a line for each folder that has none, or one that cannot be read.

    Raises:
        UserError: when there is no such folder.
    """
    runs, left_out = [], []
    for folder in folders:
        require_folder(folder)
        try:
            run = read_run(folder)
        except (UserError, OSError) as error:
            left_out.append(f"{folder} is left out: {error}")
            continue
        if run:
            runs.append(run)
        else:
            left_out.append(f"{folder} holds no finished run and is left out.")
    return runs, left_out


def require_folder(folder: Path) -> None:
    """Raise UserError where there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass the --result_dir of a run")


def training_flags(run: FinishedRun) -> dict[str, str]:
    """The flags that made a training, those of the seed and of the judging apart, as words of its command by dest name."""
    parser, settings = build_parser(), run.settings
    defaults = parser.defaults()
    usual = {**defaults, **implied(run.dataset, run.method, settings["image_size"]),
             "image_size": implied(run.dataset, run.method)["image_size"]}
    given = [name for name in usual if settings.get(name) is not None and settings[name] != usual[name]]
    return {name: parser.words(name, settings[name]) for name in given
            if not without_effect(Namespace(**{**defaults, **settings, "explicit": [name]}), parser, TRAINING)}


def of_one_training(runs: Iterable[FinishedRun]) -> list[list[FinishedRun]]:
    """Groups of runs that differ in nothing but their seed, and the hold-out drawn with it."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.settings, run.macs], sort_keys=True), []).append(run)
    return list(groups.values())


def seeds_together(runs: Iterable[FinishedRun]) -> list[list[FinishedRun]]:
    """`of_one_training`, where every seed may be there once.

    Raises:
        UserError: when two are of the same seed.
    """
    groups = of_one_training(runs)
    for group in groups:
        first: dict[int, FinishedRun] = {}
        for run in group:
            same = first.setdefault(run.seed, run)
            if same is not run:
                # The seed and the training labels determine the hold-out.
                other = "" if same.split_hash == run.split_hash else " and trained on other images"
                raise UserError(f"{same.folder} and {run.folder} are runs of the same flags, seed {run.seed} included{other}; "
                                "give one")
    return groups


def differences(a: FinishedRun, b: FinishedRun, besides: Collection[str] = ()) -> list[str]:
    """Names of the settings, besides those that may, in which two runs differ."""
    return [name for name, value in a.settings.items() if value != b.settings[name] and name not in besides]


def by_exit(group: Sequence[FinishedRun], best: bool = False) -> list[tuple[float, ...]]:
    """For each exit the top-1 of all runs of a group after the last epoch, or in the epoch that the test set likes best."""
    return list(zip(*(run.on_test if best else run.top1 for run in group)))


def mean_and_deviation(values: Sequence[float]) -> str:
    """Cell of a table: a value, or mean +- standard deviation of several."""
    return f"{statistics.fmean(values):.2f}" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


# Evaluation files

def mode_of(path: Path) -> str:
    return "dynamic" if path.name.startswith("dynamic") else "anytime"


def read_evaluation(path: Path) -> dict[str, Any]:
    """Content of an anytime or a budgeted file. A name suffix given to the evaluation becomes part of the run's name.

    Raises:
        UserError: when it is missing, incomplete or something else.
    """
    mode = mode_of(path)
    content = read_json(path, MODES[mode], OLDER_EVALUATION)
    if mode == "dynamic":
        problem = misfit(content["points"], [{FAMILIES[content["family"]].key: float}], "points")
    else:
        problem = None if len(content["top1"]) == len(content["macs"]) else "top1 and macs have different lengths"
    if problem:
        raise UserError(f"{path} is damaged: {problem}")
    suffix = path.stem.removeprefix(mode).removeprefix("_flat")
    if mode == "dynamic" and content["family"] in CHOSEN:
        suffix = suffix.removeprefix(f"_{content['family']}")
    config = {**content["config"], "stem": stem_of(content["config"])}   # of a file with and one without it alike
    return {**content, "config": config, "name": content["name"] + suffix, "suffix": suffix}


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The anytime and budgeted files of a run. Training leaves an anytime.json of its last epoch: where there is one with a
    suffix of the user's, only those with a suffix count.

    Raises:
        UserError: when there are none, or one is incomplete or something else.
    """
    require_folder(folder)
    paths = [path for mode in MODES for path in sorted(folder.glob(f"{mode}*.json"))]
    if not paths:
        raise UserError(f"{folder} has no anytime*.json or dynamic*.json; evaluate its checkpoint first: "
                        f"python eval_cifar100.py --evaluate-from {folder}/model_best.pth")
    results = [read_evaluation(path) for path in paths]
    suffixed = any("points" not in result and result["suffix"] and not result["ensemble"] for result in results)
    return [result for result in results if not suffixed or "points" in result or result["suffix"]]


def read_reliability(folder: Path) -> list[dict[str, Any]]:
    """The reliability*.json of a run, those without temperatures first; [] where there are none.

    Raises:
        UserError: when one is incomplete or something else.
    """
    results = []
    for path in sorted(folder.glob(f"{RELIABILITY}*.json")):
        content = read_json(path, DIAGRAM, OLDER_EVALUATION)
        if not len(content["bins"]) == len(content["ece"]) == len(content["macs"]):
            raise UserError(f"{path} is damaged: its exits are not those of macs")
        if any(len({len(column) for column in bins.values()}) > 1 for bins in content["bins"]):
            raise UserError(f"{path} is damaged: the bins of an exit have different numbers of entries")
        results.append({**content, "name": content["name"] + path.stem.removeprefix(RELIABILITY)})
    return sorted(results, key=lambda content: content["calibration"] is not None)


def kinds_of_epoch(results: Sequence[dict[str, Any]]) -> list[str]:
    """How the epoch of each evaluation in a table or figure was chosen; "" where it is the same for all, unless test data chose
    it, and where the file does not say.
    """
    kinds = [f"epoch {result['epoch']}" if result["epoch_kind"] == "epoch" else result["epoch_kind"] for result in results]
    return [kind if kind and (kind == ON_TEST or len(set(kinds)) > 1) else "" for kind in kinds]
