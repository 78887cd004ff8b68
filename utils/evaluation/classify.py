"""Early exit on a person's own image files."""
from __future__ import annotations

import argparse
import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptive_inference import evaluate_thresholds
from models import BoostedNet
from op_counter import measure_model
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.files import atomic_write, require_writable
from utils.core.tables import format_table, millions
from utils.data.augment import Normalise, statistics_of
from utils.data.decoders import PillowDecoder, decode, evaluation_crop
from utils.data.folders import EXTENSIONS
from utils.evaluation import operating_points
from utils.evaluation.calibration import predict_hold_out
from utils.evaluation.confidence import read_exits
from utils.evaluation.drift import ExitMonitor
from utils.evaluation.early_exit import Exits
from utils.evaluation.runtime import Runtime, open_runtime
from utils.options.catalog import THRESHOLDS, is_cropped
from utils.runs.restore import name_outputs, restore, spec_of
from utils.runs.result_files import averaged_words

COLUMNS = ("image", "class", "confidence", "exit", "macs")   # of --predictions


def classify_files(args: argparse.Namespace, saved: dict[str, Any], open_data: Callable[[], Any], device: torch.device) -> None:
    """Print class, confidence and exit of every file of `args.images`.

    Thresholds are those that `--evalmode dynamic` left beside the checkpoint for the largest budget not above the one asked
    for; where there are none, they are fitted now on the hold-out.

    Args:
        open_data: opens the checkpoint's data set; called only where thresholds have to be fitted.
    Raises:
        UserError: for a file that is no image, a budget out of range, or without a hold-out.
    """
    if distributed.world_size() > 1:
        raise UserError("--images runs in one process; start the script without torchrun")
    files = image_files(args.images)   # a wrong path is found before anything is computed
    if args.predictions:
        require_writable(Path(args.predictions).parent, "--predictions")
    images = read_images(files, args.dataset, args.image_size, args.stem)
    if args.num_classes is None:
        raise UserError(f"{args.evaluate_from} does not say how many classes it has; --images needs a checkpoint made here")
    model, reading = read_exits(args, restore(spec_of(args, saved), saved, args.evaluate_from).to(device))
    macs = measure_model(model, args.image_size, args.image_size)[0]
    source = Path(args.evaluate_from).parent
    of_flags = {**spec_of(args, saved).to_checkpoint(), "dataset": args.dataset}   # what other programs' files do not say
    runtime = open_runtime(args.runtime, model, of_flags | saved, source, args.policy)
    chosen = _choose_thresholds(args, saved, model, reading, runtime, macs, open_data)
    results = _run(runtime.early_exit(chosen.thresholds, chosen.calibration), images, args.batch_size, device)
    names = name_outputs(saved.get("class_names"), args.num_classes)
    if args.predictions:
        write_predictions(Path(args.predictions), files, results, names, macs)
    _print(files, results, names, macs, "; ".join(filter(None, [chosen.origin, averaged_words(saved)])), args.policy)
    if chosen.monitor:
        chosen.monitor.add(np.bincount(results.exit.numpy(), minlength=len(macs)).tolist())
        chosen.monitor.summary()   # warns if these images are of another kind


class Chosen(NamedTuple):
    """Thresholds, where they are from in words, temperatures that they go with, and where the held-out images left."""

    thresholds: Sequence[float]
    origin: str
    calibration: Sequence[float] | None
    monitor: ExitMonitor | None


