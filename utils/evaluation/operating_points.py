"""Exit thresholds of a trained network: fitted for a budget on its hold-out, or as an evaluation left them in the run folder."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_inference import exit_shares, fit_thresholds, solve_exit_rate
from utils.core.errors import UserError
from utils.core.files import misfit, read_json
from utils.core.log import echo
from utils.core.tables import millions
from utils.evaluation.drift import ExitMonitor
from utils.evaluation.predict import Predictions
from utils.evaluation.thresholds import optimised_thresholds
from utils.options.catalog import THRESHOLDS
from utils.runs.checkpoint import hash_weights
from utils.runs.result_files import result_name

logger = logging.getLogger("boostnet")

# Budgets where none are asked for, as shares of the way from the cost of the first exit to that of the last.
DEFAULT_BUDGETS = (0.1, 0.275, 0.45, 0.625, 0.8)
# What is read of a stored point.
POINT = {"budget": float, "test_top1": float, "thresholds": [float]}

# What kind of thresholds the points of each family have.
NAMES = {**{family: name for name, family in THRESHOLDS.items()}, "promise": "promise"}

# A hold-out mean cost further than this from its budget is pointed out.
MISSED_BUDGET = 0.005

# Published arrays name the type of their confidences; older ones, in half precision, do not.
CONFIDENCE_TYPE = "float32"


def require_hold_out(data) -> None:
    """Raise UserError where there are no images to fit thresholds or choose a patience on."""
    if not data.n_valid:
        raise UserError("operating points are chosen on held-out training images, and this checkpoint knows of none; train with "
                        "--use-valid, or, for weights of another program, let --use-valid draw them")


def between(costs: Sequence[float], fraction: float) -> float:
    """The budget at a share of the way from the cost of the first exit to that of the last."""
    return costs[0] + fraction * (costs[-1] - costs[0])


def check(costs: Sequence[float], budget: float, cost: str = "macs") -> None:
    """Raise UserError for a budget that a network with these cumulative costs cannot spend on average."""
    solve_exit_rate(costs, budget, unit="ms" if cost == "latency" else "MACs")


def fit(confidence, costs: Sequence[float], budget: float) -> np.ndarray:
    """Thresholds that spend `budget` on average on inputs like those of `confidence` (n_exits, N) (eq. 9)."""
    return fit_thresholds(confidence, exit_shares(solve_exit_rate(costs, budget), len(costs)))


def fit_all(valid: Predictions, costs: Sequence[float], budgets: Sequence[float], thresholds: str = "geometric",
            ) -> list[np.ndarray]:
    """Thresholds for each budget, as --thresholds says."""
    if thresholds == "optimised":
        return optimised_thresholds(valid.confidence.numpy(), valid.correct.numpy(), costs, budgets)
    return [fit(valid.confidence, costs, budget) for budget in budgets]


def finite(thresholds: Sequence[float]) -> list[float]:
    """Thresholds for JSON, which has no infinity: confidences lie in [0, 1], so 2 keeps everybody and -1 lets everybody go."""
    return [float(min(max(t, -1.0), 2.0)) for t in thresholds]


def warn_of_missed_budgets(points: Sequence[dict[str, Any]], n_valid: int) -> None:
    """Print which budgets the thresholds do not meet on the hold-out that they were fitted on.

    Args:
        points: of `budget_curve` as they were fitted: a flat curve spends less than its budget on purpose.
        n_valid: number of images held out.
    """
    misses = {point["budget"]: point["valid_mean_macs"] / point["budget"] - 1 for point in points}
    missed = [f"{millions(budget)} ({100 * miss:+.1f} %)" for budget, miss in misses.items() if abs(miss) > MISSED_BUDGET]
    if missed:
        echo(f"warning: thresholds from {n_valid} held-out images do not meet these budgets more closely: {', '.join(missed)}")


def stored_curve(folder: Path, saved: dict[str, Any], suffix: str = "", *, temperatures: Sequence[float] | None = None,
                 ensemble: str | None = None, policy: str = "confidence", family: str = "eq9",
                 calibrated: bool = False) -> dict[str, Any] | None:
    """What `--evalmode dynamic` wrote of the thresholds of this very checkpoint; None where there is nothing.

    Thresholds that were fitted where half precision had made confidences equal are not taken, and the log says so.

    Args:
        folder: of the evaluation's results.
        saved: content of the checkpoint.
        suffix: appended to the file's name.
        temperatures: of the network that reads the exits, where not those of the checkpoint.
        ensemble, policy: how the exits are read, as from `reading.read_exits`.
        family: of the points, one of "eq9", "optimised" and "promise".
        calibrated: whether they are of calibrated confidences; `calibration` in the result then holds the temperatures.
    """
    read = {"temperatures": list(temperatures or saved.get("temperatures") or []), "ensemble": ensemble, "policy": policy}
    path = folder / f"{result_name('dynamic', {**read, 'family': family, 'calibration': calibrated}, suffix)}.json"
    try:
        curve = read_json(path, {"macs": [float], "points": list})
    except (FileNotFoundError, NotADirectoryError):
        return None
    split = saved.get("split")
    trained = {"method": saved.get("method"), "config": saved.get("architecture")}
    weights = curve.get("weights_hash")   # older files have none
    same = (weights in (None, hash_weights(saved["state_dict"])) and curve.get("epoch") == saved.get("epoch")
            and all(curve.get(name, how) == how for name, how in read.items())
            and all(how is None or curve.get(name) == how for name, how in trained.items())
            and curve.get("split_hash") == (split["hash"] if split else None))
    calibration = curve.get("calibration")
    if not same or bool(calibration) != calibrated or curve.get("family") != family or curve.get("flat"):
        return None
    problem = misfit(curve["points"], [POINT], "points")
    if not problem and any(len(point["thresholds"]) != len(curve["macs"]) for point in curve["points"]):
        problem = "a point has not one threshold for each exit"
    if calibrated and (misfit(calibration, [float]) or len(calibration) != len(curve["macs"]) or min(calibration) <= 0):
        problem = "calibration is not one temperature for each exit"
    if problem:
        raise UserError(f"{path} is damaged ({problem}); evaluate with --evalmode dynamic again")
    if is_of_half_precision(curve) and any(1.0 in point["thresholds"] for point in curve["points"]):
        logger.warning("%s is not used: its thresholds were fitted on confidences in half precision, where all above 1 - 2^-12 "
                       "are equal; publish the checkpoint again", path)
        return None
    return curve


def hold_out_exits(curve: dict[str, Any]) -> dict[str, Any] | None:
    """Number of held-out images of a stored curve, and (n_points, n_exits) shares of them that leave at each exit.

    None where the file does not say.
    """
    n_images, shares = curve.get("n_valid"), [point.get("valid_exit_share") for point in curve["points"]]
    if misfit([n_images], [int]) or misfit(shares, [[float]]):
        return None
    if any(len(share) != len(curve["macs"]) or abs(sum(share) - 1) > 1e-6 for share in shares):
        return None
    return {"n_images": n_images, "exit_share": shares}


def monitor(curve: dict[str, Any], i: int) -> ExitMonitor | None:
    """Counts where inputs leave under the thresholds of point i; None where the file does not say where the hold-out left."""
    found = hold_out_exits(curve)
    if not found:
        return None
    return ExitMonitor(found["exit_share"][i], found["n_images"], curve["macs"], thresholds=NAMES[curve["family"]])


def is_of_half_precision(header: dict[str, Any]) -> bool:
    """Whether published arrays, or a curve drawn from them, have confidences that were rounded to half precision."""
    return header.get("precision") == "half" and header.get("confidence_type") != CONFIDENCE_TYPE


def choose(points: Sequence[dict[str, Any]], costs: Sequence[float], budget: float | None) -> dict[str, Any] | None:
    """The point of the largest budget not above `budget`; without one, the point nearest to half of what the exits span.

    None where there is no such point.
    """
    if budget is None:
        return min(points, key=lambda point: abs(point["budget"] - between(costs, 0.5)), default=None)
    within = [point for point in points if point["budget"] <= budget * (1 + 1e-9)]   # a budget is typed in decimals
    return max(within, key=lambda point: point["budget"], default=None)
