"""The training methods; `utils.options.catalog` has their names and which class each of them is."""
from __future__ import annotations

import argparse
import pkgutil
from typing import Any

import torch
from torch import nn

from models import BoostedNet
from utils.core.errors import UserError
from utils.methods.base import Method, Outcome
from utils.options.catalog import METHODS

__all__ = ["Method", "Outcome", "build_method", "method_class"]


def method_class(name: str) -> type[Method]:
    """The class of a method of the catalog."""
    return pkgutil.resolve_name(f"{__name__}.{METHODS[name].implementation}")


def build_method(args: argparse.Namespace, model: BoostedNet, optimizer: torch.optim.Optimizer, *, network: nn.Module,
                 teacher: BoostedNet | None = None) -> Method:
    """The method of the parsed flags.

    Args:
        network: what to call in training, see `Method`.
        teacher: network of --teacher, for the methods that take one.
    Raises:
        UserError: when the flags do not fit the network.
    """
    method = method_class(args.method)
    options: dict[str, Any] = method.options(args) | ({"teacher": teacher} if teacher else {})
    options["label_smoothing"] = args.label_smoothing
    try:
        return method(model, optimizer, network=network, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
