"""Publish an evaluated network: its weights in half precision, and arrays from which its curves are drawn again in seconds.

    python eval_cifar100.py --data-root data --evaluate-from RUN/model_latest.pth --publish published/boost
    python eval_cifar100.py --data-root data --evaluate-from RUN/model_best.pth --publish published/boost --evalmode dynamic
    python -m utils.publish published/boost       # writes the curves anew: neither data, network nor weights are needed

The first command writes model_anytime.pth, arrays_anytime.npz and anytime.json, the second model_dynamic.pth,
arrays_dynamic.npz, dynamic.json and dynamic_released.json. All figures are those of the half-precision weights. With
--publish_details the arrays also hold predicted class, margin, entropy, log-probability of the true class and sum of squared
probabilities; the first command then writes reliability.json too, and `python -m utils.publish --scores` compares scores.

Confidences are stored as the float32 numbers that they are, so that thresholds fitted on them hold for the network itself.
Half precision, which older files have, makes those above 1 - 2^-12 equal: they leave together and miss the budget.
"""
from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptive_inference import budget_curve, evaluate_thresholds, released_curve
from models import BoostedNet
from utils.core import distributed, lock
from utils.core.errors import UserError
from utils.core.files import TEMPORARY, atomic_write, misfit, read_json, write_json
from utils.core.log import echo
from utils.core.tables import format_table
from utils.evaluation.drift import ExitMonitor
from utils.evaluation.early_exit import EarlyExit
from utils.evaluation.fast_form import load_model, prepare_for_inference
from utils.evaluation.operating_points import (
    CONFIDENCE_TYPE,
    finite,
    fit,
    is_of_half_precision,
    require_hold_out,
    warn_of_missed_budgets,
)
from utils.evaluation.predict import Details, Predictions, predict
from utils.evaluation.reliability import ideal_score, reliability
from utils.evaluation.thresholds import describe_gain, optimised_curve
from utils.options.parser import rising
from utils.runs import checkpoint
from utils.runs.folder import SPLIT
from utils.runs.result_files import RESULTS, averaged_words

KINDS = ("anytime", "dynamic")
CURVES = ("anytime", "reliability", "dynamic", "dynamic_released", "dynamic_optimised")   # files that are drawn from the arrays
FILES = {RESULTS, *(f"{name}.json" for name in CURVES),
         *(name.format(kind) for name, kind in product(("model_{}.pth", "arrays_{}.npz"), KINDS))}
# Flags that say where things lie on the machine of the run.
PATHS = ("result_dir", "tensorboard_dir", "data_root", "checkpoint", "teacher")


class Arrays(NamedTuple):
    """What a network predicted for one set of images.

    Attributes:
        confidence: (n_exits, N) float32.
        correct: (n_exits, N) bool.
        details: arrays (n_exits, N) under the names of `utils.evaluation.predict.Details`; None where they were not kept.
    """

    confidence: np.ndarray
    correct: np.ndarray
    details: dict[str, np.ndarray] | None = None

    @classmethod
    def of(cls, found: Predictions) -> Arrays:
        details = found.details and {name: part.numpy() for name, part in found.details._asdict().items()}
        return cls(found.confidence.numpy(), found.correct.numpy(), details)

    @property
    def top1(self) -> list[float]:
        """Percent correct at every exit."""
        return (100 * self.correct.mean(axis=1)).tolist()


