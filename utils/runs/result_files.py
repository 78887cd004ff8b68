"""The files that evaluation leaves in a run's folder: their names, the kinds of curve in them, and how programs read them again.

`anytime*.json` hold the accuracy of every exit, `dynamic*.json` the points of a budgeted curve, `realtime*.json` measured times.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from utils.core.errors import UserError
from utils.core.tables import millions
from utils.options.catalog import TEMPERATURE

# What titles and legends call the ways to read exits (--ensemble) and to leave (--policy).
ENSEMBLES = {"none": "each exit alone", "boost": "exits added up", "average": "exits averaged", "poe": "product of exits"}
LEAVING = {"entropy": "leaving by entropy", "margin": "leaving by margin", "patience": "leaving by patience"}


class Family(NamedTuple):
    """A way to come by the points of a budgeted curve.

    Attributes:
        key: entry of a point that says what was asked for.
        show: its value in a table.
        column: what the table calls it.
        title: of a table.
        subtitle: of a figure.
        short: in a legend beside another family; "" where the words of the reading tell already.
    """

    key: str
    show: Callable[[float], str]
    column: str
    title: str
    subtitle: str
    short: str


FAMILIES = {
    "eq9": Family("budget", millions, "budget", "budgets solved by eq. 9",
                  "shares of eq. 9, one solution per budget", "eq. 9"),
    "released": Family("p", "{:.2f}".format, "q", "released sweep (shares ~ q^n, q = 1/20 ... 39/20)",
                       "released sweep, shares proportional to $q^n$", "released sweep"),
    "patience": Family("patience", str, "patience", "patience (exits in a row with one answer)",
                       "one point per patience: exits in a row with one answer", ""),
}


def stem(mode: str, about: Mapping[str, Any], save_suffix: str = "") -> str:
    """Name of an evaluation file, without its ending, so that one way to evaluate does not overwrite another's.

    Args:
        mode: "anytime", "dynamic" or "realtime".
        about: content of the file, or as much of it as is not as usual: `flat`, `augmented_hold_out`, `ensemble` (with
            `temperatures`), `policy`.
        save_suffix: the user's own (--save_suffix).
    """
    policy, temperatures = about.get("policy"), unusual_temperatures(about)
    parts = ["flat" if about.get("flat") else None, "augmented" if about.get("augmented_hold_out") else None,
             about.get("ensemble"), f"t{temperatures}" if temperatures else None, policy if policy != "confidence" else None]
    return "_".join([mode, *filter(None, parts)]) + save_suffix



def describe(about: Mapping[str, Any]) -> str:
    """The method of a result file, with ensemble and policy where they are not the usual ones (older files have none)."""
    how = reading_words(about)
    return f"{about['method']} ({', '.join(how)})" if how else about["method"]


def reading_words(about: Mapping[str, Any]) -> list[str]:
    """What is not usual in how a result file's exits were read."""
    temperatures = unusual_temperatures(about)
    words = (ENSEMBLES.get(about.get("ensemble")), temperatures and f"t = {temperatures}", LEAVING.get(about.get("policy")))
    return [word for word in words if word]


def unusual_temperatures(about: Mapping[str, Any]) -> str | None:
    """Temperatures with which exits that were trained alone are added up, where they are not the paper's."""
    used = dict.fromkeys(about.get("temperatures", [])[1:])   # t_1 has nothing to reweight
    if about.get("ensemble") != "boost" or used.keys() <= {TEMPERATURE}:
        return None
    return "-".join(f"{t:.12g}" for t in (used if len(used) == 1 else about["temperatures"][1:]))


# What figures and tables need of an evaluation file.

def is_number(value: Any) -> bool:
    """Whether it is a number of a size that accuracies and costs can have."""
    return type(value) in (int, float) and 0 <= value < 1e30


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_list_of(check: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(check, value))


def has(fields: dict[str, Callable[[Any], bool]], value: Any) -> bool:
    return isinstance(value, dict) and all(key in value and check(value[key]) for key, check in fields.items())


POINT = {"budget": lambda x: x is None or is_number(x),
         **dict.fromkeys(("valid_mean_macs", "valid_top1", "test_mean_macs", "test_top1"), is_number)}
HEADER = {"format": lambda x: x == 1, "config": lambda x: isinstance(x, dict), "n_test": lambda x: type(x) is int and x > 0,
          "macs": partial(is_list_of, is_number), **dict.fromkeys(("name", "dataset", "method", "arch"), is_text)}
FIELDS = {"anytime": {**HEADER, "top1": partial(is_list_of, is_number)},
          "dynamic": {**HEADER, "family": lambda x: x in [*FAMILIES], "flat": lambda x: isinstance(x, bool),
                      "split_hash": lambda x: x is None or is_text(x), "points": partial(is_list_of, partial(has, POINT))}}

# How the exits were read. Files of an older version say nothing of it, and mean the usual way.
READING = {"ensemble": is_text, "policy": is_text, "temperatures": partial(is_list_of, is_number)}


def _fits(content: dict[str, Any]) -> bool:
    if "points" in content:
        key = FAMILIES[content["family"]].key
        return all(is_number(point.get(key)) for point in content["points"])
    return len(content["top1"]) == len(content["macs"])


def kind_of(path: Path) -> str:
    return "dynamic" if path.name.startswith("dynamic") else "anytime"


def read_file(path: Path) -> dict[str, Any]:
    """Content of an anytime or a budgeted file.

    Raises:
        UserError: when it is missing, incomplete or something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        content = None
    if not has(FIELDS[kind_of(path)], content) or not _fits(content):
        raise UserError(f"{path} is not a complete evaluation file; write it again with eval_cifar100.py")
    return content


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The anytime and budgeted files of a run; a name suffix given to the evaluation becomes part of the run's name.

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
        kind, content = kind_of(path), read_file(path)
        suffix = path.stem.removeprefix(kind).removeprefix("_flat")
        results.append({**{key: content[key] for key in FIELDS[kind]}, "name": content["name"] + suffix, "suffix": suffix,
                        **{key: content[key] for key, check in READING.items() if check(content.get(key))}})
    suffixed = any("points" not in result and result["suffix"] and "ensemble" not in result for result in results)
    return [result for result in results if not suffixed or "points" in result or result["suffix"]]
