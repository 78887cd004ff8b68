"""Early exit on a person's own image files."""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from op_counter import measure_model
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.tables import format_table, millions
from utils.data.augment import Normalise, statistics_of
from utils.data.decoders import PillowDecoder, decode, evaluation_crop
from utils.evaluation import operating_points
from utils.evaluation.confidence import MEASURES, read_exits
from utils.evaluation.early_exit import EarlyExit, Exits
from utils.evaluation.fast_form import prepare_for_inference
from utils.evaluation.predict import predict
from utils.runs.restore import name_outputs, restore, spec_of


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
    images = read_images(args.images, args.dataset, args.image_size)   # a wrong path is found before anything is computed
    if args.num_classes is None:
        raise UserError(f"{args.evaluate_from} does not say how many classes it has; --images needs a checkpoint made here")
    model, reading = read_exits(args, restore(spec_of(args, saved), saved, args.evaluate_from).to(device))
    macs = measure_model(model, args.image_size, args.image_size)[0]
    ready = prepare_for_inference(model)
    folder = Path(args.result_dir or Path(args.evaluate_from).parent)
    budget = args.budget[0] if args.budget else None
    if budget:
        operating_points.check(macs, budget)
    measure = MEASURES[args.policy]
    family = "promise" if args.max_drop is not None else "optimised" if args.thresholds == "optimised" else "eq9"
    points = operating_points.stored(folder, saved, args.save_suffix, temperatures=model.temperatures, family=family, **reading)
    if family == "promise":
        point = next((point for point in points if (point["max_drop"], point["confidence_level"])
                      == (args.max_drop, args.confidence_level)), None)
    else:
        point = operating_points.choose(points, macs, budget)
    kind = "Optimised thresholds" if family == "optimised" else "Thresholds"
    if family == "promise":
        if not point:
            raise UserError(f"{folder} has no such promise of this checkpoint; make it first, with --evalmode dynamic --max_drop "
                            f"{args.max_drop:g} --confidence_level {args.confidence_level:g} and without --images")
        thresholds = point["thresholds"]
        origin = (f"Stored thresholds that lose at most {args.max_drop:g} points with probability {args.confidence_level:g}, for "
                  f"{millions(point['budget'])} x 10^6 MACs on average")
    elif point:
        thresholds = point["thresholds"]
        origin = f"Stored {kind[0].lower() + kind[1:]} for {millions(point['budget'])} x 10^6 MACs on average"
        if budget and millions(point["budget"]) != millions(budget):
            origin += f", the largest stored budget not above {millions(budget)}"
    else:
        data, budget = open_data(), budget or operating_points.between(macs, 0.5)
        operating_points.require_hold_out(data)
        thresholds, = operating_points.fit_all(predict(ready, data.valid(), measure), macs, [budget], args.thresholds)
        origin = f"{kind} for {millions(budget)} x 10^6 MACs on average"
    results = _run(EarlyExit(ready, thresholds, measure=measure), images, args.batch_size, device)
    _print(args.images, results, name_outputs(saved.get("class_names"), args.num_classes), macs, origin, args.policy)


def read_images(paths: Sequence[str], dataset: str, image_size: int) -> Tensor:
    """Image files as (n, 3, image_size, image_size) float32, scaled, cropped and normalised as the test images of `dataset`.

    Images of small data sets are scaled so that the shorter side fits.

    Raises:
        UserError: for a file that is no image.
    """
    for path in paths:
        if os.path.isdir(path) or not os.path.exists(path):
            raise UserError(f"{path or repr(path)} is {'a folder' if os.path.isdir(path) else 'no file'}; --images takes image "
                            "files")
    crops = [evaluation_crop(PillowDecoder(), decode(path), image_size) for path in paths]
    return Normalise(*statistics_of(dataset, image_size))(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))


def _run(early_exit: EarlyExit, images: Tensor, batch_size: int, device: torch.device) -> Exits:
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
