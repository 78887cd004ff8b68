"""Whether inputs in use leave at the exits where the held-out images left: the only sign without labels that a budget, or a
promise on accuracy, no longer holds. Neither PyTorch nor NumPy is needed.

    monitor = ExitMonitor(point["valid_exit_share"], n_held_out=5000, costs=macs)   # a point of dynamic.json
    predict = EarlyExit(model, point["thresholds"], monitor=monitor)
    ...
    print(predict.summary())
"""
from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from utils.core.errors import UserError

logger = logging.getLogger("boostnet")

# How narrow the shares of a changed stream may lie around those of the hold-out, in numbers of images that would tell as much.
CONCENTRATIONS = (10, 100, 1000)


class Summary(NamedTuple):
    """Where the inputs so far have left, beside the held-out images.

    Attributes:
        thresholds: what kind they are, "geometric", "optimised" or "promise"; "" where that was not given.
        n_images: inputs so far.
        exit_share, mean_cost: of these inputs; the cost is None where the costs of the exits were not given.
        held_out_share, held_out_cost: of the held-out images.
        p_value: at most this is the probability of shares that differ as much at any time, if the inputs are like the
            held-out images.
        differs: whether the p-value has fallen below the monitor's level.
    """

    thresholds: str
    n_images: int
    exit_share: list[float]
    mean_cost: float | None
    held_out_share: list[float]
    held_out_cost: float | None
    p_value: float
    differs: bool

    def __str__(self) -> str:
        def row(name: str, share: Sequence[float], cost: float | None) -> str:
            spent = "" if cost is None else f", mean cost {cost:.4g}"
            return f"{name} {' '.join(f'{100 * part:.1f}' for part in share)} % at exits 1 to {len(share)}{spent}"

        kind = f" with {self.thresholds} thresholds" if self.thresholds else ""
        verdict = "differ beyond chance" if self.differs else "do not differ beyond chance"
        return "\n".join([f"{self.n_images:,} images{kind}", row("so far  ", self.exit_share, self.mean_cost),
                          row("hold-out", self.held_out_share, self.held_out_cost), f"{verdict} (p = {self.p_value:.2g})"])


class ExitMonitor:
    """Counts at which exits inputs leave, and holds the counts against those of the hold-out.

    `EarlyExit` and `OnnxEarlyExit` count into the monitor that they are given. Inputs that a cost limit or a deadline cuts
    short count as leaving at the exit they have reached, and tell nothing about the exits beyond.

    Args:
        held_out_share: (n_exits,) share of the held-out images that leave at each exit under these thresholds.
        n_held_out: number of held-out images.
        costs: (n_exits,) cumulative cost of every exit, in any unit.
        thresholds: what kind the thresholds are, for the summary.
        level: probability of a false warning, however often `summary` is called.
    Raises:
        ValueError: for shares that are none, or not one cost per exit.
    """

    def __init__(self, held_out_share: Sequence[float], n_held_out: int, costs: Sequence[float] | None = None, *,
                 thresholds: str = "", level: float = 0.01) -> None:
        share = [float(part) for part in held_out_share]
        if not (share and min(share) >= 0 and abs(sum(share) - 1) < 1e-4) or n_held_out < 1:
            raise ValueError(f"held_out_share must be shares with sum 1 of at least 1 image, got {share} of {n_held_out}")
        if costs is not None and len(costs) != len(share):
            raise ValueError(f"costs must be {len(share)} numbers, one for each exit, got {list(costs)}")
        self.held_out_share, self.n_held_out, self.thresholds, self.level = share, n_held_out, thresholds, level
        self.costs = None if costs is None else [float(cost) for cost in costs]
        self._counts = [round(part * n_held_out) for part in share]
        self._lock = threading.Lock()
        self.reset()

    @classmethod
    def of_export(cls, header: Mapping[str, Any], i: int) -> ExitMonitor:
        """For the thresholds of `header["budgets"][i]`, where `header` is the content of a model.json.

        Raises:
            ValueError: where the file does not say at which exits the held-out images left, as older ones do not.
        """
        held_out = header.get("hold_out")
        if not held_out:
            raise ValueError("this model.json does not say where the held-out images left; export the network again")
        return cls(held_out["exit_share"][i], held_out["n_images"], header["macs"], thresholds=header["thresholds"])

    def reset(self) -> None:
        """Forget all inputs so far, for example every day: a change shows sooner in fewer inputs."""
        n_exits = len(self.held_out_share)
        self._left, self._stayed, self._ended = [0] * n_exits, [0] * n_exits, [0] * n_exits
        self._evidence, self._warned = 0.0, False

    def decided(self, n: int, left: int, stayed: int) -> None:
        """At exit n, that many inputs have reached the threshold, and that many have not."""
        with self._lock:
            self._left[n] += left
            self._stayed[n] += stayed

    def ended(self, n: int, rows: int) -> None:
        """That many inputs got the result of exit n without being held against a threshold."""
        with self._lock:
            self._ended[n] += rows

    def add(self, exits: Sequence[int]) -> None:
        """Count inputs that were under no limit: (n_exits,) numbers of those that left at each exit."""
        remaining = sum(exits)
        for n, left in enumerate(exits[:-1]):
            remaining -= left
            self.decided(n, left, remaining)
        self.ended(len(exits) - 1, exits[-1])

    def summary(self) -> Summary:
        """Shares and mean cost so far beside the hold-out's; the log gets one warning when they differ beyond chance."""
        with self._lock:
            counts = [left + ended for left, ended in zip(self._left, self._ended)]
            now = log_evidence(self._left, self._stayed, self._counts)
            self._evidence = max(self._evidence, now)   # what was beyond chance once stays so
            differs = self._evidence >= -math.log(self.level)
            warn, self._warned = differs and not self._warned, self._warned or differs
        n = sum(counts)
        share = [count / max(n, 1) for count in counts]
        found = Summary(self.thresholds, n, share, self._mean_cost(share) if n else None, self.held_out_share,
                        self._mean_cost(self.held_out_share), math.exp(-self._evidence), differs)
        if warn:
            logger.warning("%s", describe_drift(found))
        return found

    def _mean_cost(self, share: Sequence[float]) -> float | None:
        return None if self.costs is None else sum(part * cost for part, cost in zip(share, self.costs))