def _choose_thresholds(args: argparse.Namespace, saved: dict[str, Any], model: BoostedNet, reading: dict[str, Any],
                       runtime: Runtime, macs: Sequence[int], open_data: Callable[[], Any]) -> Chosen:
    """Stored thresholds that fit the flags; but for a promise, new ones where there are none."""
    folder = Path(args.result_dir or Path(args.evaluate_from).parent)
    budget = args.budget[0] if args.budget else None
    if budget:
        operating_points.check(macs, budget)
    family = "promise" if args.max_drop is not None else THRESHOLDS[args.thresholds]
    curve = operating_points.stored_curve(folder, saved, args.save_suffix, temperatures=model.temperatures, family=family,
                                          calibrated=args.calibrate, **reading)
    points, calibration = (curve["points"], curve.get("calibration")) if curve else ([], None)
    if family == "promise":
        wanted = args.max_drop, args.confidence_level
        point = next((point for point in points if (point["max_drop"], point["confidence_level"]) == wanted), None)
        if not point:
            calibrate = " --calibrate" if args.calibrate else ""
            raise UserError(f"{folder} has no such promise of this checkpoint; make it first, with --evalmode dynamic --max_drop "
                            f"{args.max_drop:g} --confidence_level {args.confidence_level:g}{calibrate} and without --images")
        origin = (f"Stored thresholds that lose at most {args.max_drop:g} points with probability {args.confidence_level:g}, for "
                  f"{millions(point['budget'])} x 10^6 MACs on average")
        return Chosen(point["thresholds"], origin, calibration, operating_points.monitor(curve, points.index(point)))
    kind = "Optimised thresholds" if family == "optimised" else "Thresholds"
    point = operating_points.choose(points, macs, budget)
    if point:
        origin = f"Stored {kind[0].lower() + kind[1:]} for {millions(point['budget'])} x 10^6 MACs on average"
        if budget and millions(point["budget"]) != millions(budget):
            origin += f", the largest stored budget not above {millions(budget)}"
        return Chosen(point["thresholds"], origin, calibration, operating_points.monitor(curve, points.index(point)))
    data, budget = open_data(), budget or operating_points.between(macs, 0.5)
    operating_points.require_hold_out(data)
    valid, calibration = predict_hold_out(runtime.network, data.valid(), runtime.measure, calibrate=args.calibrate)
    thresholds, = operating_points.fit_all(valid, macs, [budget], args.thresholds)
    share = evaluate_thresholds(valid.confidence, valid.correct, thresholds, macs)[2]
    return Chosen(thresholds, f"{kind} for {millions(budget)} x 10^6 MACs on average", calibration,
                  ExitMonitor(share, valid.n_samples, macs, thresholds=args.thresholds))


def image_files(paths: Sequence[str]) -> list[str]:
    """The files of --images: those named, and in place of a folder the files with the ending of an image in it, sorted.

    Raises:
        UserError: for a path that is not there, and for a folder without images.
    """
    files: list[str] = []
    for path in paths:
        if os.path.isdir(path):   # not Path, for which "" is the current folder
            found = sorted(str(file) for file in Path(path).iterdir() if file.suffix.lower() in EXTENSIONS and file.is_file())
            if not found:
                raise UserError(f"{path} is a folder without image files ({', '.join(sorted(EXTENSIONS))})")
            files += found
        elif not os.path.exists(path):
            raise UserError(f"{path or repr(path)} is no file; --images takes image files, and folders of them")
        else:
            files.append(path)
    return files


def require_own_table(path: str | Path) -> None:
    """Refuse to replace a file that is not one of `write_predictions`.

    Raises:
        UserError: when there is such a file.
    """
    try:
        with open(path, "rb") as file:
            found = file.readline(1000)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--predictions {path} cannot be written: {error.strerror}") from error
    if found and found.decode(errors="replace").strip() != ",".join(COLUMNS):
        raise UserError(f"--predictions {path} is there already and is no table of predictions; name a new file")


def write_predictions(path: Path, names: Iterable[str], results: Exits, class_names: Sequence[str], macs: Sequence[int]) -> None:
    """Write one row per image: its file or number, class, confidence, exit (from 1) and cost in MACs."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(COLUMNS)
    for name, prediction, confidence, exit_ in zip(names, *(column.tolist() for column in results)):
        rows.writerow([name, class_names[prediction], f"{confidence:.6f}", exit_ + 1, macs[exit_]])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


def read_images(paths: Sequence[str], dataset: str, image_size: int, stem: str | None = None) -> Tensor:
    """Image files as (n, 3, image_size, image_size) float32, scaled, cropped and normalised as the test images of `dataset`.

    Where the data set's images are not cropped, these are scaled so that the shorter side fits.

    Args:
        stem: first layer of the network; None for the one of that side.
    Raises:
        UserError: for a file that is no image.
    """
    cropped, statistics = is_cropped(dataset, image_size, stem), statistics_of(dataset, image_size, stem)
    crops = [evaluation_crop(PillowDecoder(), decode(path), image_size, cropped) for path in paths]
    return Normalise(*statistics)(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))


def _run(early_exit: Callable[[Tensor], Exits], images: Tensor, batch_size: int, device: torch.device) -> Exits:
    parts = [early_exit(part.to(device)) for part in images.split(batch_size)]
    return Exits(*(torch.cat(column).cpu() for column in zip(*parts)))


def _print(paths: Sequence[str], results: Exits, class_names: Sequence[str], macs: Sequence[int], origin: str,
           policy: str) -> None:
    certainty = "confidence %" if policy == "confidence" else f"certainty by {policy} %"
    rows = []
    for path, prediction, confidence, exit_ in zip(paths, *(column.tolist() for column in results)):
        rows.append([path, class_names[prediction], f"{100 * confidence:.1f}", exit_ + 1, millions(macs[exit_])])
    print(format_table(["file", "class", certainty, "exit", "10^6 MACs"], rows,
                       title=f"\n{origin}; all exits take {millions(macs[-1])}"))
