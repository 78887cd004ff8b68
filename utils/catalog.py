"""What is known of each data set before it is opened. Loads nothing, so that the command line starts fast."""
from __future__ import annotations

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


def title_of(dataset: str) -> str:
    """Name of a data set in plots and tables."""
    return DATASETS[dataset].title if dataset in DATASETS else dataset
