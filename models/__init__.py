"""Early-exit backbones and the boosted head. `build_backbone` alone reads the argument namespace."""
from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from models.boosted_head import BoostedNet, expand_temperatures
from models.collaboration import CollaborativeNet
from models.ensembles import AveragedNet, read_as
from models.msdnet import MSDNet
from models.ranet import RANet

__all__ = ["AveragedNet", "BoostedNet", "CollaborativeNet", "MSDNet", "RANet", "build_backbone", "expand_temperatures", "read_as",
           "select"]


def build_backbone(args: argparse.Namespace) -> nn.Module:
    """Backbone of the parsed flags; their names are the released command line's, the networks take keywords.

    Raises:
        ValueError: when the flags do not describe a network.
    """
    shared: dict[str, Any] = dict(
        n_blocks=args.nBlocks, n_channels=args.nChannels, step=args.step, step_mode=args.stepmode,
        growth_rate=args.growthRate, gr_factor=args.grFactor, bn_factor=args.bnFactor, reduction=args.reduction,
        bottleneck=args.bottleneck, num_classes=args.num_classes, image_size=args.image_size,
        rescale_gradients=args.arch.endswith("_ge"))
    if args.arch.startswith("msdnet"):
        return MSDNet(base=args.base, prune=args.prune, **shared)
    return RANet(block_step=args.block_step, scale_list=args.scale_list, compress_factor=args.compress_factor, **shared)


def select(state: Any, index: Tensor) -> Any:
    """Keep only the rows `index` of every tensor in a state; the state itself is left alone.

    Args:
        state: what `start` or `step` of a backbone returned.
        index: (k,) int64 row numbers, or a (B,) bool mask, which costs a wait for the device.
    """
    if isinstance(state, Tensor):
        return state[index] if index.dtype == torch.bool else state.index_select(0, index)
    if isinstance(state, dict):
        return {name: select(value, index) for name, value in state.items()}
    return [select(value, index) for value in state]
