"""A person's own network: FUNCTION of FILE.py, which makes a backbone."""
from __future__ import annotations

import functools
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from models.backbone import check_backbone
from utils.options.network import OwnNetwork


def build_own(arch: str, *, num_classes: int, image_size: int) -> nn.Module:
    """The network of --arch FILE.py:FUNCTION, checked: FUNCTION is called with `num_classes` and `image_size`.

    Args:
        arch: an `OwnNetwork`, which a person named; the mere name, as a checkpoint has it, runs nothing.
    Raises:
        ValueError: in one line, for whatever goes wrong in that file, and for a network that is no backbone.
    """
    if not isinstance(arch, OwnNetwork):
        raise ValueError(f"the network was made by {arch}; code runs only where its user names it: pass the file again, --arch "
                         f"FOLDER/{arch}")
    try:
        module = _load(arch.file, arch.file_hash())
        make = getattr(module, arch.function, None)
        if not callable(make):
            raise ValueError(f"{arch.file} has no function {arch.function}")
        net = make(num_classes=num_classes, image_size=image_size)
        check_backbone(net, num_classes=num_classes, image_size=image_size)
        _check_dtype(net)
    except (Exception, SystemExit) as error:
        raise ValueError(f"argument --arch: {arch}: {_described(error, arch.file)}") from error
    if getattr(net, "image_size", None) is None:
        net.image_size = image_size
    return net


def _check_dtype(net: nn.Module) -> None:
    """The images that the programs read have PyTorch's default dtype."""
    others = {str(tensor.dtype) for tensor in net.parameters()} - {str(torch.get_default_dtype())}
    if others:
        raise ValueError(f"{type(net).__name__} has parameters in {' and '.join(sorted(others))}; the programs compute in "
                         f"{torch.get_default_dtype()}")


@functools.cache   # a file runs once; by its hash, so that a changed one runs again
def _load(file: str, file_hash: str) -> ModuleType:
    path = Path(file).resolve()
    name = f"_network_of_{path.stem}_{file_hash[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module   # dataclasses look their module up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))   # for what it imports from beside it
    spec.loader.exec_module(module)
    return module


def _described(error: BaseException, file: str) -> str:
    """An error in one line, with the place in the file where there is one."""
    places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(Path(file).resolve())]
    if isinstance(error, SyntaxError) and error.lineno:   # a file with null bytes has no line
        places = [error.lineno]
    kind = "" if isinstance(error, ValueError) and not places else f"{type(error).__name__}: "
    message = " ".join(str(error).split())
    return f"line {places[-1]}, {kind}{message}" if places else f"{kind}{message}"
