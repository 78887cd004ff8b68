"""Large images in class folders, decoded by worker processes while the device computes.

Workers send uint8 crops, a quarter of the bytes of normalised ones, and the device does the arithmetic. What a crop shows
depends on (seed, epoch, image) only, so neither the number of workers nor that of processes changes a result.
"""
from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.core.errors import UserError
from utils.core.machine import require_open_files, require_semaphores
from utils.core.signals import held_back, interruptible, leave_signals_to_parent
from utils.data.augment import Normalise
from utils.data.decoders import DECODERS, evaluation_crop, explain, random_box, sample_generator
from utils.data.folders import Listing
from utils.data.sampling import Plan
from utils.data.workers import InSharedBatch, SharedBatches

PREFETCH = 2   # batches that a worker has in hand or ready

logger = logging.getLogger("boostnet")


class Crops(NamedTuple):
    """What a worker sends for one batch.

    Attributes:
        pixels: (k, S, S, 3) uint8, the readable images of the batch; good until the next batch is read.
        index: (k,) int64, their positions in the listing. No tensor: that would go through /dev/shm.
        failures: (position, message) of each image that could not be read.
    """

    pixels: Tensor | InSharedBatch
    index: np.ndarray
    failures: list[tuple[int, str]]


class _Cropper(Dataset):
    """Turns the positions of one batch into crops; runs in the workers. Without `draws` the crop is the middle.

    Args:
        shared: where the pixels go; None for this process alone.
    """

    def __init__(self, listing: Listing, decoder: str, size: int, draws: tuple[int, int] | None,
                 shared: SharedBatches | None) -> None:
        self.listing, self.size, self.draws, self.shared = listing, size, draws, shared
        self.decoder = DECODERS[decoder]()

    def __getitems__(self, batch: tuple[int, list[int]]) -> Crops:
        number, positions = batch
        if self.shared:
            slot = number % len(self.shared.arrays)
            rows = self.shared.arrays[slot]
        else:
            rows = np.empty((len(positions), self.size, self.size, 3), np.uint8)
        read, failures = [], []
        for position in positions:
            try:
                rows[len(read)] = self._crop(position)
                read.append(position)
            except Exception as error:  # damaged files make decoders raise nearly anything; the main process decides
                failures.append((position, explain(error)))
        pixels = InSharedBatch(self.shared, slot, len(read)) if self.shared else torch.from_numpy(rows[:len(read)])
        return Crops(pixels, np.array(read, np.int64), failures)

    def _crop(self, position: int) -> np.ndarray:
        image = self.decoder.load(self.listing.path(position))
        if self.draws is None:
            return evaluation_crop(self.decoder, image, self.size)
        generator = sample_generator(*self.draws, position)
        box = random_box(generator, *self.decoder.size(image))
        return self.decoder.resized_crop(image, box, self.size, flip=generator.random() < 0.5)


def _as_they_are(crops: Crops) -> Crops:
    return crops


class FolderImages:
    """The images of one listing as batches on the device.

    Args:
        listing: the files.
        statistics: mean and standard deviation per channel.
        image_size: height and width of the crops.
        workers: decoding processes; 0 decodes in this one.
        decoder: a name in `utils.data.decoders.DECODERS`.
        skip_unreadable: leave images that cannot be read out of their batch, instead of stopping.
    Attributes:
        unreadable: positions of the images left out so far.
    """

    def __init__(self, listing: Listing, *, statistics: tuple, image_size: int, device: torch.device, workers: int,
                 decoder: str = "pillow", skip_unreadable: bool = False) -> None:
        self.listing, self.image_size, self.device, self.workers = listing, image_size, device, workers
        self.labels = torch.from_numpy(listing.labels)
        self.normalise = Normalise(*statistics, device=device)
        self.decoder, self.skip_unreadable = decoder, skip_unreadable
        self.unreadable: set[int] = set()
        DECODERS[decoder]()  # complains about a missing library now, not in a worker
        if workers:
            require_open_files(workers)
            require_semaphores(workers)

    def read(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        """Un-augmented batches: shorter side scaled as `short_side` says, then the middle."""
        return self._stream(plan, None)

    def read_augmented(self, plan: Plan, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of random resized crops, half of them mirrored."""
        return self._stream(plan, (seed, epoch))

    def _stream(self, plan: Plan, draws: tuple[int, int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        with held_back():   # a worker killed before it knows what to do with a signal would end the run
            batches = iter(self.load(plan, draws))
        for crops in interruptible(batches):
            self._note(crops)
            pixels = crops.pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            yield self.normalise(pixels), self.labels[torch.from_numpy(crops.index)].to(self.device, non_blocking=True)

    def load(self, plan: Plan, draws: tuple[int, int] | None) -> DataLoader:
        """Loader of the plan's `Crops`."""
        batches = [(number, part.tolist()) for number, part in enumerate(plan.index.split(plan.sizes))]
        shared = None
        if self.workers and batches:
            # At most PREFETCH batches per worker are under way, and one is being read.
            n = min(PREFETCH * self.workers + 1, len(batches))
            shared = SharedBatches(n, (max(plan.sizes), self.image_size, self.image_size, 3))
        cropper = _Cropper(self.listing, self.decoder, self.image_size, draws, shared)
        return DataLoader(cropper, batch_sampler=batches, num_workers=self.workers, collate_fn=_as_they_are,
                          prefetch_factor=PREFETCH if self.workers else None,
                          pin_memory=self.device.type == "cuda", worker_init_fn=leave_signals_to_parent,
                          generator=torch.Generator())  # its own: the global random state is the training's

    def _note(self, crops: Crops) -> None:
        for position, message in crops.failures:
            path = self.listing.path(position)
            if not self.skip_unreadable:
                raise UserError(f"{path} cannot be read as an image ({message}); "
                                "repair or remove it, or pass --skip_unreadable to leave such images out")
            if position not in self.unreadable:
                self.unreadable.add(position)
                logger.warning("%s cannot be read as an image and is left out (%s); %d so far", path, message,
                               len(self.unreadable))
        # A bad file that was alone in its batch is nothing unusual; a batch of bad files is a folder that has gone.
        if not len(crops.index) and len(crops.failures) > 1:
            raise UserError(f"not one of the {len(crops.failures)} images of a batch can be read; the first is "
                            f"{self.listing.path(crops.failures[0][0])}")