class Monitored:
    """What runs early exit and may count the exits it gives.

    Args:
        monitor: counts at which exits inputs leave; without one nothing is counted.
        n_exits: of the network.
    Raises:
        UserError: when the monitor is of another number of exits.
    """

    def __init__(self, monitor: ExitMonitor | None, n_exits: int) -> None:
        if monitor and len(monitor.held_out_share) != n_exits:
            raise UserError(f"the monitor is of {len(monitor.held_out_share)} exits, the network has {n_exits}")
        self.monitor = monitor

    def summary(self) -> Summary:
        """Where inputs have left so far, beside the held-out images (`ExitMonitor.summary`).

        Raises:
            UserError: without a monitor.
        """
        if self.monitor is None:
            raise UserError(f"nothing was counted: pass monitor=ExitMonitor(...) to {type(self).__name__}")
        return self.monitor.summary()


def describe_drift(found: Summary) -> str:
    """One line on inputs that leave elsewhere than the held-out images."""
    costs = "" if found.mean_cost is None else f" and cost {found.mean_cost:.4g} in place of {found.held_out_cost:.4g} on average"
    return (f"{found.n_images:,} images leave at other exits than the held-out ones, beyond chance (p = {found.p_value:.2g}),"
            f"{costs}: they are of another kind, and budget or promise may not hold for them")


def log_evidence(left: Sequence[int], stayed: Sequence[int], held_out: Sequence[int]) -> float:
    """Natural logarithm of the evidence that a stream and the hold-out leave with different probabilities.

    Leaving is a series of decisions, one at each exit, so multinomial counts are a product of binomial ones. What the
    hold-out says of a probability is the beta distribution of its counts; the stream is predicted from it, and from wider
    distributions with the same mean, by which it would be surprising at the same exits. The ratio of the two predictions has
    mean 1 if nothing has changed, so that it ever exceeds 1 / p has at most probability p, however often one looks (Ville).

    Args:
        left, stayed: (n_exits,) decisions of the stream.
        held_out: (n_exits,) numbers of held-out images that left.
    """
    remaining, compared = sum(held_out), []
    for n, leaving in enumerate(held_out):
        remaining -= leaving
        if leaving and remaining:   # else the threshold is infinite, and there is nothing to decide
            compared.append((left[n], stayed[n], leaving + 0.5, remaining + 0.5))
    ratios = []
    for concentration in CONCENTRATIONS:
        total = 0.0
        for leaves, stays, a, b in compared:
            narrower = min(1.0, concentration / (a + b))
            total += _log_beta_ratio(leaves, stays, narrower * a, narrower * b) - _log_beta_ratio(leaves, stays, a, b)
        ratios.append(total)
    largest = max(ratios)
    return largest + math.log(sum(math.exp(ratio - largest) for ratio in ratios) / len(ratios))


def _log_beta_ratio(leaves: int, stays: int, a: float, b: float) -> float:
    """Logarithm of the probability of a series of decisions whose probability of leaving is drawn from Beta(a, b)."""
    return _log_beta(a + leaves, b + stays) - _log_beta(a, b)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
