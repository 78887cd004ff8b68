"""The data of a run: `build_data` opens any of the data sets, `Data` hands out batches that are ready for the network.

    data = build_data(dataset="cifar100", data_root="data", batch_size=64, device="cuda", seed=0, use_valid=True)
    for images, labels, share in data.train(epoch=0):
        ...

Images of one size (such as 32x32) live on the device as one tensor; those that are cropped are decoded by worker processes.
Order and augmentation follow from (seed, epoch, image) in both cases, and nothing waits for the device.
"""
from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.core.distributed import first_rank_first
from utils.core.errors import UserError
from utils.data import cifar
from utils.data.augment import statistics_of
from utils.data.batches import Batch, Batches, Data
from utils.data.decoders import DECODERS
from utils.data.device_images import DeviceImages
from utils.data.folders import TEST_NAMES, Listing, find_root_nearby, list_classes, scan_parts
from utils.data.glyphs import read_glyphs
from utils.data.large_images import FolderImages
from utils.data.small_images import read_class_folders
from utils.data.split import Split
from utils.options.catalog import DATASETS, is_cropped

__all__ = ["Batch", "Batches", "Data", "Split", "build_data"]

logger = logging.getLogger("boostnet")


def build_data(*, dataset: str, data_root: str | Path, image_size: int = 32, stem: str | None = None, batch_size: int = 64,
               eval_batch_size: int = 256, device: str | torch.device = "cpu", seed: int = 0, use_valid: bool = False,
               valid_size: int | None = None, images_per_class: int | None = None, split: Split | None = None,
               order: Tensor | None = None, augment_valid: bool = False, workers: int = 4, val_workers: int = 1,
               decoder: str = "pillow", skip_unreadable: bool = False, needs_train: bool = True, rank: int = 0, world: int = 1,
               quiet: bool = False) -> Data:
    """Open a data set.

    Args:
        dataset: one of `DATASETS`.
        data_root: its folder; see README "Data" for the layouts.
        image_size: side of the images in pixels.
        stem: first layer of the network, see `utils.options.catalog.is_cropped`; None for the one of that side.
        batch_size: training images per process and step.
        use_valid: hold training images out; `valid_size` of them, drawn by `seed` unless `split` says which.
        images_per_class: train on so many images of each class, drawn by `seed` from those that are not held out; None for all.
        split: a saved split to use again, in place of the three arguments before.
        order: numbers of all training images in torchvision's order, the last `valid_size` of which are held out.
        augment_valid: read the hold-out with training augmentation, as the released code does.
        workers, val_workers: decoding processes for training and evaluation; images on the device need none.
        decoder: what decodes large images, one of `utils.data.decoders.DECODERS`.
        skip_unreadable: leave large images that cannot be read out instead of stopping.
        needs_train: False takes the test images alone where there are no training images.
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
    cropped, statistics = is_cropped(dataset, image_size, stem), statistics_of(dataset, image_size, stem)
    if cropped:
        train, test = _list_folders(data_root, ("val", "test") if dataset == "imagenet" else TEST_NAMES, needs_train, rank == 0)
        class_names = test.class_names
        train_set, valid_set, test_set = (
            listing and FolderImages(listing, statistics=statistics, image_size=image_size, device=device, workers=n,
                                     decoder=decoder, skip_unreadable=skip_unreadable)
            for listing, n in ((train, workers), (train, val_workers), (test, val_workers)))
    else:
        arrays = first_rank_first(lambda: _read_small_images(dataset, data_root, image_size, needs_train, rank == 0,
                                                               quiet or rank > 0))
        class_names = arrays["class_names"].tolist()
        train_set, test_set = (
            DeviceImages(arrays[f"{part}_images"], arrays[f"{part}_labels"], statistics=statistics,
                         flips=dataset != "glyphs", device=device)  # a mirrored 5 is nearly a 2
            if f"{part}_images" in arrays else None
            for part in ("train", "test"))
        valid_set = train_set
    num_classes = _count_classes(dataset, class_names, data_root)
    for labels in (images.labels for images in (train_set, test_set) if images):
        if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise UserError(f"{data_root} has labels from {int(labels.min())} to {int(labels.max())}; {dataset} has "
                            f"{num_classes} classes, 0 to {num_classes - 1}")
    if split is not None:
        if train_set:
            split.check(train_set.labels)
    elif order is not None and train_set:
        split = _split_of_order(order, train_set.labels, dataset, data_root, valid_size or DATASETS[dataset].valid_size)
    elif (use_valid or images_per_class) and train_set:
        size = (valid_size or DATASETS[dataset].valid_size or len(train_set.labels) // 10) if use_valid else 0
        split = Split.draw(train_set.labels, size, seed, images_per_class)
    return Data(train_set, valid_set, test_set, class_names=class_names, num_classes=num_classes, image_size=image_size,
                cropped=cropped, split=split, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, rank=rank,
                world=world, augment_valid=augment_valid)


def _split_of_order(order: Tensor, labels: Tensor, dataset: str, data_root: Path, valid_size: int | None) -> Split:
    if dataset in cifar.ARCHIVES and not cifar.archive_folder(data_root, dataset).is_dir():
        raise UserError(f"index.pth numbers the images as in the python archive of {dataset}; in the class folders of "
                        f"{data_root} the same numbers mean other images")
    if valid_size is None:
        raise UserError("index.pth does not say how many of its images are held out, the last ones; pass --use-valid "
                        "--valid_size N")
    return Split.from_permutation(labels, order, valid_size)


def _list_folders(data_root: Path, test_names: Sequence[str], needs_train: bool,
                  report: bool) -> tuple[Listing | None, Listing]:
    """Training and test listing; with `report` the log says what is left out."""
    train, test = scan_parts(data_root, test_names, needs_train)
    if report:
        for listing in filter(None, (train, test)):
            listing.report_left_out()
        for name in test_names:
            if name != test.folder.name and (data_root / name).is_dir():
                logger.warning("%s: the test images are those in %s; %s is left out", data_root, test.folder.name, name)
    return train, test


def _read_small_images(dataset: str, data_root: Path, image_size: int, needs_train: bool, is_first: bool,
                       quiet: bool) -> dict[str, Any]:
    if dataset == "glyphs":
        return read_glyphs(data_root, quiet)
    if dataset in cifar.ARCHIVES:
        archive = cifar.archive_folder(data_root, dataset)
        present = ("train",) if needs_train else ("train", *TEST_NAMES)
        if not archive.is_dir() and not any((data_root / name).is_dir() for name in present):
            if near := find_root_nearby(data_root, lambda folder: _is_cifar_root(folder, dataset)):
                raise UserError(f"{data_root} has no {dataset}, but {near} has; pass --data-root {near}")
            if is_first:
                cifar.download(data_root, dataset)
        if archive.is_dir():
            return cifar.read_archive(data_root, dataset, needs_train)
    return read_class_folders(data_root, *_list_folders(data_root, TEST_NAMES, needs_train, is_first), image_size,
                              quiet)


def _is_cifar_root(folder: Path, dataset: str) -> bool:
    if cifar.archive_folder(folder, dataset).is_dir():
        return True
    return (folder / "train").is_dir() and len(list_classes(folder / "train")) == DATASETS[dataset].num_classes


def _count_classes(dataset: str, class_names: list[str], data_root: Path) -> int:
    expected = DATASETS[dataset].num_classes or len(class_names)
    if len(class_names) > expected:
        raise UserError(f"{data_root} has {len(class_names)} classes but {dataset} has {expected}; use --dataset folder")
    if len(class_names) < expected:
        logger.warning("%s has only %d of the %d classes of %s", data_root, len(class_names), expected, dataset)
    return expected
