"""Temperatures that make the confidence of every exit honest (temperature scaling, Guo et al., arXiv:1706.04599).

One temperature per exit, chosen by likelihood on the hold-out, divides F_n for the confidence only. F_n itself is carried on to
the next exit as it is, and no answer changes.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.evaluation.confidence import Measure
from utils.evaluation.predict import PART, Outputs, Predictions, collect, predict, read
from utils.evaluation.thresholds import divide

LOWEST, HIGHEST = 0.05, 20.0   # temperatures beyond which there is nothing to find: all right, or nothing known


def predict_hold_out(model: nn.Module, batches, measure: Measure, *, calibrate: bool = False,
                     promise: bool = False) -> tuple[Predictions, list[float] | None]:
    """Predictions for the hold-out, and the temperatures that were fitted to it and are in them; None without.

    Args:
        promise: fit them to the part of the hold-out alone on which a promise is not tested.
    """
    if not calibrate:
        return predict(model, batches, measure), None
    outputs = collect(model, batches)
    fitted = outputs
    if promise:
        part = torch.from_numpy(divide(len(outputs.labels))[0])
        fitted = Outputs(outputs.logits[:, part], outputs.labels[part])
    calibration = fit_temperatures(fitted)
    return read(outputs, measure, calibration=calibration), calibration


def stated(calibration: list[float] | None) -> dict[str, list[float]]:
    """What a result file says of temperatures; nothing where there are none, as before there was a choice."""
    return {"calibration": calibration} if calibration else {}


def fit_temperatures(outputs: Outputs) -> list[float]:
    """(n_exits,) temperatures of the largest likelihood of the labels."""
    return [_fit(logits, outputs.labels) for logits in outputs.logits]


def _fit(logits: Tensor, labels: Tensor) -> float:
    """The temperature for logits (N, C), by Newton's method on its inverse, in which the likelihood is concave."""
    low, high, inverse = 1 / HIGHEST, 1 / LOWEST, 1.0
    for _ in range(100):
        slope, curvature = _derivatives(logits, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        after = inverse - slope / curvature if curvature > 0 else 0.0
        if not low < after < high:
            after = (low * high) ** 0.5
        if abs(after - inverse) <= 1e-6 * inverse:
            break
        inverse = after
    return 1 / inverse


def _derivatives(logits: Tensor, labels: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean negative log-likelihood with respect to the inverse temperature."""
    slope = curvature = 0.0
    for part, known in zip(logits.split(PART), labels.split(PART)):
        part = part.double()
        probabilities = (inverse * part).softmax(dim=1)
        mean = (probabilities * part).sum(dim=1)
        slope += float((mean - part.gather(1, known[:, None])[:, 0]).sum())
        curvature += float((probabilities * (part - mean[:, None]).square()).sum())
    return slope / len(labels), curvature / len(labels)
