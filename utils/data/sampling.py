"""Which images make up which batch, on which rank: pure index arithmetic, the same for every kind of storage.

One seeded permutation per epoch is cut into global batches and each of those into one contiguous share per rank. Batch
composition therefore follows from (seed, epoch) alone, and the ranks together see every image exactly once.
"""
from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def seeded_generator(purpose: str, *keys: int) -> torch.Generator:
    """A CPU generator of its own for each purpose and key tuple, so that no two uses share a random stream."""
    entropy = [zlib.crc32(purpose.encode()), *(int(key) & 0xFFFFFFFFFFFFFFFF for key in keys)]
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


@dataclass(frozen=True)
class Plan:
    """One rank's part of a pass over the data.

    Attributes:
        index: (n,) int64, data set positions of this rank's images, batch after batch.
        sizes: images in each batch of this rank; they sum to n.
        shares: weight of each batch's mean on this rank, (local rows) * world / (global rows); their mean over the ranks is 1.
        n_dropped: images of the whole pass that no rank sees.
    """

    index: Tensor
    sizes: list[int]
    shares: list[float]
    n_dropped: int = 0

    def part(self, first: int, end: int | None = None) -> Plan:
        """The same plan from batch `first` on, up to batch `end`."""
        start, stop = sum(self.sizes[:first]), sum(self.sizes[:end])
        return Plan(self.index[start:stop], self.sizes[first:end], self.shares[first:end], self.n_dropped)


def part_sizes(n: int, world: int) -> list[int]:
    """How many of the n images of a global batch each of `world` processes gets; two of these differ by at most 1."""
    return [(rank + 1) * n // world - rank * n // world for rank in range(world)]


def global_batch_size(size: int, share: float, world: int) -> int:
    """Images of a global batch, of which one process has `size` > 0 that weigh `share` (`Plan.shares`)."""
    return round(size * world / share)


def plan_training(samples: Tensor, *, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1) -> Plan:
    """Shuffle `samples` (n,) and deal global batches of `batch_size * world` to the ranks in nearly equal shares.

    The last global batch may be smaller. Only when it has fewer images than there are ranks is it left out, because some
    rank would have nothing to do in that step.
    """
    order = samples[torch.randperm(len(samples), generator=seeded_generator("order", seed, epoch))]
    parts, sizes, shares, n_dropped = [], [], [], 0
    for global_batch in order.split(batch_size * world):
        n = len(global_batch)
        if n < world:
            n_dropped = n
            continue
        part = global_batch.split(part_sizes(n, world))[rank]
        parts.append(part)
        sizes.append(len(part))
        shares.append(len(part) * world / n)
    return Plan(torch.cat(parts) if parts else order[:0], sizes, shares, n_dropped)


def plan_evaluation(samples: Tensor, *, batch_size: int, rank: int = 0, world: int = 1) -> Plan:
    """Every `world`-th of `samples`, in order and without padding, so that sums over the ranks count each image once."""
    index = samples[rank::world]
    sizes = [len(part) for part in index.split(batch_size)] if len(index) else []
    return Plan(index, sizes, [1.0] * len(sizes))
