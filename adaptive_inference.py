"""Adaptive inference: which input leaves at which exit, and what that costs on average.

Budgeted batch prediction (MSDNet, arXiv:1703.09844; BoostNet, arXiv:2211.16726, eq. 9) has three steps:

    p = solve_exit_rate(macs, budget=40e6)                                  # the exit rate that spends the budget
    thresholds = fit_thresholds(valid_confidence, exit_shares(p, n_exits))  # on the hold-out set, never on test data
    top1, mean_macs, exit_share = evaluate_thresholds(test_confidence, test_correct, thresholds, macs)

`confidence` is the largest softmax probability at every exit, (n_exits, N) float; `correct` says whether that exit's
prediction is right, (n_exits, N) bool; both may be NumPy arrays or torch tensors. Results are NumPy arrays and Python
floats. Costs are cumulative: entry k is what an input pays that leaves at exit k. `budget_curve` and `released_curve`
run the steps for a whole curve. All this looks at confidences that are there already; `EarlyExit` runs a network that stops:

    prediction, confidence, exit = EarlyExit(model, thresholds)(images)
"""
from collections.abc import Iterator, Sequence

import numpy as np

from utils.core.errors import UserError

__all__ = ["EarlyExit", "Exits", "budget_curve", "budget_grid", "combine_sizes", "curve_position", "evaluate_thresholds",  # noqa: F822
           "exit_index", "exit_shares", "fit_thresholds", "flatten", "mean_cost", "measure", "patience_curve", "released_curve",
           "released_sweep", "solve_exit_rate"]

BUDGET_TOLERANCE = 1e-9  # relative; for Newton's stop and for budgets a rounding error outside the reachable range
RELEASED_NONE_LEAVE = 1e8  # the released program's threshold that no confidence reaches; its negative lets everybody leave


