"""From a checkpoint and the command line to the network that is evaluated."""
from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import models
from models import BoostedNet, build_backbone, expand_temperatures
from utils.core import distributed
from utils.core.errors import UserError
from utils.data.split import Split
from utils.options.catalog import METHODS
from utils.options.network import NetworkSpec, OwnNetwork
from utils.runs.checkpoint import load_weights
from utils.runs.foreign import read_file

INDEX = "index.pth"   # an order of all training images, the last of which are held out, as programs of this family store it


def build_model(spec: NetworkSpec, backbone: nn.Module | None = None) -> BoostedNet:
    """The network of a specification, with new weights. Exits that predict alone are boosted ones with temperature 0.

    Args:
        backbone: to take in place of the specification's.
    Raises:
        UserError: when there is no such network.
    """
    try:
        backbone, wrapper = build_backbone(spec) if backbone is None else backbone, METHODS[spec.method].wrapper
        network = getattr(models, wrapper)(backbone) if wrapper else backbone
        return BoostedNet(network, expand_temperatures(spec.temperatures, network.n_exits), spec.trainable_ensemble)
    except ValueError as error:
        raise UserError(str(error)) from error


def spec_of(args: argparse.Namespace, saved: dict[str, Any]) -> NetworkSpec:
    """The network of a checkpoint: what the file says, or the flags where it says nothing about itself."""
    if "architecture" not in saved:
        return NetworkSpec.from_args(args)
    return NetworkSpec.from_checkpoint(saved, args.evaluate_from).made_by(args.arch, args.evaluate_from)


def describe(spec: NetworkSpec, model: BoostedNet, data, *, dataset: str, seed: int) -> dict[str, Any]:
    """What a checkpoint says about its network besides the weights."""
    return {**spec.with_temperatures(model.temperatures).to_checkpoint(), "dataset": dataset,
            "class_names": list(data.class_names), "split": data.split.to_dict() if data.split else None,
            "labels_hash": data.labels_hash, "seed": seed}


def stored_split(saved: dict[str, Any] | None) -> Split | None:
    """The split of a checkpoint."""
    return Split.from_dict(saved["split"]) if saved and saved["split"] else None


def name_outputs(class_names: Sequence[str] | None, n_outputs: int) -> list[str]:
    """A name for every output of a classifier: those beyond the class folders that it was trained on are numbered."""
    named = list(class_names or [])
    return [*named, *(f"class {n}" for n in range(len(named), n_outputs))]


def take_over(args: argparse.Namespace, saved: dict[str, Any]) -> Split | None:
    """Let a checkpoint decide what its network is, and return its split.

    A released checkpoint says nothing about itself but perhaps its method; all other flags then stand as they were given.

    Raises:
        UserError: when a flag given on the command line says otherwise.
    """
    if "architecture" not in saved:
        if "method" in saved:
            _take(args, "method", saved["method"])
        return None
    spec = NetworkSpec.from_checkpoint(saved, args.evaluate_from)
    warn_of_changed_file(args.arch, spec, args.evaluate_from)
    split = stored_split(saved)
    stored = {**spec.to_checkpoint()["architecture"], "dataset": saved["dataset"], "method": saved["method"],
              "trainable_ensemble": saved["trainable_ensemble"]}
    if "seed" in saved:
        stored["seed"] = saved["seed"]
    holds_out = split is not None and len(split.valid_index) > 0
    if holds_out:
        stored |= {"seed": split.seed, "valid_size": len(split.valid_index)}
    for name, value in stored.items():
        _take(args, name, value)
    _take_over_temperatures(args, saved["temperatures"])
    if args.use_valid and not holds_out:
        raise UserError(f"{args.evaluate_from} was trained without a hold-out; --use-valid does not fit it")
    return split