def half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kernels and matrices in half precision; vectors (batch norm, biases) are few and may be tiny or large: they stay."""
    return {name: tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor for name, tensor in weights.items()}


def publish(model: BoostedNet, saved: dict[str, Any], data, folder: Path, *, header: dict[str, Any], source: Path,
            dynamic: bool, details: bool = False) -> None:
    """Write all that is published of a checkpoint, and print what half precision changes.

    Args:
        model: the checkpoint's network; it ends with the rounded weights.
        saved: content of the checkpoint.
        header: from `utils.evaluation.modes.result_header`.
        source: folder of the run, with its results.json.
        dynamic: budgeted batch with hold-out and released sweep, in place of anytime prediction.
        details: keep what `Arrays` calls details.
    Raises:
        UserError: for a checkpoint without its network's description, thresholds to be fitted with nothing held out, or a folder
            with files of something else.
    """
    if "architecture" not in saved:   # a file that no program here could read again
        raise UserError("--publish is for checkpoints of training runs here; this one says nothing about its network")
    results = _read_results(source)
    _require_own_folder(folder, header, results)
    kind = "dynamic" if dynamic else "anytime"
    if dynamic:
        require_hold_out(data)
    # A checkpoint that was published before no longer knows its float32 weights; the arrays beside it know their figures.
    full = None if _is_half(saved["state_dict"]) else predict(model, data.test())
    top1_float32 = full.top1 if full else _figures_of_float32(saved, source, kind)
    content = {name: value for name, value in saved.items() if name != "training"}
    content["state_dict"] = half(model.backbone.state_dict())
    model.backbone.load_state_dict(content["state_dict"])
    rounded = predict(model, data.test(), details=details)
    parts = {"test": Arrays.of(rounded)}
    if dynamic:
        parts["valid"] = Arrays.of(predict(model, data.valid(), details=details))
    header = {**header, **{f"n_{name}": part.correct.shape[1] for name, part in parts.items()},
             "weights_hash": checkpoint.hash_weights(content["state_dict"]),   # of those that are published
             "precision": "half", "confidence_type": CONFIDENCE_TYPE, "top5": rounded.top5.tolist(),
             **({"top1_float32": top1_float32} if top1_float32 else {})}
    if not distributed.is_main():
        return
    checkpoint.save(folder / f"model_{kind}.pth", content)
    save_arrays(folder / f"arrays_{kind}.npz", header, parts)
    if results:
        write_json(folder / RESULTS, results)
    redraw(folder, kind)
    averaged = f", {averaged_words(header)}" if averaged_words(header) else ""
    unknown = ["-"] * model.n_exits
    before = [f"{top1:.2f}" for top1 in top1_float32] if top1_float32 else unknown
    changed = (full.correct != rounded.correct).sum(dim=1).tolist() if full else unknown
    echo(format_table(["exit", "float32 top-1 %", "half top-1 %", "answers changed"],
                      [[n + 1, a, f"{b:.2f}", c] for n, (a, b, c) in enumerate(zip(before, rounded.top1, changed))],
                      title=f"\n{folder}{averaged}: {rounded.n_samples} test images; an answer changed where it became right or "
                            "wrong"))


def _is_half(weights: dict[str, Tensor]) -> bool:
    """Whether `half` changes nothing."""
    return all(tensor.dtype == half({name: tensor})[name].dtype for name, tensor in weights.items())


def _figures_of_float32(saved: dict[str, Any], source: Path, kind: str) -> list[float] | None:
    """top1_float32 of a published checkpoint, from the arrays beside it; None where these are not of it."""
    path = source / f"arrays_{kind}.npz"
    if not path.is_file():
        return None
    before = load_arrays(path)[0]
    is_of_it = (before.get("epoch") == saved.get("epoch") and before.get("config") == saved["architecture"]
                and before.get("weights_hash") in (None, checkpoint.hash_weights(saved["state_dict"])))
    return before.get("top1_float32") if is_of_it else None


def _read_results(run: Path) -> dict[str, Any] | None:
    """results.json of a run as it is published: with the names of folders in place of their paths, which are nobody's concern."""
    path = run / RESULTS
    if not path.exists():
        return None
    results = read_json(path, {"config": dict})
    config = {name: Path(str(value)).name if name in PATHS and value else value for name, value in results["config"].items()}
    return {**results, "config": config}


def _require_own_folder(folder: Path, header: dict[str, Any], results: dict[str, Any] | None) -> None:
    """Refuse a folder where files of a run, or of anything else, would be overwritten or mixed up with what is published."""
    if any((folder / name).exists() for name in (*checkpoint.NAMES, SPLIT, lock.NAME)):
        raise UserError(f"{folder} holds a run, whose evaluation files would be overwritten; name another folder for --publish")
    there = sorted(path for path in folder.glob("*") if not path.name.startswith(".") and TEMPORARY not in path.name)
    arrays = [path for path in there if path.name.startswith("arrays_")]
    strange = [path for path in there if path.name not in FILES or not arrays]
    if strange:
        raise UserError(f"{strange[0]} is of something else; name a new folder for --publish")
    for path in arrays:
        before = load_arrays(path)[0]
        named = ("dataset", "method", "config", "temperatures", "split_hash")
        other = [name for name in named if before.get(name) != header[name]]
        if other:
            raise UserError(f"{folder} holds another published network, with another {other[0]}; name a new folder for --publish")
    if arrays and (_read_results(folder) or {}).get("config") != (results or {}).get("config"):
        raise UserError(f"{folder} holds another published run, of other flags; name a new folder for --publish")


