"""Early exit that really stops: rows leave the batch at their exit, and the rest of the network runs on what is left."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models import BoostedNet, map_state
from utils.evaluation.confidence import Measure, confidence
from utils.evaluation.drift import ExitMonitor, Monitored

# Batches shrink to a few sizes only, so many between a number and its double: oneDNN builds code for every size it meets, and
# keeps 1024 pieces of it, which is fewer than MSDNet-10 has for eleven sizes. 8 measured well (docs/evaluation.md).
SIZES_PER_DOUBLING = 8


class Exits(NamedTuple):
    """Result for every row of a batch, in the order of the input.

    Attributes:
        prediction: (B,) int64, class with the largest F_n at the row's exit.
        confidence: (B,) float32, how certain it is: its softmax probability, or what else `measure` gives.
        exit: (B,) int64, exit the row left at, from 0.
    """

    prediction: Tensor
    confidence: Tensor
    exit: Tensor


class EarlyExit(Monitored):
    """A boosted network that every input leaves at the first exit whose threshold its confidence reaches.

        predict = EarlyExit(model, thresholds)             # thresholds from adaptive_inference.fit_thresholds
        prediction, confidence, exit = predict(images)     # images (B, 3, H, W), any B

    All rows run to exit 0 together. Rows that are confident enough leave, rows from the end of the batch take their places
    (features, logits and all), and the shorter batch runs to exit 1, and so on. The batch shrinks to the next larger of a few
    sizes, with rows that have left running along, and stays as it is when too few have left for the next size. Per exit the
    host waits for the device at most once, to learn which rows stay.

    Args:
        model: network as trained, or from `utils.evaluation.fast_form.prepare_for_inference`. The state of its backbone's
            steps is written to.
        thresholds: (n_exits,), fitted in the same precision; the last one is not used, there everything leaves.
        costs: (n_exits,) cumulative cost of every exit, in the unit of `max_cost`.
        sizes_per_doubling: sizes a batch may have between a number and its double, a power of two; None allows every size.
        measure: what is held against the thresholds, from 0 to 1; those of `utils.evaluation.confidence` that look at one exit.
        calibration: (n_exits,) temperatures that divide F_n for the confidence alone, the ones that the thresholds were fitted
            with; None for none.
        monitor: counts at which exits inputs leave, for `summary`; without one nothing is counted.
    Raises:
        ValueError: when there is not one threshold, not NaN, one rising cost, one positive temperature and one share of the
            monitor per exit.
    """

    def __init__(self, model: BoostedNet, thresholds: Sequence[float] | np.ndarray | Tensor,
                 costs: Sequence[float] | np.ndarray | Tensor | None = None, *,
                 sizes_per_doubling: int | None = SIZES_PER_DOUBLING, measure: Measure = confidence,
                 calibration: Sequence[float] | None = None, monitor: ExitMonitor | None = None) -> None:
        if not isinstance(model, BoostedNet):
            raise ValueError(f"EarlyExit runs a BoostedNet, got {type(model).__name__}; wrap a backbone: "
                             "BoostedNet(backbone, temperatures)")
        self.model, self.sizes_per_doubling, self.measure = model, sizes_per_doubling, measure
        self.thresholds = _float32_thresholds(thresholds, model.n_exits)
        self.costs = None if costs is None else _as_list(costs)
        if self.costs is not None and (len(self.costs) != model.n_exits or not _rises(self.costs)):
            raise ValueError(f"costs must be {model.n_exits} positive, rising numbers, one per exit, got {self.costs}")
        self.calibration = None if calibration is None else _as_list(calibration)
        if self.calibration and (len(self.calibration) != model.n_exits or not all(0 < t < math.inf for t in self.calibration)):
            raise ValueError(f"calibration must be {model.n_exits} positive numbers, one per exit, got {self.calibration}")
        super().__init__(monitor, model.n_exits)

    @torch.inference_mode()
    def __call__(self, x: Tensor, max_cost: float | None = None, deadline_ms: float | None = None) -> Exits:
        """Classify a batch.

        Args:
            x: images (B, 3, H, W), B from 0 on.
            max_cost: no step is begun whose exit costs more than this per row; the rows that are left then get the result
                of the exit they have reached. Exit 0 always runs.
            deadline_ms: no step is begun later than this many milliseconds after the call; exit 0 always runs.
        Raises:
            ValueError: for a limit that is NaN or negative, or `max_cost` without costs.
        """
        last = self._last_affordable_exit(max_cost)
        deadline = _Deadline(deadline_ms, x.device)
        if not self.model.training:
            return self._run(x, last, deadline)
        self.model.eval()
        try:
            return self._run(x, last, deadline)
        finally:
            self.model.train()

    def _run(self, x: Tensor, last: int, deadline: _Deadline) -> Exits:
        backbone, running, monitor = self.model.backbone, _Running(x), self.monitor
        live = getattr(backbone, "live", lambda n, state: state)   # the part of a state that has been written to
        if len(x) == 0:
            return running.results
        state, scores, reached = backbone.start(x), None, 0
        for n, threshold in enumerate(self.thresholds[:last + 1]):
            if n > 0 and deadline.passed():
                break
            logits, state = backbone.step(n, state)
            scores, reached = self.model.add(n, logits, scores), n
            if n == last or threshold == -math.inf:
                break
            if threshold == math.inf:   # no input leaves, whatever the confidence
                continue
            certainty = self._certainty(n, scores)
            stays = running.present((certainty < threshold).cpu().numpy())   # here the host waits for the device
            deadline.waited()
            n_left = len(stays) - int(np.count_nonzero(stays))
            if monitor:
                monitor.decided(n, n_left - running.n_left, len(stays) - n_left)
            if n_left == running.n_left:
                continue
            running.write(n, scores, certainty)
            if n_left == len(stays):
                return running.results
            size = _allowed_size(len(stays) - n_left, self.sizes_per_doubling)
            if size < len(stays):
                state, scores = running.shrink(stays, size, state, scores, partial(live, n))
            else:
                running.mark(stays)
        if monitor:
            monitor.ended(reached, len(running.places) - running.n_left)
        running.write(reached, scores, self._certainty(reached, scores))
        return running.results

    def _certainty(self, n: int, scores: Tensor) -> Tensor:
        return self.measure(scores / self.calibration[n] if self.calibration else scores)

    def _last_affordable_exit(self, max_cost: float | None) -> int:
        if max_cost is None:
            return self.model.n_exits - 1
        if self.costs is None:
            raise ValueError("max_cost needs the costs of the exits; pass them to EarlyExit(model, thresholds, costs)")
        _check_limit("max_cost", max_cost)
        return max([0, *(n for n, cost in enumerate(self.costs) if cost <= max_cost)])


class _Running:
    """The rows of the running batch: where they stand in the input, and the results written so far.

    Rows that have left but still run along, because making the batch smaller did not pay, stand at a spare place behind
    the last: one write per exit then serves all rows, and an earlier result is never overwritten.

    Attributes:
        n_left: rows of the running batch that have left.
    """

    def __init__(self, x: Tensor) -> None:
        self.images, self.device = x, x.device
        self.places = np.arange(len(x))
        self.spare, self.n_left = len(x), 0
        self._prediction, self._exit = (torch.empty(len(x) + 1, dtype=torch.int64, device=x.device) for _ in range(2))
        self._confidence = torch.empty(len(x) + 1, dtype=torch.float32, device=x.device)

    @property
    def results(self) -> Exits:
        return Exits(self._prediction[:-1], self._confidence[:-1], self._exit[:-1])

    def present(self, stays: np.ndarray) -> np.ndarray:
        """`stays` without the rows that have left before."""
        return stays & (self.places != self.spare) if self.n_left else stays

    def write(self, n: int, scores: Tensor, confidence: Tensor) -> None:
        """Note exit n for all rows; those that stay are overwritten by a later exit."""
        places = self._index(self.places)
        self._prediction.index_copy_(0, places, scores.argmax(dim=1))
        self._confidence.index_copy_(0, places, confidence)
        self._exit.index_fill_(0, places, n)

    def mark(self, stays: np.ndarray) -> None:
        """Let the rows that leave run along."""
        self.places = np.where(stays, self.places, self.spare)
        self.n_left = len(stays) - int(np.count_nonzero(stays))

    def shrink(self, stays: np.ndarray, size: int, state: Any, scores: Tensor,
               live: Callable[[Any], Any]) -> tuple[Any, Tensor]:
        """State and scores of `size` rows: those that stay, and as many of the others as it takes.

        Only rows behind the new end move, into the gaps: never more of them than leave, and into memory that is there.

        Args:
            live: what of the state has to move with a row.
        """
        self.mark(stays)
        movers = size + np.flatnonzero(stays[size:])
        gaps = np.flatnonzero(~stays[:size])[:len(movers)]
        self.places[gaps] = self.places[movers]
        self.places = self.places[:size]
        self.n_left -= len(stays) - size
        state = map_state(self._writable, state)
        if len(gaps):
            gaps, movers = self._index(gaps), self._index(movers)
            map_state(lambda tensor: tensor.index_copy_(0, gaps, tensor.index_select(0, movers)), [live(state), scores])
        return map_state(lambda tensor: tensor[:size], state), scores[:size]

    def _writable(self, tensor: Tensor) -> Tensor:
        # The caller's images, should a backbone carry them along, are not ours to write to.
        shared = tensor.untyped_storage().data_ptr() == self.images.untyped_storage().data_ptr()
        return tensor.clone() if shared else tensor

    def _index(self, places: np.ndarray) -> Tensor:
        return torch.from_numpy(places).to(self.device, non_blocking=True)


class _Deadline:
    """Whether a number of milliseconds has passed since now, on the host's clock with the device's work done."""

    def __init__(self, milliseconds: float | None, device: torch.device) -> None:
        if milliseconds is not None:
            _check_limit("deadline_ms", milliseconds)
        self.end = None if milliseconds is None else time.perf_counter() + milliseconds / 1e3
        self.device, self.up_to_date = device, False

    def waited(self) -> None:
        """The host has just waited for the device."""
        self.up_to_date = True

    def passed(self) -> bool:
        if self.end is None:
            return False
        if self.device.type == "cuda" and not self.up_to_date:
            torch.cuda.synchronize(self.device)
        self.up_to_date = False
        return time.perf_counter() >= self.end


def _allowed_size(n: int, per_doubling: int | None) -> int:
    """The smallest allowed batch size that holds n rows."""
    if per_doubling is None:
        return n
    unit = max(1, (1 << max(n - 1, 0).bit_length()) // (2 * per_doubling))
    return -(-n // unit) * unit


def _as_list(values: Any) -> list[float]:
    return torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values)).double().flatten().tolist()


def _rises(costs: list[float]) -> bool:
    return costs[0] > 0 and math.isfinite(costs[-1]) and all(a <= b for a, b in zip(costs[:-1], costs[1:]))


def _float32_thresholds(thresholds: Any, n_exits: int) -> list[float]:
    """Thresholds as float32 numbers with which float32 confidences compare as with the exact ones."""
    exact = np.asarray(_as_list(thresholds))
    if exact.shape != (n_exits,) or np.isnan(exact).any():
        raise ValueError(f"thresholds must be {n_exits} numbers, one for each exit, got {exact.tolist()}")
    with np.errstate(over="ignore"):   # what overflows becomes an infinity, with the same meaning
        rounded = exact.astype(np.float32)
    rounded = np.where(rounded < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
    # A confidence lies between 0 and 1; where it cannot matter, the exit needs none at all.
    return np.where(rounded > 1, np.inf, np.where(rounded <= 0, -np.inf, rounded)).tolist()


def _check_limit(name: str, value: float) -> None:
    if not value >= 0:   # refuses NaN as well
        raise ValueError(f"{name} must be a number from 0 on, got {value}")
