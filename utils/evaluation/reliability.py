"""How far the confidence of every exit can be trusted, and what a perfect one would reach. Pure NumPy.

Shapes: confidence (n_exits, N) float, correct (n_exits, N) bool, costs (n_exits,) cumulative. Equally confident inputs count
with their mean, so that the order of the inputs decides nothing.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

N_BINS = 15


def reliability(confidence: np.ndarray, correct: np.ndarray, details: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Measures of every exit, as entries of a result file.

    Args:
        details: log_likelihood (of the true class) and squares (sum of the squared probabilities), both (n_exits, N), as in
            `utils.evaluation.predict.Details`; without them there are no nll and no brier.
    Returns:
        (n_exits,) lists: ece, the expected calibration error, from 0 to 1; aurc, the mean over all coverages of the share of
        wrong answers among the most confident inputs; nll, the mean negative log-likelihood in nats; brier, the mean squared
        distance of the probabilities from the truth. And bins, for each exit the lists confidence, accuracy and share of
        `equal_mass_bins`.
    """
    ranked = [_ranked(*row) for row in zip(confidence, correct)]
    bins = [equal_mass_bins(*row) for row in ranked]
    found = {"ece": [float(share @ np.abs(accuracy - mean)) for mean, accuracy, share in bins],
             "aurc": [float(np.mean(np.cumsum(1 - hits) / np.arange(1, len(hits) + 1))) for _, hits in ranked]}
    if details:
        log_likelihood, squares = (details[name].astype(np.float64) for name in ("log_likelihood", "squares"))
        found["nll"] = (-log_likelihood.mean(axis=1)).tolist()
        found["brier"] = (1 - 2 * np.exp(log_likelihood) + squares).mean(axis=1).tolist()
    names = "confidence", "accuracy", "share"
    return found | {"bins": [dict(zip(names, (column.tolist() for column in row))) for row in bins]}


def equal_mass_bins(confidence: np.ndarray, hits: np.ndarray, n_bins: int = N_BINS) -> tuple[np.ndarray, ...]:
    """Mean confidence, accuracy and share of the inputs, (n_bins,), in bins of as equally many inputs as their number allows.

    With fewer inputs than bins each has one. Takes the inputs in order of confidence.
    """
    parts = [part for part in np.array_split(np.arange(len(hits)), n_bins) if part.size]
    mean, accuracy = (np.array([values[part].mean(dtype=np.float64) for part in parts]) for values in (confidence, hits))
    return mean, accuracy, np.array([part.size / len(hits) for part in parts])


def _ranked(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence in falling order, and hits in the same order; equally confident inputs have the mean of theirs."""
    order = np.argsort(-confidence, kind="stable")
    confidence, hits = confidence[order], correct[order].astype(np.float64)
    first = np.flatnonzero(np.append(True, confidence[1:] != confidence[:-1]))
    sizes = np.diff(np.append(first, len(hits)))
    return confidence, np.repeat(np.add.reduceat(hits, first) / sizes, sizes)


def ideal_score(correct: np.ndarray, costs: Sequence[float]) -> dict[str, Any]:
    """What early exit would reach if every input left at its first exit that is right, and at the first if none is.

    Returns:
        top1 (percent), mean_macs and exit_share: no score that tells certain answers from others does better at this cost.
    """
    exits = correct.argmax(axis=0)   # 0 where no exit is right
    share = np.bincount(exits, minlength=len(correct)) / correct.shape[1]
    return {"top1": 100 * float(correct.any(axis=0).mean()), "mean_macs": float(share @ np.asarray(costs, np.float64)),
            "exit_share": share.tolist()}
