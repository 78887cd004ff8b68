"""Both prediction modes of a trained network: anytime (every exit on all inputs) and budgeted batch (inputs leave early).

Here all exits are computed for all inputs and leaving is simulated; `utils.evaluation.realtime` really leaves.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adaptive_inference import budget_curve, flatten, patience_curve, released_curve, solve_exit_rate
from models import BoostedNet
from op_counter import measure_model
from utils import __version__
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.files import atomic_write, require_writable, write_json
from utils.core.log import echo
from utils.core.tables import format_table, millions
from utils.evaluation.calibration import fit_temperatures, predict_hold_out, stated
from utils.evaluation.confidence import MEASURES, read_exits
from utils.evaluation.operating_points import finite, require_hold_out, warn_of_missed_budgets
from utils.evaluation.predict import Predictions, collect, predict, read
from utils.evaluation.published import publish
from utils.evaluation.realtime import evaluate_realtime
from utils.evaluation.reliability import ideal_score, reliability
from utils.evaluation.runtime import open_runtime
from utils.evaluation.thresholds import describe_gain, describe_promise, optimised_curve, promise_point
from utils.options.catalog import THRESHOLDS
from utils.runs.checkpoint import hash_weights
from utils.runs.restore import restore, spec_of
from utils.runs.result_files import FAMILIES, describe, result_name


def evaluate(args: argparse.Namespace, saved: dict[str, Any], data, device: torch.device) -> None:
    """Evaluate a checkpoint's network as the flags ask; results go to --result_dir, by default beside the checkpoint.

    Raises:
        UserError: when weights and architecture differ, a budget is out of range, or thresholds lack a hold-out.
    """
    if saved.get("class_names", data.class_names) != data.class_names:
        raise UserError(f"{args.evaluate_from} was trained on other classes than those of {args.data_root}; evaluate it with the "
                        "data set it was trained on")
    args.num_classes = args.num_classes or data.num_classes
    spec = spec_of(args, saved)
    model, reading = read_exits(args, restore(spec, saved, args.evaluate_from).to(device))
    source = Path(args.evaluate_from).parent
    folder = Path(args.publish or args.result_dir or source)
    if distributed.is_main():
        require_writable(folder, "--publish" if args.publish else "--result_dir")
    # A released checkpoint says nothing about itself.
    split = data.split.to_dict() if data.split else None
    header = result_header({**spec.to_checkpoint(), "dataset": args.dataset, "split": split, **saved}, folder, model, data,
                           **reading)
    chosen = "hold-out" in (header["epoch_kind"] or "")
    if args.publish:
        publish(model, saved, data, folder, header=header, source=source, dynamic=args.evalmode == "dynamic",
                details=args.publish_details)
    elif args.evalmode == "realtime":
        runtime = open_runtime(args.runtime, model, {**header, "architecture": header["config"], **saved}, source, args.policy)
        evaluate_realtime(runtime, data, folder, header=header | {"runtime": args.runtime}, budgets=args.budget, cost=args.cost,
                          thresholds=args.thresholds, max_drop=args.max_drop, level=args.confidence_level,
                          chosen_on_hold_out=chosen, calibrate=args.calibrate, suffix=args.save_suffix,
                          predictions=args.predictions)
    elif args.max_drop is not None:
        evaluate_promise(model, data, folder, header=header, max_drop=args.max_drop, level=args.confidence_level,
                         chosen_on_hold_out=chosen, calibrate=args.calibrate, suffix=args.save_suffix)
    elif args.policy == "patience":
        evaluate_patience(model, data, folder, header=header, suffix=args.save_suffix)
    elif args.evalmode == "dynamic":
        evaluate_budgeted(model, data, folder, header=header, budgets=args.budget, released=args.sweep == "released",
                          flat=args.flat_curve, thresholds=args.thresholds, calibrate=args.calibrate, suffix=args.save_suffix)
    else:
        evaluate_anytime(model, data, folder, header=header, calibrate=args.calibrate, suffix=args.save_suffix)


def result_header(saved: dict[str, Any], folder: Path, model: BoostedNet, data, *, ensemble: str | None = None,
           policy: str = "confidence") -> dict[str, Any]:
    """What every result file says about the network it is of.

    Args:
        saved: content of its checkpoint.
        ensemble: how `model` reads its exits (--ensemble); None for the way they were trained.
        policy: what lets an input leave.
    """
    macs, params = measure_model(model, data.image_size, data.image_size)
    split = saved.get("split")
    return {"format": 1, "version": __version__, "name": folder.resolve().name, "dataset": saved["dataset"],
            "method": saved["method"], "arch": saved["architecture"]["arch"], "config": saved["architecture"],
            "ensemble": ensemble, "policy": policy, "temperatures": list(model.temperatures), "epoch": saved.get("epoch"),
            "epoch_kind": saved.get("epoch_kind"), "weights_hash": hash_weights(saved["state_dict"]),
            "split_hash": split["hash"] if split else None, "n_valid": data.n_valid, "n_test": data.n_test, "macs": macs,
            "params": params, **({"ema": saved["ema"]} if saved.get("ema") else {})}


def evaluate_anytime(model: BoostedNet, data, folder: Path, *, header: dict[str, Any], calibrate: bool = False,
                     suffix: str = "") -> dict[str, Any]:
    """Accuracy of every exit on the test set, and how far its confidence can be trusted.

    Prints both tables and writes any*.txt, flops.pth, anytime*.json and reliability*.json.

    Args:
        header: from `result_header`.
        calibrate: fit a temperature for every exit on the hold-out, and report what that changes as well.
        suffix: appended to the names of `utils.runs.result_files.result_name`.
    Returns:
        The content of anytime*.json.
    Raises:
        UserError: when there is no hold-out to calibrate on.
    """
    calibration = after = None
    if calibrate:
        require_hold_out(data)
        calibration = fit_temperatures(collect(model, data.valid()))
        outputs = collect(model, data.test())
        test, after = read(outputs, details=True), read(outputs, calibration=calibration, details=True)
    else:
        test = predict(model, data.test(), details=True)
    result = {**header, "n_test": test.n_samples, "top1": test.top1, "top5": test.top5.tolist()}
    if not distributed.is_main():
        return result
    rows = list(zip(header["macs"], header["params"], result["top1"], result["top5"], strict=True))
    name = result_name("anytime", result, suffix)
    _write_columns(folder / f"any{name.removeprefix('anytime')}.txt", rows)
    _write_costs(folder, header["macs"])
    write_json(folder / f"{name}.json", result)
    echo(format_table(["exit", "10^6 MACs", "10^6 params", "top-1 %", "top-5 %"],
                      [[n + 1, millions(macs), f"{params / 1e6:.3f}", f"{top1:.2f}", f"{top5:.2f}"]
                       for n, (macs, params, top1, top5) in enumerate(rows)],
                      title=f"\nAnytime prediction: {_describe(header)}, {result['n_test']} test images"))
    _report_reliability(header, folder, suffix, test, after, calibration)
    return result


def _report_reliability(header: dict[str, Any], folder: Path, suffix: str, test: Predictions, after: Predictions | None,
                        calibration: list[float] | None) -> None:
    """Write the files of reliability, and print their table."""
    found = [reliability_result(header, part, temperatures)
             for part, temperatures in ((test, None), (after, calibration)) if part]
    for result in found:
        write_json(folder / f"{result_name('reliability', result, suffix)}.json", result)
    columns = {"temperature": [f"{t:.3f}" for t in calibration]} if calibration else {}
    for name, title, scale, digits in (("ece", "ECE %", 100, 2), ("nll", "NLL", 1, 4), ("brier", "Brier", 1, 4),
                                       ("aurc", "AURC", 1, 4)):
        if name in found[0]:
            columns[title] = [" -> ".join(f"{scale * value:.{digits}f}" for value in of_exit)
                              for of_exit in zip(*(result[name] for result in found))]
    fitted = f", before and after temperatures from {header['n_valid']} held-out images" if calibration else ""
    echo(format_table(["exit", *columns], [[n + 1, *row] for n, row in enumerate(zip(*columns.values()))],
                      title=f"\nConfidence of the exits{fitted}"))


def reliability_result(header: dict[str, Any], test: Predictions, calibration: list[float] | None = None) -> dict[str, Any]:
    """Content of reliability*.json."""
    details = test.details and {name: getattr(test.details, name).numpy() for name in ("log_likelihood", "squares")}
    return {**header, "n_test": test.n_samples, **stated(calibration),
            **reliability(test.confidence.numpy(), test.correct.numpy(), details),
            "ideal": ideal_score(test.correct.numpy(), header["macs"])}


def evaluate_budgeted(model: BoostedNet, data, folder: Path, *, header: dict[str, Any], budgets: Sequence[float] | None = None,
                      released: bool = False, flat: bool = False, thresholds: str = "geometric", calibrate: bool = False,
                      suffix: str = "") -> dict[str, Any]:
    """Accuracy where inputs leave early, thresholds fitted on the hold-out and applied to the test set.

    Prints one row per budget and writes dynamic*.txt, dynamic*.json and flops.pth.

    Args:
        budgets: average MACs per image; None takes 40 evenly over what the network can spend.
        released: the 39-point sweep of the released program in place of budgets.
        flat: a larger budget that does not raise hold-out accuracy changes nothing.
        thresholds: "geometric" for eq. 9, or "optimised", which says as well how far it is better.
        calibrate: fit a temperature for every exit first.
    Returns:
        The content of the JSON file.
    Raises:
        UserError: without a hold-out, or for a budget out of range.
    """
    macs = header["macs"]
    for budget in budgets or []:   # a budget out of range is refused before the network runs
        solve_exit_rate(macs, budget)
    valid, test, calibration = _predict_both(model, data, header["policy"], calibrate)
    arrays = (valid.confidence, valid.correct, test.confidence, test.correct, macs)
    if thresholds == "optimised":
        fitted = optimised_curve(*(part.numpy() for part in arrays[:-1]), macs, budgets)
    else:
        fitted = released_curve(*arrays, flat=flat) if released else budget_curve(*arrays, budgets)
    points = flatten(fitted) if flat and not released else fitted
    family = "released" if released else THRESHOLDS[thresholds]
    result = _report_budgeted(header, data, valid, test, points, folder, suffix, family=family, flat=flat,
                              calibration=calibration)
    if distributed.is_main() and family == "eq9":
        warn_of_missed_budgets(fitted, valid.n_samples)
    if distributed.is_main() and family == "optimised":
        echo(describe_gain(points, macs))
    return result


def evaluate_promise(model: BoostedNet, data, folder: Path, *, header: dict[str, Any], max_drop: float, level: float,
                     chosen_on_hold_out: bool = False, calibrate: bool = False, suffix: str = "") -> dict[str, Any]:
    """The cheapest thresholds that lose at most `max_drop` points of the whole network's accuracy, see `certify`.

    Prints them and writes dynamic_promise*.txt, flops.pth and dynamic_promise*.json, whose content it returns.

    Raises:
        UserError: without a hold-out.
    """
    valid, test, calibration = _predict_both(model, data, header["policy"], calibrate, promise=True)
    arrays = (part.numpy() for part in (valid.confidence, valid.correct, test.confidence, test.correct))
    point = promise_point(*arrays, header["macs"], max_drop, level)
    result = _report_budgeted(header, data, valid, test, [point], folder, suffix, family="promise", calibration=calibration)
    if distributed.is_main():
        echo(describe_promise(point, chosen_on_hold_out=chosen_on_hold_out))
    return result


def evaluate_patience(model: BoostedNet, data, folder: Path, *, header: dict[str, Any], suffix: str = "") -> dict[str, Any]:
    """Accuracy where inputs leave at the first exit that ends k exits in a row with the same answer, for every k.

    Prints one row per k and writes dynamic*.txt, flops.pth and dynamic*.json, whose content it returns.

    Raises:
        UserError: without a hold-out.
    """
    valid, test, _ = _predict_both(model, data, "patience")
    points = patience_curve(valid.confidence, valid.correct, test.confidence, test.correct, header["macs"])
    return _report_budgeted(header, data, valid, test, points, folder, suffix, family="patience")


def _predict_both(model: BoostedNet, data, policy: str, calibrate: bool = False, promise: bool = False,
                  ) -> tuple[Predictions, Predictions, list[float] | None]:
    """Predictions for hold-out and test set, and the temperatures that are in both.

    Raises:
        UserError: without a hold-out.
    """
    require_hold_out(data)
    valid, calibration = predict_hold_out(model, data.valid(), MEASURES[policy], calibrate=calibrate, promise=promise)
    return valid, predict(model, data.test(), MEASURES[policy], calibration=calibration), calibration


def _report_budgeted(header: dict[str, Any], data, valid: Predictions, test: Predictions, points: Sequence[dict[str, Any]],
                     folder: Path, suffix: str, *, family: str, flat: bool = False,
                     calibration: list[float] | None = None) -> dict[str, Any]:
    """Write the files of a curve and print its table, in one process; the content of the JSON file, in all."""
    finished = [point | {"thresholds": finite(point["thresholds"])} if "thresholds" in point else point for point in points]
    result = {**header, "n_valid": valid.n_samples, "n_test": test.n_samples, **stated(calibration), "family": family,
              "flat": flat, "augmented_hold_out": data.augment_valid, "points": finished}
    if not distributed.is_main():
        return result
    name = result_name("dynamic", result, suffix)
    _write_columns(folder / f"{name}.txt", [(point["test_mean_macs"], point["test_top1"]) for point in result["points"]])
    _write_costs(folder, result["macs"])
    write_json(folder / f"{name}.json", result)
    shown = FAMILIES[family]
    augmented = " with training augmentation" if result["augmented_hold_out"] else ""
    rows = []
    for point in result["points"]:
        shares = " ".join(f"{100 * share:3.0f}" for share in point["test_exit_share"])
        rows.append([shown.show(point[shown.key]), millions(point["valid_mean_macs"]), millions(point["test_mean_macs"]),
                     f"{point['valid_top1']:.2f}", f"{point['test_top1']:.2f}", shares])
    fitted = "thresholds from " if family != "patience" else ""
    echo(format_table([shown.column, "hold-out MACs", "test MACs", "hold-out top-1", "test top-1",
                       "test exits, %"], rows,
                      title=f"\nBudgeted batch, {shown.title}{', flat curve' if flat else ''}: {_describe(result)}\n"
                            f"{fitted}{result['n_valid']} held-out images{augmented}, {result['n_test']} test images, "
                            "10^6 MACs per image"))
    return result


def _describe(header: dict[str, Any]) -> str:
    described = f"{header['arch']} {describe(header)} {header['dataset']}"
    if header["epoch"]:
        described += f" epoch {header['epoch']}"
    return f"{described} ({header['epoch_kind']})" if header["epoch"] and header["epoch_kind"] else described


def _write_columns(path: Path, rows: Sequence[Sequence[float]]) -> None:
    with atomic_write(path) as file:
        file.write("".join("\t".join(f"{value}" for value in row) + "\n" for row in rows).encode())


def _write_costs(folder: Path, macs: list[int]) -> None:
    with atomic_write(folder / "flops.pth") as file:
        torch.save(macs, file)
