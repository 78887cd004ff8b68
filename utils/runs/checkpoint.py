"""Checkpoints: written so that a file is whole or absent, read without ever running code from it.

A checkpoint holds the backbone's state_dict under its released names and what is needed to use it: architecture flags,
method, temperatures, class names, hold-out split. `model_latest.pth` also holds what is needed to go on training.
"""
from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from utils import __version__
from utils.core import distributed
from utils.core.errors import UserError, is_out_of_memory
from utils.core.files import TEMPORARY, atomic_write, to_disk

FORMAT = 1
LATEST, BEST, PREVIOUS, DAMAGED = "model_latest.pth", "model_best.pth", "model_previous.pth", "model_damaged.pth"
TEST_BEST = "model_test_best.pth"   # by --paper_protocol only
NAMES = LATEST, BEST, PREVIOUS, DAMAGED, TEST_BEST

logger = logging.getLogger("boostnet")

# Of weights, and of the counters of batch normalisation.
WEIGHT_TYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32}
# What is beside the weights in a checkpoint of this project, and under `training` in one that a run can go on from.
CONTENT = {"architecture": dict, "dataset": str, "class_names": list, "method": str, "temperatures": list,
           "trainable_ensemble": bool, "split": (dict, type(None)), "epoch": int, "epoch_kind": str}
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


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project or of a released one: a dict with at least `state_dict`.

    The released forms `{'state_dict': {...}}` and `{'state_dict': {'model': {...}}}`, with or without a leading `module.` in
    the names, come back with plain names.

    Raises:
        FileNotFoundError: when there is no such file.
        UserError: when it is damaged, holds code, or is something else.
        OSError, MemoryError: when it cannot be read.
    """
    path = Path(path)
    try:
        stored = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path}: no such checkpoint") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not a checkpoint") from error
    content = _parse(stored, path)
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        weights = weights["model"]
    if not isinstance(weights, dict) or not weights or not all(map(_is_weight, weights.items())):
        raise UserError(f"{path} is not a checkpoint: expected a dict with the weights under 'state_dict'")
    if type(content.get("format", FORMAT)) is not int or content.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path} has format {content['format']}, this version reads format {FORMAT}; use the version it is from")
    if "format" in content or "architecture" in content:   # the released files say nothing about themselves
        _check(content, CONTENT, f"{path} is not a checkpoint of this project")
    return {**content, "state_dict": {name.removeprefix("module."): t for name, t in weights.items()}}


def _is_weight(entry: tuple[Any, Any]) -> bool:
    name, tensor = entry
    return (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
            and tensor.device.type == "cpu" and tensor.dtype in WEIGHT_TYPES)


def _check(content: Any, expected: dict[str, Any], complaint: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{complaint}: expected a dict, got {type(content).__name__}")
    for name, kind in expected.items():
        if not isinstance(content.get(name, ...), kind):
            found = type(content[name]).__name__ if name in content else "missing"
            raise UserError(f"{complaint}: its entry {name!r} is {found}")


def _parse(stored: bytes, path: Path) -> Any:
    """What the bytes of a checkpoint hold. They are in memory, so that whatever is wrong here is wrong with them."""
    file = io.BytesIO(stored)
    if zipfile.is_zipfile(file):   # torch.load does not verify the checksums of its own format
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except Exception as error:   # whatever the damage makes of the table of contents
            raise UserError(f"{path} is damaged: {error}") from error
        if damaged:
            raise UserError(f"{path} is damaged: the checksum of {damaged} does not fit")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it holds more than tensors and plain values, which could run code "
                        f"({_unsafe(stored)})") from error
    except Exception as error:   # torch.load raises a dozen kinds on damaged files
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint: {reason}") from error


def _unsafe(stored: bytes) -> str:
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(stored))) or "unknown content"
    except Exception:
        return "not a checkpoint file"


def hash_weights(weights: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of the names and the bits of a state_dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(backbone: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copy weights into a backbone.

    Raises:
        UserError: naming the first tensor that differs, when the weights are another network's.
    """
    own = backbone.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise UserError(f"{source} does not fit this architecture: it has no {name} (expected shape {list(tensor.shape)})")
        if weights[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{source} does not fit this architecture: {name} is of type {weights[name].dtype}, "
                            f"expected {tensor.dtype}")
        if weights[name].shape != tensor.shape:
            raise UserError(f"{source} does not fit this architecture: {name} has shape {list(weights[name].shape)}, "
                            f"expected {list(tensor.shape)}")
        if not weights[name].isfinite().all():
            raise UserError(f"{source} has NaN or infinite weights in {name}")
    extra = [name for name in weights if name not in own]
    if extra:
        raise UserError(f"{source} does not fit this architecture: it has {extra[0]}, which this network has not")
    backbone.load_state_dict(weights)