def _take(args: argparse.Namespace, name: str, value: Any) -> None:
    """Let a flag have the value that a checkpoint says."""
    if name in args.explicit and getattr(args, name) != value:
        raise UserError(f"{args.evaluate_from} was trained with {name} {_show(value)}, but the command line says "
                        f"{_show(getattr(args, name))}; leave that flag out")
    if name not in args.explicit:
        setattr(args, name, value)


def hold_out(args: argparse.Namespace, saved: dict[str, Any], split: Split | None) -> dict[str, Any]:
    """Keywords of `build_data` that say which images are held out in evaluation.

    A checkpoint that says nothing of a split gets the images that index.pth beside it holds out, or images that are drawn.

    Args:
        split: the checkpoint's own.
    Raises:
        UserError: for an index.pth that is something else, --seed where nothing is drawn, or a promise without a split.
    """
    if "split" in saved:
        return {"split": split}
    if args.max_drop is not None:
        raise UserError(f"--max_drop needs images that were surely held out of training; {args.evaluate_from} knows of none")
    stored = Path(args.evaluate_from).with_name(INDEX)
    drawn = args.use_valid and ("seed" in args.explicit or not stored.exists())
    if "seed" in args.explicit and not drawn and not args.paper_protocol:
        raise UserError("--seed has no effect without --use-valid: nothing is drawn")
    if (args.evalmode == "anytime" and not args.calibrate) or not (args.use_valid or stored.exists()):
        return {}
    if drawn:
        _warn("%s says nothing of a hold-out: %s images are drawn with seed %d, and its network may have been trained on them",
              args.evaluate_from, args.valid_size or "a tenth of the training", args.seed)
        return {"use_valid": True, "valid_size": args.valid_size}
    if args.valid_size:   # without it there will be an error that says so
        _warn("%s says nothing of a hold-out: the last %s images of %s are held out, and its network may have been trained on "
              "them all the same", args.evaluate_from, args.valid_size, stored)
    return {"order": read_file(stored), "valid_size": args.valid_size}


def _warn(message: str, *values: Any) -> None:
    if distributed.is_main():
        logging.getLogger("boostnet").warning(message, *values)


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


def warn_of_changed_file(arch: str | None, spec: NetworkSpec, source: str | Path) -> None:
    """Warn where the file of a person's own network, named by --arch, is not what it was when the network was trained."""
    if isinstance(arch, OwnNetwork) and arch == spec.arch and arch.file_hash() != spec.file_hash:
        _warn("%s has changed since %s was trained; where it makes another network now, what comes out is not what was trained",
              arch.file, source)


def require_same_file(spec: NetworkSpec, saved: dict[str, Any], folder: str) -> None:
    """Refuse to go on with a run when the file of a person's own network is not what it was.

    Raises:
        UserError: naming the file.
    """
    if spec.file_hash != saved["architecture"].get("file_hash"):
        raise UserError(f"the run in {folder} cannot be resumed: {spec.arch.file} has changed since it began; put it back as it "
                        "was, or give another --result_dir for a new run")


def restore(spec: NetworkSpec, saved: dict[str, Any], source: str | Path, backbone: nn.Module | None = None) -> BoostedNet:
    """The network of a checkpoint, with its weights.

    Args:
        backbone: to put them into, in place of the one that the specification makes.
    Raises:
        UserError: when the weights are another network's.
    """
    if backbone is not None and getattr(backbone, "n_exits", None) != len(spec.temperatures):
        raise UserError(f"{source} is of a network with {len(spec.temperatures)} exits; {type(backbone).__name__} has "
                        f"{getattr(backbone, 'n_exits', 'none')}")
    model = build_model(spec, backbone)
    load_weights(model.backbone, saved["state_dict"], source)
    return model


def require_same_hold_out(saved: dict[str, Any], data, source: str) -> None:
    """Refuse a network to build on that may have been trained on images which are held out here.

    Raises:
        UserError: when its checkpoint (from `checkpoint.load`) has another hold-out split; a released one says nothing of it.
    """
    if data.n_valid and "split" in saved and not data.split.holds_out_as(stored_split(saved)):
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
