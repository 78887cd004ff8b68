"""Early exit on ONNX Runtime: the programs of `utils.export --format onnx`, NumPy in and NumPy out, without PyTorch.

    predict = OnnxEarlyExit(OnnxPrograms("exported"), thresholds)
    prediction, confidence, exit = predict(images)     # images (B, 3, H, W) float32, normalised, any B from 0 on

One program runs per exit; rows whose confidence reaches the threshold leave, and the next program runs on the rows that stay.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.core.cores import usable_cores
from utils.core.errors import UserError
from utils.core.files import misfit, read_json
from utils.evaluation.drift import ExitMonitor, Monitored

FORMATS = (2,)
MIN_VERSION = (1, 22)   # of ONNX Runtime: the first that lets a program set its thread pools
# Rows that one thread takes at a time where every session has a thread of its own.
SLICE, LARGEST_SLICE = 16, 64

Measure = Callable[[np.ndarray], np.ndarray]   # from probabilities (B, C) to one number (B,) that grows with certainty


class OnnxExits(NamedTuple):
    """Result for every row of a batch, in the order of the input.

    Attributes:
        prediction: (B,) int64, class with the largest F_n at the row's exit.
        confidence: (B,) float32, how certain it is: its softmax probability, or what else `measure` gives.
        exit: (B,) int64, exit the row left at, from 0.
    """

    prediction: np.ndarray
    confidence: np.ndarray
    exit: np.ndarray


def confidence(probabilities: np.ndarray) -> np.ndarray:
    """The largest softmax probability."""
    return probabilities.max(axis=1)


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """1 - H / log C for the entropy H of the C softmax probabilities."""
    logs = np.log(np.where(probabilities > 0, probabilities, 1))
    spread = -(probabilities * logs).sum(axis=1)
    return np.clip(1 - spread / math.log(max(probabilities.shape[1], 2)), 0, 1)


def margin(probabilities: np.ndarray) -> np.ndarray:
    """The largest softmax probability less the second largest."""
    if probabilities.shape[1] < 2:
        return probabilities[:, 0]
    top = np.partition(probabilities, -2, axis=1)[:, -2:]
    return top[:, 1] - top[:, 0]


MEASURES: dict[str, Measure] = {"confidence": confidence, "entropy": entropy, "margin": margin}


def softmax(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities (B, C) float32 of scores (B, C)."""
    if temperature != 1:
        scores = scores / np.float32(temperature)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


