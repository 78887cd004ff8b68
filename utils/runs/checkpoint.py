"""Checkpoints: written so that a file is whole or absent, read without ever running code from it.

A checkpoint holds the backbone's state_dict under its released names and what is needed to use it: architecture flags,
method, temperatures, class names, hold-out split. `model_latest.pth` also holds what is needed to go on training, under
`training`. With --ema (`ema` in the file) the state_dict is the average, and `training` has the weights that are trained.
"""
from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from models import Backbone
from utils import __version__
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.files import TEMPORARY, atomic_write, to_disk
from utils.runs.foreign import METHOD_OF_ENTRY, find_weights, read_file

FORMAT = 1
COUNTER = ".num_batches_tracked"   # end of the names of batch normalisation's counters
LATEST, BEST, PREVIOUS, DAMAGED = "model_latest.pth", "model_best.pth", "model_previous.pth", "model_damaged.pth"
TEST_BEST = "model_test_best.pth"   # by --paper_protocol only
NAMES = LATEST, BEST, PREVIOUS, DAMAGED, TEST_BEST

logger = logging.getLogger("boostnet")

# What is beside the weights in a checkpoint of this project, and under `training` in one that a run can go on from.
CONTENT = {"architecture": dict, "dataset": str, "class_names": list, "method": str, "temperatures": list,
           "trainable_ensemble": bool, "split": (dict, type(None)), "epoch": int, "epoch_kind": str,
           "ema": (float, EllipsisType)}   # which is missing where there is no average
TRAINING = {"optimizer": dict, "objective": dict, "figures": dict, "best": dict, "history": list,
            "rng": dict, "config": dict, "n_train": int, "labels_hash": str, "processes": int}


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors and plain types) so that `path` is replaced in one step or not at all.

    Raises:
        OSError: with the path and the reason, when it cannot be written.
    """
    with atomic_write(path) as file:
        _write(content, file)


def _write(content: dict[str, Any], file: BinaryIO) -> None:
    torch.save({**content, "format": FORMAT, "version": __version__}, file)


def save_latest(folder: Path, content: dict[str, Any]) -> None:
    """Replace the latest checkpoint of a run and keep the one before it until the next save."""
    latest = folder / LATEST
    with atomic_write(latest) as file:
        _write(content, file)
        to_disk(file)
        if latest.exists():   # only now: what fails to be written costs neither of the two
            _keep(latest, folder / PREVIOUS)


def _keep(latest: Path, previous: Path) -> None:
    # A second name for the same file: at no moment is there a folder without a good checkpoint.
    link = previous.with_name(f"{previous.name}{TEMPORARY}{os.getpid()}")
    link.unlink(missing_ok=True)
    try:
        os.link(latest, link)
        os.replace(link, previous)
        link.unlink(missing_ok=True)   # where both were one file already, a rename leaves the link
    except OSError:   # no hard links on this file system
        with open(latest, "rb") as source, atomic_write(previous) as file:
            shutil.copyfileobj(source, file)


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest good checkpoint that the run in `folder` can go on from; None where there is none at all.

    Which file it is, the log says. A latest checkpoint that was read and is wrong is set aside.

    Raises:
        UserError: when there are checkpoints, but no good one.
        OSError, MemoryError: when one cannot be read, which says nothing about what is in it.
    """
    problems: dict[str, str] = {}
    for path in (folder / LATEST, folder / PREVIOUS):
        try:
            content = load(path)
            _check(content.get("training", {}), TRAINING, f"{path} cannot be resumed, though it may be evaluated")
        except FileNotFoundError:
            continue
        except UserError as error:
            problems[path.name] = str(error)
            continue
        if distributed.is_main():
            if LATEST in problems:
                # Out of the way of the next save, which would make it the previous one and so lose the good one.
                os.replace(folder / LATEST, folder / DAMAGED)
                logger.warning("%s; kept as %s, going on from %s", problems[LATEST], DAMAGED, path.name)
            elif path.name == PREVIOUS:
                logger.warning("there is no %s in %s; going on from %s", LATEST, folder, PREVIOUS)
            else:
                logger.info("going on from %s", path)
        return content
    if problems:
        raise UserError("; ".join(problems.values()))
    return None


