"""Early-exit backbones and the boosted head. `build_backbone` alone knows flags; networks take keywords."""
from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.backbone import Backbone, check_backbone, map_state
from models.boosted_head import BoostedNet, expand_temperatures
from models.chain import ChainNet, PooledClassifier
from models.collaboration import CollaborativeNet
from models.ensembles import AveragedNet, read_as
from models.msdnet import MSDNet
from models.own import build_own
from models.ranet import RANet
from models.resnet import ResNet
from utils.options.catalog import family_of

__all__ = ["AveragedNet", "Backbone", "BoostedNet", "ChainNet", "CollaborativeNet", "MSDNet", "PooledClassifier", "RANet",
           "ResNet", "build_backbone", "build_shapes", "check_backbone", "expand_temperatures", "map_state", "read_as"]


# Keyword of a network -> its flag.
FLAGS = {
    "n_blocks": "--nBlocks", "n_channels": "--nChannels", "step": "--step", "step_mode": "--stepmode",
    "growth_rate": "--growthRate", "gr_factor": "--grFactor", "bn_factor": "--bnFactor", "reduction": "--reduction",
    "bottleneck": "--bottleneck", "image_size": "--image_size", "stem": "--stem", "base": "--base", "prune": "--prune",
    "block_step": "--block-step", "scale_list": "--scale-list", "compress_factor": "--compress-factor",
}
MSDNET_ONLY, RANET_ONLY = {"base", "prune"}, {"block_step", "scale_list", "compress_factor"}
# Family -> keywords that its network takes of those.
KEYWORDS = {"msdnet": FLAGS.keys() - RANET_ONLY, "ranet": FLAGS.keys() - MSDNET_ONLY, "resnet": {"image_size", "stem"}}


def build_backbone(args: Any) -> nn.Module:
    """Backbone of the parsed flags, or of a `NetworkSpec`; their names are the released command line's.

    Raises:
        ValueError: naming the flags, when they do not describe a network.
    """
    family = family_of(args.arch)
    if family == "own":
        return build_own(args.arch, num_classes=args.num_classes, image_size=args.image_size)
    network = {"msdnet": MSDNet, "ranet": RANet, "resnet": partial(ResNet, args.arch.removesuffix("_ge"))}[family]
    keywords = {name: getattr(args, FLAGS[name].lstrip("-").replace("-", "_")) for name in KEYWORDS[family]}
    try:
        return network(**keywords, num_classes=args.num_classes, rescale_gradients=args.arch.endswith("_ge"))
    except ValueError as error:   # it names keywords
        raise ValueError(re.sub(r"\b\w+\b", lambda word: FLAGS.get(word[0], word[0]), str(error))) from error


def build_shapes(args: Any) -> nn.Module:
    """`build_backbone` on the meta device: shapes without storage, in a fraction of the time. A person's own network, whose
    code may want to see values, is built as it is.

    Raises:
        ValueError: as `build_backbone`.
    """
    if family_of(args.arch) == "own":
        return build_backbone(args)
    with torch.device("meta"), _NoInitialisation():
        return build_backbone(args)


class _NoInitialisation(TorchFunctionMode):
    """Leaves out writing to tensors in place, for those that have no storage."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords, name = keywords or {}, getattr(function, "__name__", "")
        tensor = arguments[0] if arguments else keywords.get("tensor")   # torch.nn.init hands it on by name
        if name.endswith("_") and not name.endswith("__") and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return function(*arguments, **keywords)
