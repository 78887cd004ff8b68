"""Exit thresholds chosen for accuracy: the best for a budget, and the cheapest that keep a promise. Pure NumPy.

Equation 9 of the paper spends a budget without looking at accuracy. Here the shares of the inputs that leave at every exit
are chosen so that accuracy on the hold-out is largest:

    shares = BestShares(confidence, correct, macs).at([40e6])[0]
    thresholds = fit_shares(confidence, shares)

    promise = certify(confidence, correct, macs, max_drop=1.0)         # at most one point below the whole network
    promise.thresholds, promise.mean_cost

Shapes: confidence (n_exits, N) float, correct (n_exits, N) bool, costs (n_exits,) cumulative, in any unit.

The best shares for a price per unit of cost are found one exit at a time, each exactly; the prices follow from a search for
the corners of the upper hull of accuracy over cost. Because cost is linear in the shares, two rows of shares may be mixed,
and the mixture costs what the mixture of their costs is. That is used twice: between two corners of the hull, and between
the optimised and the geometric shares.

Two things keep the fit from following the chance of some thousand images. What is maximised is not the number of correct
answers, but the sum of probabilities that the answer of the exit is right, by a logistic regression on the confidences of
all exits: this takes most of the noise out of the gain of going on. And the fit is moved towards the geometric shares of
equal cost, the more the less cross-fitting finds it better (`cross_fitted_trust`).
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adaptive_inference import budget_grid, exit_index, exit_shares, fit_thresholds, measure, solve_exit_rate

# Confidences this close to 0 or 1 count as equal in the regression: half precision cannot tell them apart either.
CLIP = 1e-3
RIDGE = 1.0   # of the regression, whose inputs have standard deviation 1
FOLDS = 5
N_COMPARED = 20   # budgets at which cross-fitting compares
N_CANDIDATES = 100   # steps from dear to cheap at which a promise is tested
# Corners of the hull are searched until neighbours cost this share of the whole range apart.
RESOLUTION, FOLD_RESOLUTION = 1 / 25, 1 / 12


# The best thresholds for a price

class Corner(NamedTuple):
    """A choice of thresholds: shares (n_exits,), their mean cost and value per input, and the ranks that define it."""

    cost: float
    value: float
    shares: np.ndarray
    ranks: tuple[int, ...]


class PriceSolver:
    """Finds thresholds with a large mean of value - price * cost.

    A threshold is held as a rank: the number of all inputs whose confidence at this exit reaches it. Only ranks at which no
    two equally confident inputs are separated are considered.

    Args:
        confidence: (n_exits, N).
        value: (n_exits, N), what an input is worth that leaves at an exit, such as 1 if the answer there is right.
        costs: (n_exits,), cumulative.
    """

    def __init__(self, confidence: np.ndarray, value: np.ndarray, costs: np.ndarray) -> None:
        self.n_exits, self.n_inputs = confidence.shape
        self.value, self.costs = value.astype(np.float32), np.asarray(costs, np.float64)
        self._order = np.argsort(-confidence, axis=1, kind="stable")
        self._needed_rank = np.empty(confidence.shape, np.int64)
        self._ranks = []
        for k, order in enumerate(self._order):
            ordered = confidence[k].take(order)
            last_of_equals = np.append(ordered[1:] != ordered[:-1], True)
            ranks = np.concatenate([[0], np.flatnonzero(last_of_equals) + 1])
            self._ranks.append(ranks)
            self._needed_rank[k, order] = np.repeat(ranks[1:], np.diff(ranks))

    def keep_all(self) -> tuple[int, ...]:
        """Everybody goes on to the last exit."""
        return (0,) * (self.n_exits - 1) + (self.n_inputs,)

    def leave_first(self) -> tuple[int, ...]:
        """Everybody leaves at the first exit."""
        return (self.n_inputs,) + self.keep_all()[1:]

    def solve(self, price: float, start: Sequence[int]) -> Corner:
        """Improve one exit after the other, from the last but one to the first, until no single one can be improved.

        Exit k alone is solved exactly: the inputs that arrive are sorted by confidence, and the sum of what they gain by
        leaving over going on under the present later thresholds is largest at the best rank.
        """
        ranks = list(start)
        net = self.value - (price * self.costs).astype(np.float32)[:, None]
        leaves = self._leaves(ranks)
        before = None
        while ranks != before:
            before = list(ranks)
            arrives = np.logical_and.accumulate(np.vstack([np.ones((1, self.n_inputs), bool), ~leaves[:-1]]))
            going_on = net[-1]
            for k in range(self.n_exits - 2, -1, -1):
                gain = ((net[k] - going_on) * arrives[k]).take(self._order[k])
                total = np.concatenate([[0.0], np.cumsum(gain, dtype=np.float64)]).take(self._ranks[k])
                best = int(total.argmax())
                # A gain within rounding of the present one is none: without this the search could go round in circles.
                present = int(np.searchsorted(self._ranks[k], ranks[k]))
                if total[best] > total[present] + 1e-7 * self.n_inputs:
                    ranks[k] = int(self._ranks[k][best])
                    leaves[k] = self._needed_rank[k] <= ranks[k]
                going_on = np.where(leaves[k], net[k], going_on)
        return self.corner(ranks)

    def corner(self, ranks: Sequence[int]) -> Corner:
        leaves = self._leaves(ranks)
        index = leaves.argmax(axis=0)
        shares = np.bincount(index, minlength=self.n_exits) / self.n_inputs
        value = float(self.value[index, np.arange(self.n_inputs)].mean(dtype=np.float64))
        return Corner(float(shares @ self.costs), value, shares, tuple(ranks))

    def _leaves(self, ranks: Sequence[int]) -> np.ndarray:
        leaves = self._needed_rank <= np.asarray(ranks)[:, None]
        leaves[-1] = True
        return leaves


def hull(solver: PriceSolver, resolution: float = RESOLUTION) -> list[Corner]:
    """Corners of the upper hull of value over cost, from the first exit alone to the best there is, however dear.

    Between two corners the price is tried at which both are worth the same; what does better lies between them and is a
    further corner (the dichotomic search of two-criteria optimisation). It ends where neighbours cost less than
    `resolution` of the whole range apart.
    """
    first = solver.corner(solver.leave_first())
    dearest = max((solver.solve(0.0, start) for start in (solver.keep_all(), first.ranks)), key=lambda c: c.value)
    narrow = resolution * (solver.costs[-1] - solver.costs[0])
    corners, pending = [first], [(first, dearest)]
    if dearest.cost <= first.cost or dearest.value <= first.value:
        return [first]
    while pending:
        low, high = pending.pop()
        middle = None
        if high.cost - low.cost > narrow:
            price = (high.value - low.value) / (high.cost - low.cost)
            # From the dearer side, where later exits are still in use and can be left; from the cheaper side it sticks.
            middle = solver.solve(price, high.ranks)
            above = middle.value - price * middle.cost - (low.value - price * low.cost)
            if above <= 1e-6 or not low.cost < middle.cost < high.cost:
                middle = None
        if middle is None:
            corners.append(high)
        else:
            pending += [(middle, high), (low, middle)]
    return _upper(corners)


def _upper(corners: Sequence[Corner]) -> list[Corner]:
    """Those corners, in order of rising cost, that no mixture of others beats."""
    upper: list[Corner] = []
    for corner in sorted(corners, key=lambda c: (c.cost, -c.value)):
        if upper and corner.value <= upper[-1].value:
            continue
        while len(upper) > 1 and _slope(upper[-2], upper[-1]) <= _slope(upper[-2], corner):
            upper.pop()
        upper.append(corner)
    return upper


def _slope(low: Corner, high: Corner) -> float:
    return (high.value - low.value) / (high.cost - low.cost)


def shares_on(corners: Sequence[Corner], budgets: np.ndarray) -> np.ndarray:
    """(n_budgets, n_exits) shares at mean costs, mixed of the two corners around them; beyond the last corner, its own."""
    axis = [corner.cost for corner in corners]
    return np.stack([np.interp(budgets, axis, column) for column in np.transpose([c.shares for c in corners])], axis=1)


# Shares for a budget

def probability_right(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """(n_exits, N) probability that each exit is right, by logistic regression on the logits of all exits' confidences.

    Fitted on the same inputs that it is given for.
    """
    clipped = np.clip(confidence.astype(np.float64), CLIP, 1 - CLIP)
    logits = np.log(clipped / (1 - clipped))
    logits -= logits.mean(axis=1, keepdims=True)
    features = np.vstack([np.ones(logits.shape[1]), logits / np.maximum(logits.std(axis=1, keepdims=True), 1e-9)])
    return np.stack([_sigmoid(_logistic_regression(features, right) @ features) for right in correct.astype(np.float64)])


def _logistic_regression(features: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Weights (n_features,) of the largest likelihood less a ridge, by Newton's method; the first feature is constant."""
    ridge = np.append(1e-6, np.full(len(features) - 1, RIDGE))
    weights = np.zeros(len(features))   # not those of another exit: from far away, Newton's steps run off
    for _ in range(50):
        probability = _sigmoid(weights @ features)
        curvature = (features * (probability * (1 - probability))) @ features.T + np.diag(ridge)
        step = np.linalg.solve(curvature, features @ (right - probability) - ridge * weights)
        weights = weights + step
        if abs(step).max() < 1e-4:
            break
    return weights


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def geometric_shares(costs: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """(n_budgets, n_exits) shares of eq. 9."""
    within = np.clip(budgets, costs[0], costs[-1])   # mean costs of mixtures may miss the ends in the last place
    return np.array([exit_shares(solve_exit_rate(costs, budget), len(costs)) for budget in within.tolist()])


class BestShares:
    """Shares for thresholds that make the most of each budget; what does not pay is not spent.

    Args:
        confidence, correct: of the hold-out.
        costs: (n_exits,), cumulative.
        seed: of the division that cross-fitting makes.
    Attributes:
        trust: how far the shares are from the geometric to the optimised ones, from 0 to 1.
        dearest: the mean cost beyond which nothing is gained.
    """

    def __init__(self, confidence: np.ndarray, correct: np.ndarray, costs: Sequence[float], *, seed: int = 0) -> None:
        self._costs = np.asarray(costs, np.float64)
        self._corners = _best_corners(confidence, correct, self._costs, RESOLUTION)
        self.dearest = self._corners[-1].cost
        self.trust = cross_fitted_trust(confidence, correct, self._costs, seed=seed)

    def at(self, budgets: Sequence[float]) -> np.ndarray:
        """(n_budgets, n_exits) shares for mean costs between those of the first and of the last exit."""
        best = shares_on(self._corners, np.asarray(budgets, np.float64))
        return self.trust * best + (1 - self.trust) * geometric_shares(self._costs, best @ self._costs)


def cross_fitted_trust(confidence: np.ndarray, correct: np.ndarray, costs: np.ndarray, *, seed: int = 0) -> float:
    """How far to go from the geometric shares to the optimised ones, from 0 to 1.

    Both are fitted on four fifths of the hold-out and compared on the fifth that is left, at equal costs and averaged over
    budgets. With G the mean gain in accuracy and E its standard error, the result is 1 - (E / G)^2 / 2, and 0 where that or
    G is negative.
    """
    n_inputs = confidence.shape[1]
    if n_inputs < FOLDS:
        return 0.0
    budgets = np.linspace(costs[0], costs[-1], N_COMPARED)
    gain = np.zeros(n_inputs)
    for left_out in np.array_split(np.random.default_rng(seed).permutation(n_inputs), FOLDS):
        rest = np.ones(n_inputs, bool)
        rest[left_out] = False
        known, new, right = confidence[:, rest], confidence[:, left_out], correct[:, left_out]
        best = shares_on(_best_corners(known, correct[:, rest], costs, FOLD_RESOLUTION), budgets)
        for sign, rows in ((1, best), (-1, geometric_shares(costs, best @ costs))):
            for shares in rows:
                index = exit_index(new, fit_shares(known, shares))
                gain[left_out] += sign * right[index, np.arange(len(left_out))]
    gain /= len(budgets)
    mean, squared_error = gain.mean(), gain.var() / n_inputs
    return float(max(0.0, 1 - squared_error / mean ** 2 / 2)) if mean > 0 else 0.0


def _best_corners(confidence: np.ndarray, correct: np.ndarray, costs: np.ndarray, resolution: float) -> list[Corner]:
    return hull(PriceSolver(confidence, probability_right(confidence, correct), costs), resolution)


def fit_shares(confidence: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Thresholds for shares as they come out of the optimisation; where no input is left over, all leave.

    Unlike with the shares of eq. 9, later exits may be out of use: a new input less confident than all of the hold-out must
    not go on to them.
    """
    shares = shares / shares.sum()   # a mixture may miss 1 in the last place
    thresholds = fit_thresholds(confidence, shares)
    thresholds[np.cumsum(shares) > 1 - 0.5 / confidence.shape[1]] = -np.inf
    return thresholds


def optimised_thresholds(confidence: np.ndarray, correct: np.ndarray, costs: Sequence[float], budgets: Sequence[float],
                         ) -> list[np.ndarray]:
    """(n_exits,) thresholds for each budget."""
    return [fit_shares(confidence, shares) for shares in BestShares(confidence, correct, costs).at(budgets)]


# Curves

N_RESAMPLES = 10_000   # of the bootstrap
ABOVE = 0.4            # share of the whole network's cost above which a curve is summed up


def optimised_curve(val_confidence: np.ndarray, val_correct: np.ndarray, test_confidence: np.ndarray, test_correct: np.ndarray,
                    costs: Sequence[float], budgets: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """One point per budget as from `adaptive_inference.budget_curve`, with two entries in place of the exit rate p.

    These are `test_gain`, by how many points more of the test set are right than with the thresholds of eq. 9 for the same
    budget, and `test_gain_interval`, its 95 % interval by a paired bootstrap over test images.
    """
    budgets = budget_grid(costs) if budgets is None else np.sort(np.asarray(budgets, np.float64).ravel())
    rows = BestShares(val_confidence, val_correct, costs).at(budgets)
    points = []
    for budget, shares, geometric in zip(budgets.tolist(), rows, geometric_shares(np.asarray(costs, np.float64), budgets)):
        thresholds = fit_shares(val_confidence, shares)
        gain, interval = _paired_gain(test_confidence, test_correct, thresholds, fit_thresholds(val_confidence, geometric))
        points.append({"budget": budget, "shares": shares.tolist(), "thresholds": thresholds.tolist(),
                       **measure("valid", val_confidence, val_correct, thresholds, costs),
                       **measure("test", test_confidence, test_correct, thresholds, costs),
                       "test_gain": gain, "test_gain_interval": interval})
    return points


def _paired_gain(confidence: np.ndarray, correct: np.ndarray, thresholds: np.ndarray, others: np.ndarray,
                 ) -> tuple[float, list[float]]:
    """Points of accuracy that `thresholds` are above `others`, and the 95 % interval."""
    inputs = np.arange(confidence.shape[1])
    right, right_by_others = (correct[exit_index(confidence, each), inputs] for each in (thresholds, others))
    won, lost = int(np.sum(right & ~right_by_others)), int(np.sum(right_by_others & ~right))
    # Resampling inputs is drawing how many of them are won, lost and neither.
    share = np.array([won, lost, inputs.size - won - lost]) / inputs.size
    drawn = np.random.default_rng(0).multinomial(inputs.size, share, size=N_RESAMPLES)
    interval = np.quantile(100 * (drawn[:, 0] - drawn[:, 1]) / inputs.size, [0.025, 0.975])
    return 100 * (won - lost) / inputs.size, interval.tolist()


def describe_gain(points: Sequence[dict[str, Any]], costs: Sequence[float]) -> str:
    """One line on how an optimised curve compares with that of eq. 9."""
    high = [point for point in points if point["budget"] > ABOVE * costs[-1]] or points
    gains = [point["test_gain"] for point in high]
    above = sum(point["test_gain_interval"][0] > 0 for point in high)
    below = sum(point["test_gain_interval"][1] < 0 for point in high)
    where = f"of {len(high)} budgets" + (f" above {100 * ABOVE:.0f} % of the MACs" if len(high) < len(points) else "")
    return (f"Over eq. 9 at the same budget: {np.mean(gains):+.2f} points of test accuracy on average {where} (from "
            f"{min(gains):+.2f} to {max(gains):+.2f}); the 95 % interval lies above 0 at {above} of them, below 0 at {below}")


# A promise on accuracy

class Promise(NamedTuple):
    """Thresholds whose accuracy lies at most `max_drop` points below the whole network's, with probability `level`.

    Attributes:
        thresholds: (n_exits,), fitted on the first part of the hold-out.
        certified: False where no early exit could be certified: the thresholds are then those of the whole network.
        max_drop: in points of accuracy.
        level: probability over the draw of the hold-out.
        n_fit, n_tested: sizes of the two parts.
        drop: of the second part, in points, as it was observed.
        mean_cost: of the second part, per input.
    """

    thresholds: np.ndarray
    certified: bool
    max_drop: float
    level: float
    n_fit: int
    n_tested: int
    drop: float
    mean_cost: float


def divide(n_inputs: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the held-out images on which everything is fitted, and of those on which a promise is tested; shuffled."""
    order = np.random.default_rng(seed).permutation(n_inputs)
    return order[:n_inputs // 2], order[n_inputs // 2:]


def certify(confidence: np.ndarray, correct: np.ndarray, costs: Sequence[float], max_drop: float, level: float = 0.95, *,
            seed: int = 0) -> Promise:
    """The cheapest thresholds that certainly enough lose at most `max_drop` points of the whole network's accuracy.

    Learn, then test, in a fixed sequence (Angelopoulos et al., arXiv:2110.01052; for early exits Jazbec et al.,
    arXiv:2405.20915): a first half of the hold-out gives thresholds for falling budgets, the second half tests one after
    the other whether they lose too much, and the first that cannot be certified ends the search. So the probability that
    any of those passed loses more than `max_drop` is at most 1 - level, however many there are.

    Args:
        confidence, correct: of the hold-out; images like those that will come. What was fitted or chosen before may have seen
            the first part of `divide` alone.
        max_drop: in points of accuracy, above 0.
        level: between 0 and 1.
        seed: of the division and of the order of the test.
    """
    costs = np.asarray(costs, np.float64)
    fitted, tested = divide(confidence.shape[1], seed=seed)
    known, known_right = confidence[:, fitted], correct[:, fitted]
    new, new_right = confidence[:, tested], correct[:, tested]
    whole = np.append(np.full(len(costs) - 1, np.inf), -np.inf).astype(confidence.dtype)
    passed = whole
    best = BestShares(known, known_right, costs, seed=seed)
    for shares in best.at(np.linspace(best.dearest, costs[0], N_CANDIDATES)):
        thresholds = fit_shares(known, shares)
        spread = np.mean(_losses(known, known_right, thresholds) ** 2)
        if not is_below(_losses(new, new_right, thresholds), max_drop / 100, level, spread):
            break
        passed = thresholds
    mean_cost = costs[exit_index(new, passed)].mean()
    drop = 100 * _losses(new, new_right, passed).mean()
    return Promise(passed, passed is not whole, max_drop, level, fitted.size, tested.size, float(drop), float(mean_cost))


def promise_entries(found: Promise) -> dict[str, Any]:
    """What a point of a result file says of a promise; `budget` is what the second part of the hold-out spends per input."""
    return {"budget": found.mean_cost, "max_drop": found.max_drop, "confidence_level": found.level, "certified": found.certified,
            "n_fit": found.n_fit, "n_tested": found.n_tested, "valid_drop": found.drop}


def promise_point(val_confidence: np.ndarray, val_correct: np.ndarray, test_confidence: np.ndarray, test_correct: np.ndarray,
                  costs: Sequence[float], max_drop: float, level: float) -> dict[str, Any]:
    """A promise as the point of a curve."""
    found = certify(val_confidence, val_correct, costs, max_drop, level)
    return {**promise_entries(found), "thresholds": found.thresholds.tolist(),
            **measure("valid", val_confidence, val_correct, found.thresholds, costs),
            **measure("test", test_confidence, test_correct, found.thresholds, costs)}


def describe_promise(point: dict[str, Any], *, chosen_on_hold_out: bool) -> str:
    """What a promise says and what it rests on, and what is wrong where the held-out images chose the checkpoint."""
    if point["certified"]:
        text = (f"With probability {point['confidence_level']:g} over the draw of the held-out images, accuracy lies at most "
                f"{point['max_drop']:g} points below the whole network's on new images like the held-out ones (fitted on "
                f"{point['n_fit']} of them, tested on {point['n_tested']})")
    else:
        text = (f"No early exit could be certified to lose at most {point['max_drop']:g} points with {point['n_tested']} "
                "held-out images: these are the thresholds of the whole network")
    if chosen_on_hold_out:
        text += ("\nwarning: this epoch was chosen on the held-out images, which are therefore no longer like new ones: the "
                 "probability is not guaranteed; model_latest.pth does not have that flaw")
    return text


def _losses(confidence: np.ndarray, correct: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(N,) 1 where only the whole network is right, -1 where only the exit taken is, else 0."""
    taken = correct[exit_index(confidence, thresholds), np.arange(confidence.shape[1])]
    return correct[-1].astype(np.int64) - taken


def is_below(losses: np.ndarray, bound: float, level: float, spread: float) -> bool:
    """Whether losses in [-1, 1] have a mean below `bound`, an error with probability at most 1 - level.

    A bound by betting (Waudby-Smith and Ramdas, arXiv:2010.09686): whoever stakes a constant share of his wealth on every
    next loss being below `bound` does not grow rich on average if the mean is not below; that his wealth ever reaches
    1 / (1 - level) then has at most probability 1 - level (Ville). Holds for any number of losses.

    Args:
        losses: in a random order.
        spread: guess of the mean of their squares, from other data; sets the stake, and a wrong guess costs power only.
    """
    target = np.log(1 / (1 - level))
    stake = np.sqrt(2 * target / (losses.size * max(spread, 1 / losses.size)))   # best where the bound is just reached
    stake = min(stake, 0.9 / (1 - bound))   # a loss of 1 must not take everything
    return bool(np.cumsum(np.log1p(stake * (bound - losses))).max() >= target)
