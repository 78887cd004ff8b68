"""From a checkpoint and the command line to the network that is evaluated."""
from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from models import BoostedNet, expand_temperatures
from utils.core.errors import UserError
from utils.data.split import Split
from utils.methods import build_model
from utils.options.catalog import MAX_LAYERS, METHODS, n_layers
from utils.options.flags import NETWORK
from utils.runs.checkpoint import load_weights

# What says what a network is; a checkpoint carries it, and evaluation takes it from there.
ARCHITECTURE = (*NETWORK, "num_classes", "image_size")


def identify(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say about a network: the beginning of a checkpoint, and all there is to say of a released one."""
    return {"architecture": {name: getattr(args, name) for name in ARCHITECTURE}, "dataset": args.dataset, "method": args.method}


def describe(args: argparse.Namespace, model: BoostedNet, data) -> dict[str, Any]:
    """What a checkpoint says about its network besides the weights."""
    return {**identify(args), "class_names": list(data.class_names), "temperatures": list(model.temperatures),
            "trainable_ensemble": args.trainable_ensemble, "split": data.split.to_dict() if data.split else None,
            "labels_hash": data.labels_hash, "seed": args.seed}


def name_outputs(class_names: Sequence[str] | None, n_outputs: int) -> list[str]:
    """A name for every output of a classifier: those beyond the class folders that it was trained on are numbered."""
    named = list(class_names or [])
    return [*named, *(f"class {n}" for n in range(len(named), n_outputs))]


def take_over(args: argparse.Namespace, saved: dict[str, Any]) -> Split | None:
    """Let a checkpoint decide what its network is, and return its hold-out split.

    A released checkpoint says nothing about itself; then the flags stand as they were given.

    Raises:
        UserError: when a flag given on the command line says otherwise.
    """
    if "architecture" not in saved:
        return None
    check(args, saved)
    split = Split.from_dict(saved["split"]) if saved["split"] else None
    stored = {**saved["architecture"], "dataset": saved["dataset"], "method": saved["method"],
              "trainable_ensemble": saved["trainable_ensemble"]}
    if split:
        stored |= {"seed": split.seed, "valid_size": len(split.valid_index)}
    for name, value in stored.items():
        if name in args.explicit and getattr(args, name) != value:
            raise UserError(f"{args.evaluate_from} was trained with {name} {_show(value)}, but the command line says "
                            f"{_show(getattr(args, name))}; leave that flag out")
        setattr(args, name, value)
    _take_over_temperatures(args, saved["temperatures"])
    if args.use_valid and split is None:
        raise UserError(f"{args.evaluate_from} was trained on all training images; --use-valid does not fit it")
    return split


def check(args: argparse.Namespace, saved: dict[str, Any]) -> None:
    """Refuse a checkpoint that says of itself what the command line would not accept.

    Raises:
        UserError: naming what makes no sense.
    """
    architecture, temperatures = saved["architecture"], saved["temperatures"]
    wrong = [name for name in ARCHITECTURE if name not in architecture or not _is_like(architecture[name], getattr(args, name))]
    wrong += [name for name in architecture if name not in ARCHITECTURE]
    if not wrong and n_layers(argparse.Namespace(**architecture)) > MAX_LAYERS:
        wrong.append("architecture")
    if not all(isinstance(t, float) and math.isfinite(t) for t in temperatures):
        wrong.append("temperatures")
    if saved["method"] not in METHODS:
        wrong.append("method")
    if wrong:
        raise UserError(f"{args.evaluate_from} is damaged, or from another version: its {wrong[0]} makes no sense")


def _is_like(value: Any, example: Any) -> bool:
    # Defaults of the command line are the examples; only the number of classes has none.
    if isinstance(example, list):
        return isinstance(value, list) and value and all(_is_like(v, example[0]) for v in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return isinstance(example, (int, type(None))) and 0 < value <= 100_000
    return type(value) is type(example) and not (isinstance(value, float) and not math.isfinite(value))


def _take_over_temperatures(args: argparse.Namespace, stored: list[float]) -> None:
    if args.ensemble == "boost" and not any(stored[1:]):   # trained alone, to be added up: with what, only the flag can say
        return
    if "ensemble_reweight" in args.explicit and METHODS[args.method].boosted:   # the baseline has no use for the flag
        try:
            given = expand_temperatures(args.ensemble_reweight, len(stored))
        except ValueError as error:
            raise UserError(str(error)) from error
        if not all(math.isclose(a, b, abs_tol=1e-12) for a, b in zip(given[1:], stored[1:])):
            raise UserError(f"{args.evaluate_from} was trained with temperatures {_show(stored)}, but --ensemble_reweight says "
                            f"{_show(given)}; leave that flag out")
    args.ensemble_reweight = stored


def restore(args: argparse.Namespace, saved: dict[str, Any]) -> BoostedNet:
    """The network of a checkpoint, with its weights.

    Raises:
        UserError: when the weights are another network's.
    """
    # Of a checkpoint here the temperatures that it was trained with: --ensemble_reweight may say how else to add its exits up.
    trained = {"ensemble_reweight": saved["temperatures"]} if "temperatures" in saved else {}
    model = build_model(argparse.Namespace(**vars(args) | trained))
    load_weights(model.backbone, saved["state_dict"], args.evaluate_from)
    return model


def require_same_hold_out(saved: dict[str, Any], data, source: str) -> None:
    """Refuse a network to build on that may have been trained on images which are held out here.

    Raises:
        UserError: when its checkpoint (from `checkpoint.load`) has another hold-out split; a released one says nothing of it.
    """
    if data.split and "split" in saved and (saved["split"] or {}).get("hash") != data.split.hash:
        raise UserError(f"{source} was trained with another hold-out split, on images that this run holds out; train it with the "
                        "same --use-valid, --valid_size and --seed")


def is_of_same_data(saved: dict[str, Any], data) -> bool:
    """Whether a checkpoint's network was trained on images of these data, as far as it tells."""
    labels_hash = saved.get("labels_hash") or (saved.get("split") or {}).get("labels_hash")
    if labels_hash:
        return labels_hash == data.labels_hash
    return saved.get("class_names") == data.class_names


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
