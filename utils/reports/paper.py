"""Published accuracies of the BoostNet paper (arXiv:2211.16726), for comparison in tables and plots, and of other recipes.

Anytime numbers are those of its tables 1 and 2 (some text versions give the two column groups of table 2 each other's
heading; the MACs settle which is which); the released training scripts pick these checkpoints by test accuracy.
Budgeted numbers are read off its figures by eye, to about 0.2 points; they come from the released program's sweep over
q^n, not from eq. 9.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """Top-1 accuracy in percent at costs in 10^6 MACs; `baseline` is joint training with gradient rescaling."""

    millions: tuple[float, ...]
    baseline: tuple[float, ...]
    boostnet: tuple[float, ...]
    source: str


BACKBONES = {"msdnet": "MSDNet", "ranet": "RANet"}   # as its tables call them
BY_EYE = "figure, read by eye"

# Accuracy of every exit, by (dataset, backbone).
ANYTIME = {
    ("cifar100", "msdnet"): Published(
        millions=(15.14, 25.51, 37.79, 52.06, 62.18, 74.07, 87.73, 100.0, 110.1, 121.7),
        baseline=(64.60, 67.94, 69.36, 71.53, 72.76, 74.03, 74.65, 75.37, 75.53, 75.98),
        boostnet=(65.32, 70.01, 72.34, 74.15, 75.24, 75.85, 75.94, 76.51, 76.53, 76.30),
        source="table 1"),
    ("cifar100", "ranet"): Published(
        millions=(15.83, 31.31, 44.69, 50.40, 60.71, 63.72, 90.26, 95.00),
        baseline=(66.71, 69.11, 71.22, 71.99, 72.86, 72.93, 73.88, 74.69),
        boostnet=(67.53, 70.83, 73.17, 73.39, 74.20, 74.05, 74.75, 75.08),
        source="table 1"),
    ("imagenet", "msdnet"): Published(
        millions=(615.7, 1436, 2283, 2967, 3254),
        baseline=(63.69, 71.12, 73.60, 74.46, 75.24),
        boostnet=(64.78, 71.63, 74.48, 75.35, 76.05),
        source="table 2"),
    ("imagenet", "ranet"): Published(
        millions=(435.0, 888.7, 1153, 1352, 2280, 2588, 3236, 3333),
        baseline=(63.29, 67.59, 69.90, 70.84, 74.25, 74.73, 74.29, 74.46),
        boostnet=(64.19, 68.33, 71.07, 71.53, 74.54, 74.90, 75.09, 74.66),
        source="table 2"),
}

# How the anytime models were trained, by the flags' dest names, and images per step of all processes together. The baseline
# of MSDNet rescales gradients; RANet's does not in the released code, though the paper speaks of it.
TRAINING = {"optimizer": "sgd", "lr_f": 0.1, "lr_type": "multistep", "decay_rate": 0.1, "momentum": 0.9, "nesterov": False,
            "warmup_epochs": 0.0, "label_smoothing": 0.0, "ema": None, "weight_decay": [1e-4],
            "loss_equal": False, "trainable_ensemble": False, "use_valid": False, "start_epoch": 0, "checkpoint": None}
SCHEDULES = {"cifar100": {"epochs": 300, "lr_milestones": [150, 225]}, "imagenet": {"epochs": 90, "lr_milestones": [30, 60]}}
IMAGES_PER_STEP = {"cifar100": 64, "imagenet": 256}
TRAINING_IMAGES = {"cifar100": 50_000, "imagenet": 1_281_167}
TEST_IMAGES = {"cifar100": 10_000, "imagenet": 50_000}
ARCHITECTURES = {"msdnet": "msdnet_ge", "ranet": "ranet"}


@dataclass(frozen=True)
class Recipe:
    """What another project publishes of a network and how that was trained.

    Attributes:
        millions, top1: cost in 10^6 MACs and accuracy in percent of every exit.
        settings: of the training, by the flags' dest names and as `FinishedRun.settings` has them.
        images_per_step: of all processes together.
    """

    title: str
    millions: tuple[float, ...]
    top1: tuple[float, ...]
    settings: dict[str, Any]
    images_per_step: int


# The released weights of L2W-DEN (arXiv:2209.08310): top-1 on the validation images of ImageNet, which chose the epoch as well.
_L2W = {"dataset": "imagenet", "arch": "msdnet", "method": "l2w", "training images": TRAINING_IMAGES["imagenet"],
        "test images": TEST_IMAGES["imagenet"], **TRAINING, "lr_f": 0.8, "lr_type": "cosine", "lr_step": "batch",
        "meta_net_hidden_size": 500, "meta_net_num_layers": 1, "meta_interval": 100, "meta_lr": 1e-4, "meta_weight_decay": 1e-4,
        "epsilon": 0.3, "target_p_index": 15, "meta_net_input_type": "loss", "constraint_dimension": "mat"}
del _L2W["decay_rate"]   # a cosine has none
_L2W_ACCURACIES = {   # by 10^6 MACs: 100 epochs, and 300 with label smoothing
    (339.9, 685.5, 1008, 1254, 1361): ((59.54, 67.22, 71.03, 72.33, 73.93), (61.64, 67.89, 71.61, 73.82, 75.03)),
    (514.7, 1171, 1845, 2501, 2742): ((60.05, 69.13, 73.33, 75.19, 76.30), (61.41, 70.70, 74.38, 75.80, 76.66)),
    (615.7, 1436, 2283, 2967, 3254): ((59.24, 69.65, 73.94, 75.66, 76.72), (60.94, 71.88, 75.13, 76.03, 76.82)),
}
RECIPES = [Recipe(f"L2W-DEN, {epochs} epochs{', label smoothing 0.1' if smoothing else ''}", millions, top1,
                  {**_L2W, "epochs": epochs, "label_smoothing": smoothing}, 4096)
           for millions, both in _L2W_ACCURACIES.items()
           for epochs, smoothing, top1 in zip((100, 300), (0.0, 0.1), both)]

# Budgeted batch prediction, several model sizes combined, by (dataset, backbone).
BUDGETED = {
    ("cifar100", "msdnet"): Published(
        millions=(20, 25, 30, 40, 50, 60, 70, 80, 90),
        baseline=(69.9, 72.3, 73.2, 73.8, 74.6, 74.9, 74.8, 74.7, 74.7),
        boostnet=(70.3, 73.1, 74.3, 75.2, 75.5, 75.7, 75.8, 75.8, 75.8),
        source=BY_EYE),
    ("cifar100", "ranet"): Published(
        millions=(20, 25, 30, 40, 50, 60, 75, 100),
        baseline=(71.3, 72.4, 72.5, 73.7, 74.2, 74.5, 75.3, 75.5),
        boostnet=(71.8, 73.2, 73.5, 74.5, 75.2, 75.7, 75.9, 76.0),
        source=BY_EYE),
    ("imagenet", "msdnet"): Published(
        millions=(500, 750, 1000, 1250, 1500, 1750, 2000, 2500),
        baseline=(64.2, 70.2, 72.0, 73.5, 74.1, 74.8, 75.2, 75.4),
        boostnet=(65.3, 71.1, 72.8, 73.8, 74.8, 75.3, 75.6, 75.8),
        source=BY_EYE),
    ("imagenet", "ranet"): Published(
        millions=(500, 750, 1000, 1250, 1500, 1750, 2000, 2500),
        baseline=(66.7, 70.2, 72.3, 73.4, 74.2, 74.7, 74.9, 74.9),
        boostnet=(67.7, 71.0, 73.1, 74.2, 75.0, 75.3, 75.4, 75.4),
        source=BY_EYE),
}
