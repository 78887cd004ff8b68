"""The data of a run: `build_data` opens any of the data sets, `Data` hands out batches that are ready for the network.

    data = build_data(dataset="cifar100", data_root="data", batch_size=64, device="cuda", seed=0, use_valid=True)
    for images, labels, share in data.train(epoch=0):
        ...

Small images (32x32) live on the device as one tensor; larger ones are decoded by worker processes. Order and augmentation
follow from (seed, epoch, image) in both cases, and nothing waits for the device.
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.core.errors import UserError
from utils.data import cifar
from utils.data.augment import statistics_of
from utils.data.batches import Batch, Batches, Data
from utils.data.decoders import DECODERS
from utils.data.device_images import DeviceImages
from utils.data.folders import scan_once
from utils.data.glyphs import read_glyphs
from utils.data.large_images import FolderImages
from utils.data.small_images import read_class_folders
from utils.data.split import Split
from utils.options.catalog import DATASETS

__all__ = ["Batch", "Batches", "Data", "Split", "build_data"]

logger = logging.getLogger("boostnet")


def build_data(*, dataset: str, data_root: str | Path, image_size: int = 32, batch_size: int = 64,
               eval_batch_size: int = 256, device: str | torch.device = "cpu", seed: int = 0, use_valid: bool = False,
               valid_size: int | None = None, split: Split | None = None, order: Tensor | None = None,
               augment_valid: bool = False, workers: int = 4,
               val_workers: int = 1, decoder: str = "pillow", skip_unreadable: bool = False, rank: int = 0, world: int = 1,
               quiet: bool = False) -> Data:
    """Open a data set.

    Args:
        dataset: one of `DATASETS`.
        data_root: its folder; see README "Data" for the layouts.
        image_size: 32, or 224 for `imagenet` and where a `folder` is to be cropped and scaled.
        batch_size: training images per process and step.
        use_valid: hold training images out; `valid_size` of them, drawn by `seed` unless `split` says which.
        split: a saved hold-out split to use again; implies `use_valid`.
        order: numbers of all training images in torchvision's order, the last `valid_size` of which are held out.
        augment_valid: read the hold-out with training augmentation, as the released code does.
        workers, val_workers: decoding processes for training and evaluation; images on the device need none.
        decoder: what decodes large images, one of `utils.data.decoders.DECODERS`.
        skip_unreadable: leave large images that cannot be read out instead of stopping.
        rank, world: this process and how many there are.
        quiet: no progress bars.
    Raises:
        FileNotFoundError: when the data are not there.
        UserError: when they are not what the flags say.
    """
    data_root, device = Path(data_root), torch.device(device)
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}; choose one of {', '.join(DATASETS)}")
    if decoder not in DECODERS:
        raise UserError(f"unknown decoder {decoder!r}; choose one of {', '.join(DECODERS)}")
    statistics = statistics_of(dataset, image_size)
    if dataset == "imagenet" or image_size != 32:
        train, test = _first_rank_first(
            lambda: scan_once(data_root, ("val", "test") if dataset == "imagenet" else ("test", "val")), rank)
        class_names = train.class_names
        train_set, valid_set, test_set = (
            FolderImages(listing, statistics=statistics, image_size=image_size, device=device, workers=n,
                         decoder=decoder, skip_unreadable=skip_unreadable)
            for listing, n in ((train, workers), (train, val_workers), (test, val_workers)))
    else:
        arrays = _first_rank_first(lambda: _read_small_images(dataset, data_root, quiet or rank > 0, rank == 0), rank)
        class_names = arrays["class_names"].tolist()
        train_set, test_set = (
            DeviceImages(arrays[f"{part}_images"], arrays[f"{part}_labels"], statistics=statistics,
                         flips=dataset != "glyphs", device=device)  # a mirrored 5 is nearly a 2
            for part in ("train", "test"))
        valid_set = train_set
    num_classes = _count_classes(dataset, class_names, data_root)
    for labels in (train_set.labels, test_set.labels):
        if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise UserError(f"{data_root} has labels from {int(labels.min())} to {int(labels.max())}; {dataset} has "
                            f"{num_classes} classes, 0 to {num_classes - 1}")
    if split is not None:
        split.check(train_set.labels)
    elif order is not None:
        split = _split_of_order(order, train_set.labels, dataset, data_root, valid_size or DATASETS[dataset].valid_size)
    elif use_valid:
        size = valid_size or DATASETS[dataset].valid_size or len(train_set.labels) // 10
        split = Split.draw(train_set.labels, size, seed)
    return Data(train_set, valid_set, test_set, class_names=class_names, num_classes=num_classes, image_size=image_size,
                split=split, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, rank=rank, world=world,
                augment_valid=augment_valid)


def _split_of_order(order: Tensor, labels: Tensor, dataset: str, data_root: Path, valid_size: int | None) -> Split:
    if dataset in cifar.ARCHIVES and not cifar.archive_folder(data_root, dataset).is_dir():
        raise UserError(f"index.pth numbers the images as in the python archive of {dataset}; in the class folders of "
                        f"{data_root} the same numbers mean other images")
    if valid_size is None:
        raise UserError("index.pth does not say how many of its images are held out, the last ones; pass --valid_size")
    return Split.from_permutation(labels, order, valid_size)


def _read_small_images(dataset: str, data_root: Path, quiet: bool, may_download: bool) -> dict[str, Any]:
    if dataset == "glyphs":
        return read_glyphs(data_root, quiet)
    if dataset in cifar.ARCHIVES:
        archive = cifar.archive_folder(data_root, dataset)
        if may_download and not archive.is_dir() and not (data_root / "train").is_dir():
            cifar.download(data_root, dataset)
        if archive.is_dir():
            return cifar.read_archive(data_root, dataset)
    return read_class_folders(data_root, 32, quiet)


def _first_rank_first(read: Callable[[], Any], rank: int) -> Any:
    """`read()` on rank 0 before all others, who then find the download and the cache in place."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if together and rank > 0:
        dist.barrier()
    try:
        return read()
    finally:
        if together and rank == 0:
            dist.barrier()


def _count_classes(dataset: str, class_names: list[str], data_root: Path) -> int:
    expected = DATASETS[dataset].num_classes or len(class_names)
    if len(class_names) > expected:
        raise UserError(f"{data_root} has {len(class_names)} classes but {dataset} has {expected}; use --dataset folder")
    if len(class_names) < expected:
        logger.warning("%s has only %d of the %d classes of %s", data_root, len(class_names), expected, dataset)
    return expected
