"""The files that evaluation leaves in a run's folder: their names, and the kinds of curve in them.

`anytime*.json` hold the accuracy of every exit, `dynamic*.json` the points of a budgeted curve, `realtime*.json` measured times,
`reliability*.json` how far the confidence of every exit can be trusted.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from utils.core.tables import millions
from utils.options.catalog import ENSEMBLES, POLICIES, TEMPERATURE

RESULTS = "results.json"   # what training leaves


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
    "optimised": Family("budget", millions, "budget", "thresholds chosen for accuracy",
                        "thresholds with the largest held-out accuracy for each budget", "optimised thresholds"),
    "promise": Family("max_drop", "{:g}".format, "at most points lost", "the cheapest thresholds that keep a promise on accuracy",
                      "the cheapest thresholds that keep a promise on accuracy", "promised accuracy"),
    "patience": Family("patience", str, "patience", "patience (exits in a row with one answer)",
                       "one point per patience: exits in a row with one answer", ""),
}


CHOSEN = ("optimised", "promise")   # families in files of their own, beside those of the paper


def result_name(mode: str, header: Mapping[str, Any], save_suffix: str = "") -> str:
    """Name of an evaluation file, without its ending, so that one way to evaluate does not overwrite another's.

    Args:
        mode: "anytime", "dynamic", "realtime" or "reliability".
        header: content of the file, or as much of it as is not as usual: `flat`, `family`, `augmented_hold_out`, `calibration`,
            `ensemble` (with `temperatures`), `policy`.
        save_suffix: the user's own (--save_suffix).
    """
    policy, temperatures = header.get("policy"), unusual_temperatures(header)
    chosen = header.get("family") if header.get("family") in CHOSEN else None
    parts = ["flat" if header.get("flat") else None, chosen, "augmented" if header.get("augmented_hold_out") else None,
             "calibrated" if header.get("calibration") else None,
             header.get("ensemble"), f"t{temperatures}" if temperatures else None, policy if policy != "confidence" else None]
    return "_".join([mode, *filter(None, parts)]) + save_suffix


def describe(header: Mapping[str, Any]) -> str:
    """The method of a result file, with weights, ensemble and policy where they are not the usual ones (some files have none)."""
    how = reading_words(header)
    return f"{header['method']} ({', '.join(how)})" if how else header["method"]


def averaged_words(header: Mapping[str, Any]) -> str | None:
    """What a file's weights are, where they are an average over the steps of training (--ema)."""
    return f"averaged weights, decay {header['ema']:.12g}" if header.get("ema") else None


def reading_words(header: Mapping[str, Any]) -> list[str]:
    """What is not usual in a result file's weights, and in how its exits were read."""
    temperatures = unusual_temperatures(header)
    words = (averaged_words(header), ENSEMBLES.get(header.get("ensemble")), temperatures and f"t = {temperatures}",
             POLICIES.get(header.get("policy")), "calibrated" if header.get("calibration") else None)
    return [word for word in words if word]


def unusual_temperatures(header: Mapping[str, Any]) -> str | None:
    """Temperatures with which exits that were trained alone are added up, where they are not the paper's."""
    used = dict.fromkeys(header.get("temperatures", [])[1:])   # t_1 has nothing to reweight
    if header.get("ensemble") != "boost" or used.keys() <= {TEMPERATURE}:
        return None
    return "-".join(f"{t:.12g}" for t in (used if len(used) == 1 else header["temperatures"][1:]))
