"""Early exit for real over a test set: accuracy, MACs and time, beside what the simulation says."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_inference import evaluate_thresholds, exit_index
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.files import require_writable, write_json
from utils.core.log import echo
from utils.core.machine import versions
from utils.core.tables import format_table, millions
from utils.data.batches import Batches
from utils.evaluation import operating_points
from utils.evaluation.calibration import predict_hold_out, stated
from utils.evaluation.classify import write_predictions
from utils.evaluation.early_exit import Exits
from utils.evaluation.predict import Predictions, predict
from utils.evaluation.runtime import Runtime
from utils.evaluation.thresholds import certify, describe_promise, promise_entries
from utils.options.catalog import THRESHOLDS
from utils.runs.restore import name_outputs
from utils.runs.result_files import CHOSEN, FAMILIES, describe, result_name

REPEATS = 7
PART_BYTES = 2**29   # of images that are held in memory at a time
# A sample whose confidence is this close to a threshold may leave at another exit in a batch of another size.
ROUNDING = 1e-6


def evaluate_realtime(runtime: Runtime, data, folder: Path, *, header: dict[str, Any], budgets: Sequence[float] | None = None,
                      cost: str = "macs", thresholds: str = "geometric", max_drop: float | None = None, level: float = 0.95,
                      chosen_on_hold_out: bool = False, calibrate: bool = False, suffix: str = "",
                      predictions: str | None = None) -> dict[str, Any]:
    """Run early exit over the test set; prints one row per budget and writes realtime*.json.

    Args:
        runtime: the network, ready for early exit.
        header: of result files, from `utils.evaluation.modes.result_header`; `runtime` in it names the runtime.
        budgets: average cost per image; None takes five between the costs of the first and of the last exit.
        cost: "macs", or "latency" for budgets in milliseconds per image. The cost of an exit is then measured here, on a
            batch of the evaluation's size.
        thresholds: "geometric" for eq. 9, or "optimised".
        max_drop: in place of budgets, the cheapest thresholds that lose at most so many points with probability `level`.
        chosen_on_hold_out: whether the epoch was, see `describe_promise`.
        calibrate: fit a temperature for every exit first.
        predictions: CSV file that gets a row for each test image; only with one operating point.
    Returns:
        The content of the JSON file.
    Raises:
        UserError: without a hold-out, for a budget out of range, or in several processes.
    """
    if distributed.world_size() > 1:
        raise UserError("early exit is measured in one process; start the script without torchrun")
    operating_points.require_hold_out(data)
    if predictions:
        require_writable(Path(predictions).parent, "--predictions")
    latency_ms = measure_latency(runtime, next(iter(data.valid())).images)
    costs = latency_ms.tolist() if cost == "latency" else header["macs"]
    promised = max_drop is not None
    budgets = budgets or [operating_points.between(costs, fraction) for fraction in operating_points.DEFAULT_BUDGETS]
    for budget in budgets:   # a budget out of range is refused before the network runs
        operating_points.check(costs, budget, cost)
    valid, calibration = predict_hold_out(runtime.network, data.valid(), runtime.measure, calibrate=calibrate, promise=promised)
    test = predict(runtime.network, data.test(), runtime.measure, calibration=calibration)
    if promised:
        found = certify(valid.confidence.numpy(), valid.correct.numpy(), costs, max_drop, level)
        chosen = [(found.thresholds, promise_entries(found))]
    else:
        chosen = [(limits, {"budget": budget}) for budget, limits in
                  zip(budgets, operating_points.fit_all(valid, costs, budgets, thresholds))]
    passes = _classify([runtime.early_exit(limits, calibration) for limits, _ in chosen], data.test(), data.image_size)
    points = []
    for (limits, entries), of_test in zip(chosen, passes):
        spent = evaluate_thresholds(valid.confidence, valid.correct, limits, costs)[1]
        points.append({**entries, "thresholds": operating_points.finite(limits), "valid_mean_cost": spent,
                       **_point(of_test, test, limits, header["macs"], latency_ms)})
    if predictions:
        names = name_outputs(data.class_names, data.num_classes)
        write_predictions(Path(predictions), map(str, range(test.n_samples)), passes[0].exits_of_all(), names, header["macs"])
    header = header | {"n_valid": valid.n_samples, "n_test": test.n_samples, **stated(calibration)}
    result = {**header, "family": "promise" if promised else THRESHOLDS[thresholds], "cost": cost,
              "batch_size": len(next(iter(data.test())).images), "latency_ms": latency_ms.tolist(),
              "versions": versions(next(iter(data.test())).images.device), "points": points}
    write_json(folder / f"{result_name('realtime', result, suffix)}.json", result)
    _print(result)
    if promised:
        echo(describe_promise(points[0], chosen_on_hold_out=chosen_on_hold_out))
    return result


def measure_latency(runtime: Runtime, images: Tensor) -> np.ndarray:
    """(n_exits,) milliseconds per image to reach every exit when the whole batch does: medians of the steps, summed up."""
    runtime.exit_times(images)   # the first pass allocates, and compiles where that was asked for
    steps = np.median([runtime.exit_times(images) for _ in range(REPEATS)], axis=0)
    return np.cumsum(steps) * 1e3 / len(images)


@dataclass
class Pass:
    """What early exit at one budget made of the test set.

    Attributes:
        seconds: of classifying; reading the images is not in it.
        results, correct: for each batch, class, confidence and exit of every image, and whether the class is right.
    """

    seconds: float = 0.0
    results: list[Exits] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)

    def exits_of_all(self) -> Exits:
        """The results of all images."""
        return Exits(*(torch.cat(column).cpu() for column in zip(*self.results)))


def _classify(runners: Sequence[Callable[[Tensor], Exits]], batches: Batches, image_size: int) -> list[Pass]:
    """One pass over the test set with every runner.

    Part by part, so that a slow moment of the machine meets all budgets alike. A part is read before a clock runs: processes that
    decode the next images would take from the time of classifying these, which they did not when latencies were measured.
    """
    passes = [Pass() for _ in runners]
    image_bytes = 4 * 3 * image_size**2
    batch_bytes = image_bytes * -(-batches.n_samples // max(len(batches), 1))
    for part in batches.parts(max(1, PART_BYTES // batch_bytes)):
        held = list(part)
        for runner, result in zip(runners, passes):
            runner(held[0].images)   # not timed, like every first pass
            for images, labels, _ in held:
                start = _now(images)
                result.results.append(runner(images))
                result.seconds += _now(images) - start
                result.correct.append(result.results[-1].prediction == labels)
    return passes


def _point(found: Pass, simulated: Predictions, thresholds: np.ndarray, macs: Sequence[int],
           latency_ms: np.ndarray) -> dict[str, Any]:
    """Figures of a pass, beside those of the simulation."""
    exit_, correct = found.exits_of_all().exit.numpy(), torch.cat(found.correct).cpu().numpy()
    expected = exit_index(simulated.confidence, thresholds)
    top1, mean_macs, share = evaluate_thresholds(simulated.confidence, simulated.correct, thresholds, macs)
    expected_correct = simulated.correct.numpy()[expected, np.arange(len(expected))]
    differ = np.flatnonzero((exit_ != expected) | (correct != expected_correct))
    first = np.minimum(exit_, expected)[differ]
    near = np.abs(simulated.confidence.numpy()[first, differ] - thresholds[first]) <= ROUNDING
    exit_share = np.bincount(exit_, minlength=len(macs)) / len(exit_)
    return {"top1": 100 * float(correct.mean()), "mean_macs": float(exit_share @ np.asarray(macs, np.float64)),
            "exit_share": exit_share.tolist(), "seconds": found.seconds, "ms_per_image": 1e3 * found.seconds / len(exit_),
            "predicted_ms": float(exit_share @ latency_ms), "simulated_top1": top1, "simulated_mean_macs": mean_macs,
            "simulated_exit_share": share.tolist(), "n_differ": len(differ), "n_differ_by_rounding": int(near.sum())}


def _now(images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()


def _print(result: dict[str, Any]) -> None:
    in_ms, points, machine = result["cost"] == "latency", result["points"], result["versions"]
    unit = "ms" if in_ms else "MACs"
    rows = []
    for point in points:
        budget, held_out = ((f"{point[name]:.4g}" if in_ms else millions(point[name])) for name in ("budget", "valid_mean_cost"))
        rows.append([budget, held_out, millions(point["mean_macs"]), millions(point["simulated_mean_macs"]),
                     f"{point['top1']:.2f}", f"{point['simulated_top1']:.2f}", f"{point['seconds']:.2f}",
                     f"{point['ms_per_image']:.4g}", f"{point['predicted_ms']:.4g}", point["n_differ"],
                     " ".join(f"{100 * share:3.0f}" for share in point["exit_share"])])
    chosen = f", {FAMILIES[result['family']].title}" if result["family"] in CHOSEN else ""
    title = (f"\nEarly exit in real time{chosen}: {result['arch']} {describe(result)} {result['dataset']}, "
             f"{result['n_test']} test images in batches of {result['batch_size']}, 10^6 MACs and ms per image\n"
             f"{machine['device']}, {machine['threads']} CPU threads, torch {machine['torch']}; to reach each exit "
             f"{' '.join(f'{ms:.3g}' for ms in result['latency_ms'])} ms per image")
    target = "tested part" if result["family"] == "promise" else "budget"
    echo(format_table([f"{target}, {unit}", f"hold-out {unit}", "test MACs", "simulated", "top-1", "simulated", "wall s",
                       "ms/image", "predicted", "differ", "exits, %"], rows, title=title))
    n_differ, near = (sum(point[name] for point in points) for name in ("n_differ", "n_differ_by_rounding"))
    echo(f"{n_differ} of {result['n_test'] * len(points)} answers differ from the simulation, {near} of them where a confidence "
         f"lies within {ROUNDING:g} of its threshold")