def __getattr__(name: str):
    # EarlyExit and Exits need a network, and with it torch, which takes long to load; nothing else here does.
    if name not in ("EarlyExit", "Exits"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from utils.evaluation import early_exit
    return getattr(early_exit, name)


# Exit rates and shares of eq. 9

def mean_cost(p: float, cumulative_costs: Sequence[float]) -> float:
    """Average cost when a share p of the inputs that reach an exit leave there (BoostNet, eq. 9)."""
    cost_of_stage = np.diff(_check_costs(cumulative_costs), prepend=0.0)
    return float(cost_of_stage @ (1.0 - p) ** np.arange(cost_of_stage.size))


def solve_exit_rate(cumulative_costs: Sequence[float], budget: float, *, unit: str = "MACs") -> float:
    """The exit rate p of eq. 9 whose average cost is `budget`, by Newton-Raphson from p = 0.

    The average cost falls with p and is convex, so steps from p = 0 approach the solution from below and never pass it.

    Args:
        cumulative_costs: (n_exits,), positive, not falling.
        budget: average cost per input, in the same unit, between the costs of the first and of the last exit.
        unit: what the message of an error calls it.
    Returns:
        p in [0, 1]: 0 sends everything to the last exit, 1 stops everything at the first.
    Raises:
        UserError: the budget is not finite or cannot be reached.
    """
    costs = _check_costs(cumulative_costs)
    lowest, highest = float(costs[0]), float(costs[-1])
    if not lowest * (1 - BUDGET_TOLERANCE) <= budget <= highest * (1 + BUDGET_TOLERANCE):  # refuses NaN as well
        raise UserError(f"budget {budget:.10g} is out of range: this model spends {lowest:.10g} to {highest:.10g} {unit} "
                        "per image, the costs of its first and of its last exit")
    if budget <= lowest or lowest == highest:
        return 1.0
    cost_of_stage = np.diff(costs, prepend=0.0)
    power = np.arange(costs.size)
    p = 0.0
    for _ in range(1000):  # a few dozen steps suffice even when exits in between cost nothing
        reaching = (1.0 - p) ** power
        excess = float(cost_of_stage @ reaching) - budget
        if excess <= BUDGET_TOLERANCE * budget:
            return p
        slope = -float((cost_of_stage * power)[1:] @ reaching[:-1])
        p = min(p - excess / slope, 1.0)
    raise RuntimeError(f"no exit rate found for budget {budget!r} and costs {costs.tolist()}")


def exit_shares(p: float, n_exits: int) -> np.ndarray:
    """(n_exits,) shares of all inputs that leave at each exit for exit rate p (eq. 9); the last exit takes the rest."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"the exit rate must lie in [0, 1], got {p!r}")
    if n_exits < 1:
        raise ValueError(f"n_exits must be at least 1, got {n_exits}")
    reaching = (1.0 - p) ** np.arange(n_exits)
    shares = p * reaching
    shares[-1] = reaching[-1]
    return shares


def budget_grid(cumulative_costs: Sequence[float], n_budgets: int = 40) -> np.ndarray:
    """(n_budgets,) budgets evenly from the cost of the first exit to that of the last."""
    costs = _check_costs(cumulative_costs)
    return np.linspace(costs[0], costs[-1], n_budgets)


# Thresholds: fitted on the hold-out set, evaluated anywhere

def fit_thresholds(confidence, shares) -> np.ndarray:
    """Thresholds that make about `shares[k]` of the inputs leave at exit k.

    Exit by exit, the threshold is the confidence of the floor(share * N)-th most confident input that is still present,
    and every input at least that confident leaves; equally confident inputs leave together, so more than the quota may.

    Args:
        confidence: (n_exits, N) of the hold-out set.
        shares: (n_exits,), non-negative, sum 1.
    Returns:
        (n_exits,) in the type of `confidence`, so that comparisons with it are exact. +inf where no input leaves (quota
        0), -inf where everybody does: fewer inputs are left than the quota, and always at the last exit.
    """
    confidence = _check_confidence(confidence)
    n_exits, n_samples = confidence.shape
    shares = _to_numpy(shares).astype(np.float64)
    if shares.shape != (n_exits,):
        raise ValueError(f"shares must have one entry for each of the {n_exits} exits, got shape {shares.shape}")
    if not (np.all(shares >= 0) and abs(shares.sum() - 1.0) < 1e-5):
        raise ValueError(f"shares must be non-negative with sum 1, got {shares.tolist()}")
    # The small term forgives products such as 0.29 * 100 that fall just below the whole number they stand for.
    quotas = np.floor(shares * n_samples + 1e-9).astype(np.int64)
    return _fit_quotas(confidence, quotas, none_leave=np.inf, too_few_left=-np.inf)


def exit_index(confidence, thresholds) -> np.ndarray:
    """(N,) the exit every input leaves at: the first whose threshold its confidence reaches, else the last."""
    confidence, thresholds = _check_thresholds(confidence, thresholds)
    index = np.empty(confidence.shape[1], np.int64)
    for k, leaving in enumerate(_departures(confidence, thresholds)):
        index[leaving] = k
    return index


def evaluate_thresholds(confidence, correct, thresholds, cumulative_costs) -> tuple[float, float, np.ndarray]:
    """Accuracy in percent, mean cost per input, and (n_exits,) share of the inputs that leave at each exit."""
    confidence, thresholds = _check_thresholds(confidence, thresholds)
    correct = _check_correct(correct, confidence)
    costs = _check_costs(cumulative_costs, n_exits=len(thresholds))
    n_samples = confidence.shape[1]
    n_correct, counts = _count(confidence, correct, thresholds)
    return 100.0 * n_correct / n_samples, float(counts @ costs) / n_samples, counts / n_samples


def _fit_quotas(confidence: np.ndarray, quotas: Sequence[int], *, none_leave: float, too_few_left: float) -> np.ndarray:
    """Thresholds for the given number of inputs per exit; the last exit takes what is left, whatever its quota."""
    thresholds = np.full(len(confidence), none_leave, confidence.dtype)
    left = np.arange(confidence.shape[1])
    for k, quota in enumerate(quotas[:-1]):
        present = confidence[k].take(left)
        if quota > present.size:
            thresholds[k] = too_few_left
        elif quota > 0:
            rank = present.size - quota
            thresholds[k] = np.partition(present, rank)[rank]
        left = left.compress(present < thresholds[k])  # several times faster than indexing with the mask
    thresholds[-1] = -none_leave
    return thresholds


def _departures(confidence: np.ndarray, thresholds: np.ndarray) -> Iterator[np.ndarray]:
    """For each exit in turn, the indices of the inputs that leave there."""
    left = np.arange(confidence.shape[1])
    for k in range(len(confidence) - 1):
        stays = confidence[k].take(left) < thresholds[k]
        yield left.compress(~stays)
        left = left.compress(stays)
    yield left


def _count(confidence: np.ndarray, correct: np.ndarray, thresholds: np.ndarray) -> tuple[int, np.ndarray]:
    """Number of correct predictions and (n_exits,) numbers of inputs that leave at each exit."""
    n_correct, counts = 0, np.zeros(len(confidence), np.int64)
    for k, leaving in enumerate(_departures(confidence, thresholds)):
        n_correct += int(np.count_nonzero(correct[k].take(leaving)))
        counts[k] = leaving.size
    return n_correct, counts


# Curves: many budgets, several model sizes

def budget_curve(val_confidence, val_correct, test_confidence, test_correct, cumulative_costs, budgets=None, *,
                 flat: bool = False) -> list[dict]:
    """One point per budget with the shares of eq. 9, thresholds fitted on the hold-out set and measured on both sets.

    Args:
        budgets: average costs per input; default: 40 evenly between the first and the last exit.
        flat: repeat the previous point where a larger budget does not raise the hold-out accuracy (see `flatten`).
    Returns:
        dicts of plain numbers and lists in order of rising budget, with keys budget, p, shares, thresholds, valid_top1,
        valid_mean_macs, valid_exit_share, test_top1, test_mean_macs, test_exit_share.
    """
    val_confidence, test_confidence = _check_confidence(val_confidence), _check_confidence(test_confidence)
    costs = _check_costs(cumulative_costs)
    budgets = budget_grid(costs) if budgets is None else np.sort(np.asarray(budgets, np.float64).ravel())
    points = []
    for budget in budgets.tolist():
        p = solve_exit_rate(costs, budget)
        shares = exit_shares(p, costs.size)
        thresholds = fit_thresholds(val_confidence, shares)
        points.append({"budget": budget, "p": p, "shares": shares.tolist(), "thresholds": thresholds.tolist(),
                       **measure("valid", val_confidence, val_correct, thresholds, costs),
                       **measure("test", test_confidence, test_correct, thresholds, costs)})
    return flatten(points) if flat else points


def patience_curve(val_agreement, val_correct, test_agreement, test_correct, cumulative_costs) -> list[dict]:
    """One point per patience k = 1 ... n_exits: inputs leave where k exits in a row agree, the rest at the last exit.

    Args:
        val_agreement, test_agreement: (n_exits, N) number of exits in a row, up to this one, that give the same answer.
    Returns:
        dicts with keys patience, budget (None: it is no choice), valid_* and test_* as from `budget_curve`.
    """
    points = []
    for patience in range(1, len(val_agreement) + 1):
        thresholds = np.full(len(val_agreement), patience, np.float32)
        thresholds[-1] = -np.inf
        points.append({"patience": patience, "budget": None,
                       **measure("valid", val_agreement, val_correct, thresholds, cumulative_costs),
                       **measure("test", test_agreement, test_correct, thresholds, cumulative_costs)})
    return points


def flatten(points: Sequence[dict]) -> list[dict]:
    """The same budgets, but what does not raise the hold-out accuracy repeats the previous point, cost included."""
    flat = []
    for point in points:
        raised = not flat or point["valid_top1"] > flat[-1]["valid_top1"]
        flat.append(dict(point) if raised else {**flat[-1], "budget": point["budget"]})
    return flat


def combine_sizes(curves: Sequence[dict]) -> list[dict]:
    """One curve from several sizes of a model: at each budget the point of the size with the best hold-out accuracy.

    A point survives when no other size promises a higher hold-out accuracy at its budget; between its own points a size
    is interpolated, beyond its dearest point it stays level. Test accuracy plays no part in the choice.

    Args:
        curves: dicts with keys name, split_hash, family, flat, points, as written by the evaluation.
    Returns:
        the surviving points in order of rising budget, each with a further key `model`, the name of its curve.
    """
    for key, remedy in (("split_hash", "hold the same images out of training for all sizes"),
                        ("family", "evaluate all sizes with the same sweep"),
                        ("flat", "evaluate all sizes with or all without --flat_curve")):
        found = [curve[key] for curve in curves]
        if len(set(found)) > 1 or None in found:
            listing = ", ".join(f"{curve['name']}: {str(curve[key])[:12]}" for curve in curves)
            raise UserError(f"these runs differ in {key} and cannot be combined ({listing}); {remedy}")

    sizes = [sorted(curve["points"], key=curve_position) for curve in curves]
    axes = [([curve_position(point) for point in points], [point["valid_top1"] for point in points])
            for points in sizes]
    chosen = []
    for i, points in enumerate(sizes):
        for point in points:
            promises = [np.interp(curve_position(point), *axis, left=-np.inf) for axis in axes]
            mine = point["valid_top1"]
            # Of sizes with equal accuracy the one given first is taken.
            if not any(other > mine or (other == mine and j < i) for j, other in enumerate(promises) if j != i):
                chosen.append({**point, "model": curves[i]["name"]})
    return sorted(chosen, key=curve_position)


def curve_position(point: dict) -> float:
    """The budget of a point; the released sweep requests none, there it is what the hold-out set spent."""
    return point["valid_mean_macs"] if point["budget"] is None else point["budget"]


def measure(split: str, confidence, correct, thresholds, costs) -> dict:
    """What thresholds do to a set, as entries of a point of a curve; `split` ("valid" or "test") begins their names."""
    top1, mean_macs, exit_share = evaluate_thresholds(confidence, correct, thresholds, costs)
    return {f"{split}_top1": top1, f"{split}_mean_macs": mean_macs, f"{split}_exit_share": exit_share.tolist()}


# The released program's sweep: another family of shares, and float32 throughout

def released_sweep(val_confidence, val_correct, test_confidence, test_correct, cumulative_costs) -> list[dict]:
    """The 39 points of the released program, with its numbers: shares proportional to q^n for q = 1/20 ... 39/20.

    Unlike `fit_thresholds`, an exit whose quota exceeds the inputs left lets no input leave; thresholds are +-1e8 instead
    of +-inf; and confidences, shares, quotas and costs are float32, which decides quotas such as 0.95 * 1000.

    Returns:
        39 dicts: shares and thresholds (lists of n_exits floats), val_accuracy and test_accuracy (percent), mean_cost
        (of the test set), flat_test_accuracy (the test accuracy of the q with the best hold-out accuracy so far).
    """
    val_confidence = _check_confidence(val_confidence).astype(np.float32, copy=False)
    test_confidence = _check_confidence(test_confidence).astype(np.float32, copy=False)
    val_correct = _check_correct(val_correct, val_confidence)
    test_correct = _check_correct(test_correct, test_confidence)
    (n_exits, n_val), (n_test_exits, n_test) = val_confidence.shape, test_confidence.shape
    if n_exits != n_test_exits:
        raise ValueError(f"hold-out and test confidences disagree on the number of exits: {n_exits} and {n_test_exits}")
    costs = _check_costs(cumulative_costs, n_exits=n_exits).astype(np.float32)

    points = []
    best_val_accuracy, flat_test_accuracy = -1.0, 0.0
    for step in range(1, 40):
        shares = released_shares(step / 20, n_exits)
        quotas = np.floor(np.float32(n_val) * shares).astype(np.int64)
        thresholds = _fit_quotas(val_confidence, quotas, none_leave=RELEASED_NONE_LEAVE, too_few_left=RELEASED_NONE_LEAVE)
        n_val_correct, _ = _count(val_confidence, val_correct, thresholds)
        n_test_correct, test_counts = _count(test_confidence, test_correct, thresholds)
        val_accuracy, test_accuracy = 100.0 * n_val_correct / n_val, 100.0 * n_test_correct / n_test
        if val_accuracy > best_val_accuracy:
            best_val_accuracy, flat_test_accuracy = val_accuracy, test_accuracy
        cost_of_exit = test_counts.astype(np.float32) / np.float32(n_test) * costs
        points.append({"shares": shares.tolist(), "thresholds": thresholds.tolist(),
                       "val_accuracy": val_accuracy, "test_accuracy": test_accuracy,
                       "mean_cost": float(np.cumsum(cost_of_exit)[-1]),  # in sequence: the order decides the last place
                       "flat_test_accuracy": flat_test_accuracy})
    return points


def released_curve(val_confidence, val_correct, test_confidence, test_correct, cumulative_costs, *,
                   flat: bool = False) -> list[dict]:
    """The released sweep as points like those of `budget_curve`; `p` is q, and no budget was requested (None).

    With `flat` the accuracies stay those of the best q so far while the costs go on, as in the released files.
    """
    points, best = [], None
    for step, released in enumerate(
            released_sweep(val_confidence, val_correct, test_confidence, test_correct, cumulative_costs), start=1):
        thresholds = np.asarray(released["thresholds"], np.float32)
        point = {"budget": None, "p": step / 20, "shares": released["shares"], "thresholds": released["thresholds"],
                 **measure("valid", val_confidence, val_correct, thresholds, cumulative_costs),
                 **measure("test", test_confidence, test_correct, thresholds, cumulative_costs),
                 "test_mean_macs": released["mean_cost"]}
        if best is None or point["valid_top1"] > best["valid_top1"]:
            best = point
        points.append({**point, "valid_top1": best["valid_top1"], "test_top1": best["test_top1"]} if flat else point)
    return points


def released_shares(q: float, n_exits: int) -> np.ndarray:
    """(n_exits,) float32, q^n normalised.

    In torch, as the released program does it; the last place of its exponentials still depends on the processor.
    """
    import torch
    log_q = torch.log(torch.tensor([q], dtype=torch.float32))
    weights = torch.exp(log_q * torch.arange(1, n_exits + 1, dtype=torch.float32))
    return (weights / weights.sum()).numpy()


# Checks of what callers pass

def _to_numpy(values) -> np.ndarray:
    if hasattr(values, "detach"):   # a tensor; NumPy has no bfloat16
        values = values.detach().cpu()
        return (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    return np.asarray(values)


def _check_costs(cumulative_costs, n_exits: int | None = None) -> np.ndarray:
    costs = _to_numpy(cumulative_costs).astype(np.float64)
    if costs.ndim != 1 or costs.size == 0 or costs.size != (n_exits or costs.size):
        raise ValueError(f"costs must have {n_exits or 'at least 1'} entries, one per exit, got shape {costs.shape}")
    if not (np.isfinite(costs).all() and costs[0] > 0 and np.all(np.diff(costs) >= 0)):
        raise ValueError(f"costs must be cumulative: finite, positive and not falling, got {costs.tolist()}")
    return costs


def _check_confidence(confidence) -> np.ndarray:
    confidence = _to_numpy(confidence)
    if confidence.ndim != 2 or confidence.size == 0 or confidence.dtype.kind != "f":
        raise ValueError("confidence must be a non-empty (n_exits, N) array of floats, "
                         f"got {confidence.dtype} of shape {confidence.shape}")
    if not np.isfinite(confidence).all():
        raise UserError("confidence contains values that are not finite; did training diverge?")
    return confidence


def _check_correct(correct, confidence: np.ndarray) -> np.ndarray:
    correct = _to_numpy(correct)
    if correct.shape != confidence.shape or correct.dtype != np.bool_:
        raise ValueError(f"correct must be bool of the confidence's shape {confidence.shape}, "
                         f"got {correct.dtype} of shape {correct.shape}")
    return correct


def _check_thresholds(confidence, thresholds) -> tuple[np.ndarray, np.ndarray]:
    confidence, thresholds = _check_confidence(confidence), _to_numpy(thresholds)
    if thresholds.shape != (len(confidence),) or np.isnan(thresholds).any():
        raise ValueError(f"thresholds must be {len(confidence)} numbers, one for each exit, got {thresholds.tolist()}")
    return confidence, thresholds
