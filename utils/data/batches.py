"""Batches of images that are ready for the network."""
from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.data.device_images import DeviceImages
from utils.data.large_images import FolderImages
from utils.data.sampling import Plan, plan_evaluation, plan_training
from utils.data.split import Split, hash_labels

logger = logging.getLogger("boostnet")


class Batch(NamedTuple):
    """What one step needs.

    Attributes:
        images: (B, 3, H, W) float32, normalised, on the device.
        labels: (B,) int64 on the device.
        share: weight of this rank's mean loss, (local rows) * world / (global rows); 1.0 in a single process.
    """

    images: Tensor
    labels: Tensor
    share: float


class Batches:
    """One pass over a set of images; iterating again repeats the same pass.

    Attributes:
        n_samples: images this rank gets, unreadable ones included.
        index: (n_samples,) int64 on the CPU, their positions in the whole set, in the order they come.
    """

    def __init__(self, plan: Plan, read: Callable[[Plan], Iterator[tuple[Tensor, Tensor]]]) -> None:
        self._plan, self._read = plan, read
        self.index = plan.index
        self.n_samples = len(plan.index)

    def __len__(self) -> int:
        return len(self._plan.sizes)

    def parts(self, n_batches: int) -> Iterator[Batches]:
        """The pass as several passes of at most `n_batches` batches, one after the other."""
        for first in range(0, len(self), n_batches):
            yield Batches(self._plan.part(first, first + n_batches), self._read)

    def __iter__(self) -> Iterator[Batch]:
        for (images, labels), size, share in zip(self._read(self._plan), self._plan.sizes, self._plan.shares):
            # A batch that lost unreadable images weighs as much less.
            yield Batch(images, labels, share if len(labels) == size else share * len(labels) / size)


class Data:
    """Training, hold-out and test images of one data set.

    Args:
        train_set: None where only the test images are there.
        valid_set: the training images again, as the hold-out is read.
    Attributes:
        class_names: what the labels 0, 1, ... stand for.
        num_classes: outputs a classifier needs; more than `class_names` where a folder has only some of the classes.
        image_size: height and width in pixels.
        cropped: whether images were scaled and cropped to that size.
        split: which training images are held out and trained on; None for none and all.
        augment_valid: whether the hold-out is read with training augmentation.
        n_train, n_valid, n_test: number of images on all ranks together.
        labels_hash: of all training labels in file order; other data have another one. None without training images.
        data_hash: of class names, training and test labels.
    """

    def __init__(self, train_set: DeviceImages | FolderImages | None, valid_set: DeviceImages | FolderImages | None,
                 test_set: DeviceImages | FolderImages, *,
                 class_names: list[str], num_classes: int, image_size: int, cropped: bool, split: Split | None, batch_size: int,
                 eval_batch_size: int, seed: int, rank: int, world: int, augment_valid: bool = False) -> None:
        self.class_names, self.num_classes, self.split = class_names, num_classes, split
        self.image_size, self.cropped = image_size, cropped
        self._train_set, self._valid_set, self._test_set = train_set, valid_set, test_set
        n_labels = len(train_set.labels) if train_set else 0
        self._train_index = split.train_index if split and train_set else torch.arange(n_labels)
        self._batch_size, self._eval_batch_size = batch_size, eval_batch_size
        self._seed, self._rank, self._world = seed, rank, world
        self.augment_valid = augment_valid
        self.n_train, self.n_test = len(self._train_index), len(test_set.labels)
        self.n_valid = len(split.valid_index) if split else 0
        self.labels_hash = hash_labels(train_set.labels) if train_set else None
        named = "\n".join([*class_names, str(self.labels_hash), hash_labels(test_set.labels)])
        self.data_hash = hashlib.sha256(named.encode(errors="surrogateescape")).hexdigest()

    @property
    def smallest_batch(self) -> int:
        """Images that the smallest training batch of a process has: the last batch of an epoch may be smaller than the others."""
        last = self.n_train % (self._batch_size * self._world)
        return last // self._world or self._batch_size   # of fewer images than processes there is no batch

    def __str__(self) -> str:
        held_out = f"{self.n_valid:,}" if self.n_valid else "none"
        part = f" of {self.split.n_total:,}" if self.split and self.split.chosen is not None else ""
        return (f"{self.n_train:,}{part} training images of {len(self.class_names):,} classes, {held_out} held out, "
                f"{self.n_test:,} test images")

    def train(self, epoch: int, first_batch: int = 0) -> Batches:
        """Augmented batches of `epoch` from `first_batch` on; both order and augmentation follow from (seed, epoch)."""
        plan = plan_training(self._train_index, batch_size=self._batch_size, seed=self._seed, epoch=epoch, rank=self._rank,
                             world=self._world)
        if plan.n_dropped and epoch == 0 and self._rank == 0:
            logger.warning("the last %d of %d training images of each epoch are left out: fewer than the %d processes",
                           plan.n_dropped, self.n_train, self._world)
        return Batches(plan.part(first_batch),
                       lambda plan: self._train_set.read_augmented(plan, seed=self._seed, epoch=epoch))

    def valid(self, epoch: int = 0) -> Batches:
        """The held-out images in file order; with `augment_valid` as they would look in training in this epoch.

        Raises:
            UserError: when nothing is held out.
        """
        if not self.n_valid:
            raise UserError("there is no hold-out set; train with --use-valid to keep images for choosing thresholds")
        if self._valid_set is None:
            raise UserError("there are no training images here, of which the hold-out is a part")
        read = self._valid_set.read
        if self.augment_valid:
            read = partial(self._valid_set.read_augmented, seed=self._seed, epoch=epoch)
        return self._evaluation(read, self.split.valid_index)

    def test(self) -> Batches:
        """The test images in file order, without augmentation."""
        return self._evaluation(self._test_set.read, torch.arange(self.n_test))

    def _evaluation(self, read: Callable[[Plan], Iterator[tuple[Tensor, Tensor]]], samples: Tensor) -> Batches:
        plan = plan_evaluation(samples, batch_size=self._eval_batch_size, rank=self._rank, world=self._world)
        return Batches(plan, read)
