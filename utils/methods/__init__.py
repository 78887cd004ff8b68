"""The training methods by their names on the command line; what the command line knows of them is in `utils.options.catalog`."""
from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from models import BoostedNet, build_backbone, expand_temperatures
from utils.core.distributed import world_size
from utils.core.errors import UserError
from utils.methods.base import Method, Outcome
from utils.methods.block_losses import BlockLosses
from utils.methods.distillation import Distillation
from utils.methods.imta import Collaboration
from utils.methods.l2w import SampleWeighting
from utils.options import catalog

__all__ = ["METHODS", "Method", "Outcome", "build_method", "build_model", "require_one_process"]

# Two names with one class differ in the head: catalog.METHODS says whose exits are boosted.
METHODS: dict[str, type[Method]] = {
    "boost": Method, "joint": Method, "l2w": SampleWeighting, "block_losses": BlockLosses, "imta": Collaboration,
    "boost_l2w": SampleWeighting, "boost_distill": Distillation,
}


def build_model(args: argparse.Namespace) -> BoostedNet:
    """Network of the parsed flags. Exits that predict alone are the boosted head with every temperature at zero.

    Raises:
        UserError: when the flags do not describe a network.
    """
    try:
        backbone = METHODS[args.method].adapt(build_backbone(args))
        values = args.ensemble_reweight if catalog.METHODS[args.method].boosted else [0.0]
        return BoostedNet(backbone, expand_temperatures(values, backbone.n_exits), args.trainable_ensemble)
    except ValueError as error:
        raise UserError(str(error)) from error


def require_one_process(args: argparse.Namespace) -> None:
    """Refuse several processes to a method that cannot average its gradients over them.

    Raises:
        UserError: naming the methods that can.
    """
    if world_size() > 1 and not catalog.METHODS[args.method].one_call:
        able = ", ".join(name for name, facts in catalog.METHODS.items() if facts.one_call)
        raise UserError(f"--method {args.method} trains in one process only, this run has {world_size()}; start it without "
                        f"torchrun, or choose one of {able}")


def build_method(args: argparse.Namespace, model: BoostedNet, optimizer: torch.optim.Optimizer, *, network: nn.Module,
                 teacher: BoostedNet | None = None) -> Method:
    """The method of the parsed flags.

    Args:
        network: `model`, or what averages its gradients over the processes.
        teacher: network of --teacher, for the methods that take one.
    """
    method = METHODS[args.method]
    options: dict[str, Any] = method.options(args) | ({"teacher": teacher} if teacher else {})
    return method(model, optimizer, network=network, **options)
