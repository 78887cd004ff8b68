"""How a method on the command line becomes a model."""
from __future__ import annotations

import argparse

from models import BoostedNet, build_backbone, expand_temperatures
from utils.errors import UserError


def build_model(args: argparse.Namespace) -> BoostedNet:
    """Network of the parsed flags. The joint baseline is the boosted head with every temperature at zero.

    Raises:
        UserError: when the flags do not describe a network.
    """
    try:
        backbone = build_backbone(args)
        values = [0.0] if args.method == "joint" else args.ensemble_reweight
        return BoostedNet(backbone, expand_temperatures(values, backbone.n_exits), args.trainable_ensemble)
    except ValueError as error:
        raise UserError(str(error)) from error