def load(path: str | Path, key: str | None = None) -> dict[str, Any]:
    """Read a checkpoint of this project, or the weights of another one: a dict with at least `state_dict`.

    Of a file of another project only the weights come back, a whole number under `epoch`, and as `method` the name of the method
    where an entry of the file tells it.

    Args:
        key: which weights of several, see `foreign.find_weights`.
    Raises:
        FileNotFoundError: when there is no such file.
        UserError: when it is damaged, holds other objects, or is something else.
        OSError, MemoryError: when it cannot be read.
    """
    path = Path(path)
    content = read_file(path)
    version = content.get("format") if isinstance(content, dict) else None
    if version is not None and (type(version) is not int or version != FORMAT):
        raise UserError(f"{path} has format {version}, this version reads format {FORMAT}; use the version it is from")
    weights = find_weights(content, path, key)
    if version is None:
        found = {"state_dict": weights}
        if type(content.get("epoch")) is int:
            found["epoch"] = content["epoch"]
        for entry in METHOD_OF_ENTRY.keys() & content.keys():
            found["method"] = METHOD_OF_ENTRY[entry]
        return found
    _check(content, CONTENT, f"{path} is not a checkpoint of this project")
    return {**content, "state_dict": weights, "epoch_kind": _epoch_kind(path, content)}


def _epoch_kind(path: Path, content: dict[str, Any]) -> str:
    """How the epoch of a checkpoint was chosen. Older versions called the latest one the best where it happened to be."""
    kind, training = content["epoch_kind"], content.get("training")
    config = training.get("config") if isinstance(training, dict) else None
    if not kind.startswith("best on") or path.name not in (LATEST, PREVIOUS) or not isinstance(config, dict):
        return kind
    return "last epoch" if config.get("epochs") == content["epoch"] else "epoch"


def _check(content: Any, expected: dict[str, Any], complaint: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{complaint}: expected a dict, got {type(content).__name__}")
    for name, kind in expected.items():
        if not isinstance(content.get(name, ...), kind):
            found = type(content[name]).__name__ if name in content else "missing"
            raise UserError(f"{complaint}: its entry {name!r} is {found}")


def hash_weights(weights: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of the names and the bits of a state_dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(backbone: nn.Module, weights: dict[str, Tensor], source: str | Path, *,
                 new_classifier: bool = False, is_start: bool = False) -> list[str]:
    """Copy weights into a backbone.

    Args:
        new_classifier: leave those tensors of the classifiers as they are that `weights` lack or have in another shape, and the
            first layer where its kernel is another one and the backbone says which it is (`stem_names`).
        is_start: training begins with them: where they are the published network's, without a tensor of the exits that were added
            to it (`added_names`), these stay as they are.
    Returns:
        The names of the tensors that were left as they are.
    Raises:
        UserError: naming the first tensor that differs, when the weights are another network's.
    """
    own, left = backbone.state_dict(), _left_alone(backbone, weights, new_classifier, is_start)
    extra = [name for name in weights if name not in own]
    counted = any(name.endswith(COUNTER) for name in weights)   # torch 0.4 and before did not count
    for name, tensor in own.items():
        if name not in weights and name.endswith(COUNTER) and not counted:
            continue
        fits = name in weights and weights[name].shape == tensor.shape
        if name in left:
            continue
        if name not in weights:
            others = f", and {len(extra)} others such as {extra[0]}" if extra else ""
            raise UserError(f"{source} does not fit this architecture: it has no {name} (expected shape {list(tensor.shape)}); "
                            f"it has {len(weights) - len(extra)} of the {len(own)} tensors of this network{others}")
        if weights[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{source} does not fit this architecture: {name} is of type {weights[name].dtype}, "
                            f"expected {tensor.dtype}")
        if not fits:
            anew = is_start and name in _left_alone(backbone, weights, True, True)
            raise UserError(f"{source} does not fit this architecture: {name} has shape {list(weights[name].shape)}, "
                            f"expected {list(tensor.shape)}{'; --new_classifier starts it anew' if anew else ''}")
        if not weights[name].isfinite().all():
            raise UserError(f"{source} has NaN or infinite weights in {name}")
    if extra:
        raise UserError(f"{source} does not fit this architecture: it has {extra[0]}, which this network has not")
    backbone.load_state_dict({name: tensor for name, tensor in weights.items() if name not in left}, strict=False)
    return left


def _left_alone(backbone: nn.Module, weights: dict[str, Tensor], new_classifier: bool, is_start: bool) -> list[str]:
    """Names of the tensors of a backbone that `weights` are not copied into, see `load_weights`."""
    own = backbone.state_dict()
    exits, added, stem = (tuple(f"{name}." for name in getattr(backbone, names, getattr(Backbone, names)))
                          for names in ("exit_names", "added_names", "stem_names"))
    if not new_classifier:
        is_plain = is_start and not any(name.startswith(added) for name in weights)
        return [name for name in own if is_plain and name.startswith(added)]
    counted = any(name.endswith(COUNTER) for name in weights)
    other = {name for name, tensor in own.items() if name in weights and weights[name].shape != tensor.shape}
    lacking = {name for name in own if name not in weights and (counted or not name.endswith(COUNTER))}
    left = {name for name in own if name.startswith(exits) and name in other | lacking}
    if any(name.startswith(stem) for name in other):   # all of the first layer: its statistics are those of the other kernel
        left |= {name for name in own if name.startswith(stem)}
    return [name for name in own if name in left]