def save_arrays(path: Path, header: dict[str, Any], parts: dict[str, Arrays]) -> None:
    """Write confidences in float32 and one bit for each answer."""
    arrays = {"about": np.array(json.dumps(header))}
    for name, part in parts.items():
        arrays |= {f"{name}_confidence": part.confidence, f"{name}_correct": np.packbits(part.correct, axis=1)}
        for detail, values in (part.details or {}).items():
            arrays[f"{name}_{detail}"] = values.astype(np.uint16) if detail == "prediction" else values
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def load_arrays(path: Path) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """Inverse of `save_arrays`.

    Raises:
        UserError: when the file is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            header, parts = dict(json.loads(str(file["about"]))), {}
            for name in ("test", "valid"):
                if f"{name}_confidence" in file:
                    confidence = file[f"{name}_confidence"].astype(np.float32)   # older files have float16
                    correct = np.unpackbits(file[f"{name}_correct"], axis=1, count=confidence.shape[1]).astype(bool)
                    details = {detail: file[f"{name}_{detail}"] for detail in Details._fields if f"{name}_{detail}" in file}
                    parts[name] = Arrays(confidence, correct, details if len(details) == len(Details._fields) else None)
        return header, parts
    except Exception as error:   # zipfile, NumPy and json have a dozen ways to say it
        raise UserError(f"{path} is not a file of published arrays: {error}") from error


def open_published(weights: Path, budget: float | None = None, device: str | torch.device = "cpu") -> BoostedNet | EarlyExit:
    """A published network: the whole of it in eval mode, or, with a budget, one that inputs leave early.

    Args:
        weights: model_anytime.pth or model_dynamic.pth of a published folder.
        budget: mean MACs per image; thresholds for it are fitted on the hold-out's confidences in arrays_dynamic.npz beside the
            weights (eq. 9).
        device: where the network computes.
    Returns:
        The network as trained, with `class_names`; or an `EarlyExit` in the form for inference, which counts where inputs leave.
    Raises:
        UserError: when the budget is out of range, or the arrays are of other weights.
    """
    model, saved = load_model(weights)
    model.class_names = saved["class_names"]
    if budget is None:
        return model.to(device)
    path = weights.with_name("arrays_dynamic.npz")
    header, parts = load_arrays(path)
    if header.get("weights_hash") != checkpoint.hash_weights(saved["state_dict"]) or "valid" not in parts:
        raise UserError(f"{path} holds no confidences of {weights.name} on held-out images, to which thresholds could be fitted")
    macs, valid = header["macs"], parts["valid"]
    thresholds = fit(valid.confidence, macs, budget)
    share = evaluate_thresholds(valid.confidence, valid.correct, thresholds, macs)[2]
    monitor = ExitMonitor(share, valid.correct.shape[1], macs, thresholds="geometric")
    return EarlyExit(prepare_for_inference(model.to(device)), thresholds, macs, monitor=monitor)


def redraw(folder: Path, kind: str, *, optimised: bool = False) -> list[Path]:
    """Write the curves of `kind` ("anytime" or "dynamic") from the arrays in `folder`, and return their files.

    With `optimised`, or where it is there already, the dynamic ones are joined by that of thresholds chosen for accuracy.
    """
    path = folder / f"arrays_{kind}.npz"
    header, parts = load_arrays(path)
    needed = {"test"} if kind == "anytime" else {"test", "valid"}
    n_exits = {len(part) for arrays in parts.values() for part in (*arrays[:2], *(arrays.details or {}).values())}
    macs = header.get("macs")
    drawable = misfit(macs, [float]) is None and all(step > 0 for step in rising(macs)) and n_exits == {len(macs)}
    if parts.keys() != needed or not drawable or "top5" not in header:
        raise UserError(f"{path} does not hold what {kind} curves are drawn from")
    test = parts["test"]
    top5 = header.pop("top5")
    if kind == "anytime":
        curves = {"anytime": {**header, "top1": test.top1, "top5": top5}}
        if test.details:
            curves["reliability"] = {**header, **reliability(*test), "ideal": ideal_score(test.correct, macs)}
    else:
        both = (*parts["valid"][:2], *test[:2], macs)
        fitted = budget_curve(*both)
        optimised = optimised or (folder / "dynamic_optimised.json").exists()   # which must not be of other weights
        chosen = optimised_curve(*both) if optimised else None
        curves = {name: {**header, "family": family, "flat": False, "augmented_hold_out": False,
                         "points": [{**point, "thresholds": finite(point["thresholds"])} for point in points]}
                  for name, family, points in (("dynamic", "eq9", fitted),
                                               ("dynamic_released", "released", released_curve(*both)),
                                               ("dynamic_optimised", "optimised", chosen)) if points}
    for name, curve in curves.items():
        write_json(folder / f"{name}.json", curve)
    if kind == "dynamic":
        if is_of_half_precision(header):
            echo(f"note: {path} has confidences in half precision, where all above 1 - 2^-12 are equal "
                 f"({100 * (test.confidence == 1).mean():.1f} % of the test set's)")
        warn_of_missed_budgets(fitted, len(parts["valid"].correct[0]))
        if chosen:
            echo(f"{folder}: {describe_gain(chosen, macs)}")
    return [folder / f"{name}.json" for name in curves]
