"""What is known of each data set before it is opened, of each network and of each training method: names, titles, facts.

The one list of each kind of name. It loads nothing; where a name stands for code, the code is named as text.
"""
from __future__ import annotations

import re
from typing import NamedTuple


class DataSet(NamedTuple):
    """Facts of a data set; None means that the folder itself says.

    Attributes:
        title: name in plots and tables.
        num_classes: outputs a classifier needs.
        image_size: height and width in pixels.
        n_train: training images.
        valid_size: training images held out by default (of a folder: a tenth).
    """

    title: str
    num_classes: int | None
    image_size: int | None
    n_train: int | None
    valid_size: int | None


DATASETS = {
    "cifar10": DataSet("CIFAR-10", 10, 32, 50_000, 5_000),
    "cifar100": DataSet("CIFAR-100", 100, 32, 50_000, 5_000),
    "imagenet": DataSet("ImageNet", 1000, 224, None, 50_000),
    "glyphs": DataSet("glyphs (synthetic images)", 36, 32, 20_000, 2_000),
    "folder": DataSet("own images", None, None, None, None),
}
CROPPED = ("imagenet", "folder")   # those that may have images of any size


# First layer of a network -> side in pixels of the images that the paper has it for. small: a 3x3 convolution; large: a 7x7
# convolution with stride 2 and max pooling with stride 2.
STEMS = {"small": 32, "large": 224}
LARGE_FROM = 97   # side from which the large one is taken where nothing else is said
LEAST_SIDE, LARGEST_SIDE = 32, 4096


def stem_for(image_size: int) -> str:
    """First layer of a network for images of this side where no other is chosen."""
    return "large" if image_size >= LARGE_FROM else "small"


def is_cropped(dataset: str, image_size: int, stem: str | None = None) -> bool:
    """Whether images are scaled and cropped to their side; all others have to be of that side and are held in memory.

    Args:
        stem: first layer of the network; None for the one of that side.
    """
    return (stem or stem_for(image_size)) == "large" and dataset in CROPPED


def title_of(dataset: str) -> str:
    """Name of a data set in plots and tables."""
    return DATASETS[dataset].title if dataset in DATASETS else dataset


class TrainingMethod(NamedTuple):
    """Facts of a training method.

    Attributes:
        title: name in plots and tables.
        implementation: module and class below `utils.methods`. Two names with one class differ in the head.
        boosted: its exits predict the boosted sum F_n; otherwise each exit predicts alone.
        flags: dest names of the flags that it reads and not every method does.
        defaults: of those flags whose default depends on the method.
        sgd_only: it computes the optimiser's step itself, and knows SGD's alone.
        second_stage: it builds on a trained network, which has to be given and stays as it is.
        wrapper: class in `models` that makes the network of this method from a backbone; None where that is the backbone itself.
        one_call: all gradients of a step pass through one call of the whole network, so that what is called may be a wrapper that
            does more, such as averaging them over several processes; for other methods `Method.update` averages.
    """

    title: str
    implementation: str
    boosted: bool
    flags: frozenset[str]
    defaults: dict[str, float] = {}
    sgd_only: bool = False
    second_stage: bool = False
    wrapper: str | None = None
    one_call: bool = True


_WEIGHTING = frozenset(("meta_net_hidden_size", "meta_net_num_layers", "meta_net_input_type", "constraint_dimension", "epsilon",
                        "target_p_index", "meta_interval", "meta_lr", "meta_weight_decay"))
_DISTILLATION = frozenset(("distill_weight", "distill_T", "teacher"))

METHODS = {
    "boost": TrainingMethod("BoostNet", "base:Method", True, frozenset(("trainable_ensemble", "loss_equal"))),
    "joint": TrainingMethod("joint training", "base:Method", False, frozenset(("loss_equal",))),
    "l2w": TrainingMethod("sample weighting", "l2w:SampleWeighting", False, _WEIGHTING, sgd_only=True, one_call=False),
    "block_losses": TrainingMethod("block-dependent losses", "block_losses:BlockLosses", False,
                                   _DISTILLATION | {"groups", "overlap", "include_final"},
                                   {"distill_weight": 0.0, "distill_T": 2.5}, one_call=False),
    "imta": TrainingMethod("collaborating exits", "imta:Collaboration", False, frozenset(("distill_weight", "distill_T")),
                           {"distill_weight": 0.9, "distill_T": 3.0}, second_stage=True, wrapper="CollaborativeNet",
                           one_call=False),
    "boost_l2w": TrainingMethod("BoostNet, sample weighting", "l2w:SampleWeighting", True, _WEIGHTING | {"trainable_ensemble"},
                                sgd_only=True, one_call=False),
    "boost_distill": TrainingMethod("BoostNet, distillation", "distillation:Distillation", True,
                                    _DISTILLATION | {"trainable_ensemble", "loss_equal"},
                                    {"distill_weight": 0.35, "distill_T": 2.5}),
}
ARCHITECTURES = {"msdnet": "MSDNet without rescaling", "msdnet_ge": "MSDNet", "ranet": "RANet",
                 "ranet_ge": "RANet with rescaling", "resnet18": "ResNet-18", "resnet18_ge": "ResNet-18 with rescaling",
                 "resnet34": "ResNet-34", "resnet34_ge": "ResNet-34 with rescaling"}
TEMPERATURE = 0.5   # of every exit, in the paper
METHOD_ALIASES = {"conventional": "joint"}

# The networks of the paper for anytime prediction, by family and first layer, as far as their flags differ from the defaults.
ANYTIME_NETWORKS = {
    ("msdnet", "small"): {"nBlocks": 10, "step": 2, "nChannels": 16},
    ("msdnet", "large"): {"nBlocks": 5, "base": 7, "step": 7, "growthRate": 16, "grFactor": [1, 2, 4, 4],
                          "bnFactor": [1, 2, 4, 4]},
    ("ranet", "small"): {"nBlocks": 2, "step": 4, "nChannels": 16, "scale_list": [1, 2, 3, 3], "grFactor": [4, 2, 1, 1],
                         "bnFactor": [4, 2, 1, 1]},
    ("ranet", "large"): {"nBlocks": 2, "step": 8, "nChannels": 64, "growthRate": 16, "scale_list": [1, 2, 3, 4],
                         "grFactor": [4, 2, 2, 1], "bnFactor": [4, 2, 2, 1]},
}

# Choices of flags, and what titles and legends call those that are not the usual ones.
THRESHOLDS = {"geometric": "eq9", "optimised": "optimised"}   # family of the points in result files, by --thresholds
RUNTIMES = ("torch", "onnx")   # of early exit
DECODERS = ("pillow", "torchcodec")
ENSEMBLES = {"none": "each exit alone", "boost": "exits added up", "average": "exits averaged", "poe": "product of exits"}
POLICIES = {"confidence": None, "entropy": "leaving by entropy", "margin": "leaving by margin", "patience": "leaving by patience"}


def family_of(arch: str) -> str:
    """What networks of the same kind have in common in their names: msdnet, ranet or resnet; "own" for FILE.py:FUNCTION."""
    return "own" if ":" in arch else re.match("[a-z]*", arch)[0]


def arch_title(arch: str) -> str:
    """Name of a network in plots and tables."""
    return ARCHITECTURES.get(arch, arch)


def method_title(method: str) -> str:
    """Name of a training method in plots and tables."""
    return METHODS[method].title if method in METHODS else method