class OnnxPrograms:
    """The programs of one network, loaded.

    Two ways to use the cores. Where this program owns the process, call `use_all_cores` before anything is loaded: all
    sessions then share one pool of threads. Otherwise every session has one thread, and larger batches are run as slices in a
    pool of `threads` Python threads. What is never done is a pool for each session: their threads wait by spinning, and
    those of the other exits get no core.

    Args:
        folder: of `utils.export --format onnx`.
        threads: slices that run at a time where sessions have one thread each; default: one per core.
    Attributes:
        header: content of model.json.
        n_exits: number of programs.
    Raises:
        UserError: for a folder that is missing, incomplete or of another format, and for a missing or too old ONNX Runtime.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        folder = Path(folder)
        self.header = read_header(folder)
        self.shares_pool = has_shared_pool()
        self._sessions = []
        for name in self.header["steps"]:
            path = folder / name
            try:
                session = open_session(str(path))
            except UserError:   # of ONNX Runtime itself, not of this file
                raise
            except Exception as error:   # the library's exceptions have no class in common
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"{path} cannot be loaded: {reason if path.is_file() else 'there is no such file'}") from error
            self._sessions.append((session, [node.name for node in session.get_inputs()]))
        self.n_exits = len(self._sessions)
        self.n_threads = 1 if self.shares_pool else threads or usable_cores()
        self._pool = ThreadPoolExecutor(self.n_threads) if self.n_threads > 1 else None

    def step(self, n: int, state: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run program n on what program n-1 returned (images for n = 0): [F_n (B, C), features ...]."""
        session, names = self._sessions[n]
        return session.run(None, dict(zip(names, state)))

    def scores(self, images: np.ndarray) -> Iterator[np.ndarray]:
        """F_n (B, C) of every exit, for images that all stay to the end."""
        state: Sequence[np.ndarray] = [images]
        for n in range(self.n_exits):
            state = self.step(n, state)
            yield state[0]

    def check_images(self, images: np.ndarray) -> np.ndarray:
        """Images as the programs read them.

        Raises:
            UserError: for another shape than (B, 3, side, side).
        """
        side = self.header["image_size"]
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise UserError(f"images have the shape {'x'.join(map(str, images.shape))}, expected (B, 3, {side}, {side})")
        return np.ascontiguousarray(images, np.float32)

    def in_slices(self, run: Callable[[np.ndarray], Sequence[np.ndarray]], images: np.ndarray) -> Sequence[np.ndarray]:
        """`run(images)`, arrays of one row per image, in slices where sessions have one thread each and the batch is large."""
        if self._pool is None or len(images) <= SLICE:
            return run(images)
        size = min(max(SLICE, -(-len(images) // self.n_threads)), LARGEST_SLICE)
        parts = list(self._pool.map(run, [images[i:i + size] for i in range(0, len(images), size)]))
        return [np.concatenate(column) for column in zip(*parts)]


class OnnxEarlyExit(Monitored):
    """`utils.evaluation.early_exit.EarlyExit` on ONNX programs.

    Args:
        programs: loaded programs.
        thresholds: (n_exits,), the last one is not used; as in model.json, or from `adaptive_inference.fit_thresholds`.
        costs: (n_exits,) cumulative cost of every exit, in the unit of `max_cost`; default: MACs.
        measure: what is held against the thresholds, a name in MEASURES.
        calibration: (n_exits,) temperatures that divide F_n for the confidence alone, the ones that the thresholds were fitted
            with; default: those of model.json.
        monitor: counts at which exits inputs leave, for `summary`; without one nothing is counted.
    Raises:
        UserError: when there is not one threshold, not NaN, one positive temperature and one share of the monitor per exit.
    """

    def __init__(self, programs: OnnxPrograms, thresholds: Sequence[float], costs: Sequence[float] | None = None, *,
                 measure: str = "confidence", calibration: Sequence[float] | None = None,
                 monitor: ExitMonitor | None = None) -> None:
        self.programs, self.measure = programs, MEASURES[measure]
        self.thresholds = np.asarray(thresholds, np.float64)
        if self.thresholds.shape != (programs.n_exits,) or np.isnan(self.thresholds).any():
            raise UserError(f"thresholds must be {programs.n_exits} numbers, one for each exit, got {list(thresholds)}")
        self.costs = list(costs if costs is not None else programs.header["macs"])
        if calibration is None:
            calibration = programs.header.get("calibration") or [1.0] * programs.n_exits
        self.temperatures = list(calibration)
        if len(self.temperatures) != programs.n_exits or not all(0 < t < math.inf for t in self.temperatures):
            raise UserError(f"calibration must be {programs.n_exits} positive numbers, one per exit, got {self.temperatures}")
        super().__init__(monitor, programs.n_exits)

    def __call__(self, images: np.ndarray, max_cost: float | None = None, deadline_ms: float | None = None) -> OnnxExits:
        """Classify a batch.

        Args:
            images: (B, 3, H, W) float32, normalised, B from 0 on.
            max_cost: no program is begun whose exit costs more than this per row; rows that are left then get the result of
                the exit they have reached. Exit 0 always runs.
            deadline_ms: no program is begun later than this many milliseconds after the call; exit 0 always runs.
        Raises:
            UserError: for images of another size, or a limit that is NaN or negative.
        """
        images = self.programs.check_images(images)
        last = self.programs.n_exits - 1
        for name, limit in (("max_cost", max_cost), ("deadline_ms", deadline_ms)):
            if limit is not None and not limit >= 0:   # refuses NaN as well
                raise UserError(f"{name} must be a number from 0 on, got {limit}")
        if max_cost is not None:
            last = max([0, *(n for n, cost in enumerate(self.costs) if cost <= max_cost)])
        end = math.inf if deadline_ms is None else time.perf_counter() + deadline_ms / 1e3
        return OnnxExits(*self.programs.in_slices(lambda part: self._run(part, last, end), images))

    def _run(self, images: np.ndarray, last: int, end: float) -> OnnxExits:
        n_rows = len(images)
        results = OnnxExits(np.empty(n_rows, np.int64), np.empty(n_rows, np.float32), np.empty(n_rows, np.int64))
        rows, state = np.arange(n_rows), [images]
        for n, threshold in enumerate(self.thresholds[:last + 1]):
            if not len(rows):
                break
            state = self.programs.step(n, state)
            scores = state[0]
            final = n == last or threshold == -math.inf or time.perf_counter() >= end
            if not final and threshold == math.inf:   # no input leaves, whatever the confidence
                continue
            certainty = self.measure(softmax(scores, self.temperatures[n]))
            leaves = np.full(len(rows), True) if final else certainty >= threshold
            if self.monitor:
                n_leaving = int(np.count_nonzero(leaves))
                if final:
                    self.monitor.ended(n, n_leaving)
                else:
                    self.monitor.decided(n, n_leaving, len(rows) - n_leaving)
            if leaves.any():
                left = rows[leaves]
                results.prediction[left] = scores[leaves].argmax(axis=1)
                results.confidence[left] = certainty[leaves]
                results.exit[left] = n
            if leaves.all():
                break
            if leaves.any():
                stays = ~leaves
                rows, state = rows[stays], [part[stays] for part in state]
        return results


_shared_pool_threads: int | None = None   # set by `use_all_cores`


def use_all_cores(threads: int) -> None:
    """Let all programs that are loaded from now on share one pool of `threads` threads; for a program that owns its process.

    It counts once; a second call changes nothing. Programs that were loaded before keep their own thread.
    """
    global _shared_pool_threads
    if _shared_pool_threads is None:
        _runtime().set_global_thread_pool_sizes(threads, 1)
        _shared_pool_threads = threads


def has_shared_pool() -> bool:
    """Whether `use_all_cores` has been called, after which ONNX Runtime gives no program a thread of its own."""
    return _shared_pool_threads is not None


def open_session(program: str | bytes) -> Any:
    """A session of a program, a file or its content: on the shared pool of threads where there is one, else with one thread."""
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if has_shared_pool():
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = options.inter_op_num_threads = 1
    return runtime.InferenceSession(program, options, providers=["CPUExecutionProvider"])


def read_header(folder: Path) -> dict[str, Any]:
    """Content of a folder's model.json.

    Raises:
        UserError: when it is missing, damaged, of another format or of programs for another runtime.
    """
    path = folder / "model.json"
    try:
        header = read_json(path, {"format": int, "runtime": str}, older={"runtime": "torch"})
    except OSError as error:
        raise UserError(f"{folder} holds no exported network (model.json: {error.strerror}); python -m utils.export writes "
                        "one") from error
    if header["runtime"] != "onnx":
        raise UserError(f"{folder} holds programs of torch.export; export again with --format onnx")
    if header["format"] not in FORMATS:
        raise UserError(f"{path} is of format {header['format']}; this version reads {', '.join(map(str, FORMATS))}")
    if problem := misfit(header, {"steps": [str], "macs": [int], "image_size": int}):
        raise UserError(f"{path} is damaged: {problem}")
    return header


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("ONNX programs need onnxruntime: pip install -r requirements-onnx.txt") from error
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < MIN_VERSION:
        raise UserError(f"onnxruntime {onnxruntime.__version__} is too old; version {'.'.join(map(str, MIN_VERSION))} or newer "
                        "is needed")
    return onnxruntime
