"""Which number, held against a threshold, tells certain answers from others best. Pure NumPy, on published arrays."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adaptive_inference import budget_grid, evaluate_thresholds
from utils.evaluation.published import Arrays
from utils.evaluation.thresholds import ABOVE, BestShares, fit_shares, geometric_shares


class Gain(NamedTuple):
    """Points of test accuracy of a score above confidence at the same budget: mean, smallest and largest over budgets."""

    mean: float
    smallest: float
    largest: float


def scores_of(arrays: Arrays) -> dict[str, np.ndarray]:
    """(n_exits, N) numbers that grow with certainty, by name; confidence first."""
    confidence, details = arrays.confidence.astype(np.float64), arrays.details   # float32 has no room for whole numbers beside it
    in_a_row = agreement(details["prediction"])
    agrees = np.append(np.ones((1, confidence.shape[1]), bool), in_a_row[1:] > 1, axis=0)
    return {"confidence": arrays.confidence, "margin": details["margin"], "entropy": -details["entropy"],
            # Between 0 and 1, confidence decides only among inputs that agree equally.
            "agreement with the exit before, then confidence": confidence + agrees,
            "exits in a row that agree, then confidence": confidence + in_a_row}


def agreement(prediction: np.ndarray) -> np.ndarray:
    """(n_exits, N) numbers of exits in a row, up to each, with the same prediction."""
    in_a_row = np.ones(prediction.shape, np.float32)
    for n in range(1, len(prediction)):
        in_a_row[n] = np.where(prediction[n] == prediction[n - 1], in_a_row[n - 1] + 1, 1)
    return in_a_row


def compare_scores(valid: Arrays, test: Arrays, costs: Sequence[float]) -> dict[str, dict[str, Gain]]:
    """What each score gains over confidence with thresholds fitted on the hold-out, by name and kind of thresholds.

    Of 40 budgets those above 40 % of the whole network's cost are compared: the accuracy that a curve reaches with a mean
    cost on the test set of at most the budget.
    """
    costs = np.asarray(costs, np.float64)
    budgets = budget_grid(costs)
    high = budgets[budgets > ABOVE * costs[-1]]
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, (held_out, new) in _pairs(scores_of(valid), scores_of(test)).items():
        rows = {"geometric": geometric_shares(costs, budgets),
                "optimised": BestShares(held_out, valid.correct, costs).at(budgets)}
        found[name] = {kind: _accuracy(held_out, new, test.correct, costs, shares, high) for kind, shares in rows.items()}
    return {name: {kind: _gain(curve - found["confidence"][kind]) for kind, curve in curves.items()}
            for name, curves in found.items()}


def _pairs(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: (values, other[name]) for name, values in one.items()}


def _accuracy(held_out: np.ndarray, new: np.ndarray, correct: np.ndarray, costs: np.ndarray, rows: np.ndarray,
              budgets: np.ndarray) -> np.ndarray:
    """Test accuracy at mean costs, interpolated between the points of a curve and level beyond its last."""
    points = {}
    for shares in rows:
        accuracy, cost, _ = evaluate_thresholds(new, correct, fit_shares(held_out, shares), costs)
        points[cost] = accuracy
    axis = sorted(points)
    return np.interp(budgets, axis, [points[cost] for cost in axis])


def _gain(differences: np.ndarray) -> Gain:
    return Gain(float(differences.mean()), float(differences.min()), float(differences.max()))
