"""Small images that live on the device as one uint8 tensor."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from utils.data.augment import CropFlip, Normalise
from utils.data.sampling import Plan


class DeviceImages:
    """A whole set of images on the device; batches are gathered from it without waiting for the device.

    Args:
        images: (n, 3, S, S) uint8.
        labels: (n,) int64.
        statistics: mean and standard deviation per channel.
        flips: whether mirrored images keep their meaning.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, statistics: tuple, flips: bool, device: torch.device) -> None:
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels)
        self.labels_on_device = self.labels.to(device)
        self.normalise = Normalise(*statistics, device=device)
        self.crop_flip = CropFlip(images.shape[-1], flips=flips, device=device)
        self.device = device

    def read(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        """Un-augmented batches."""
        for index in plan.index.to(self.device).split(plan.sizes):
            yield self.normalise(self.images.index_select(0, index)), self.labels_on_device.index_select(0, index)

    def read_augmented(self, plan: Plan, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches whose crops and flips depend on (seed, epoch, image) only."""
        choices = self.crop_flip.draw(len(self.labels), seed=seed, epoch=epoch)[plan.index].to(self.device)
        for index, choice in zip(plan.index.to(self.device).split(plan.sizes), choices.split(plan.sizes)):
            images = self.crop_flip(self.images.index_select(0, index), choice)
            yield self.normalise(images), self.labels_on_device.index_select(0, index)
