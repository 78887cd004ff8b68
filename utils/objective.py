"""From the predictions of all exits to one loss."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.distributed import sum_over_ranks, world_size


class Loss(NamedTuple):
    """Outcome of one batch.

    Attributes:
        total: scalar to call backward on.
        per_sample: (n_exits, B) cross entropies, without gradient.
    """

    total: Tensor
    per_sample: Tensor


class ExitLosses:
    """Sum over the exits of the mean cross entropy (BoostNet, arXiv:2211.16726, eq. 6), optionally equalised.

    With `equalise`, exit n's loss is divided by a_n, its moving average over steps and ranks, and the sum is multiplied by
    the mean of all a_n: every exit then pulls equally hard (README, "Loss equalisation").
    """

    def __init__(self, equalise: bool = False) -> None:
        self.equalise = equalise
        self.average: Tensor | None = None   # (n_exits,) moving averages a_n

    def __call__(self, predictions: list[Tensor], labels: Tensor, share: float = 1.0) -> Loss:
        """Loss of predictions, n_exits tensors (B, num_classes), for labels (B,).

        `share` weights this process's mean where the processes' batches differ in size (1.0 in a single process).
        """
        per_sample = torch.stack([F.cross_entropy(p, labels, reduction="none") for p in predictions])
        per_exit = per_sample.mean(dim=1)
        total = self._equalised(per_exit, share) if self.equalise else per_exit.sum()
        return Loss(total * share if share != 1.0 else total, per_sample.detach())

    def _equalised(self, per_exit: Tensor, share: float) -> Tensor:
        current = sum_over_ranks(per_exit.detach() * share) / world_size()
        self.average = current if self.average is None else 0.9 * self.average + 0.1 * current
        return self.average.mean() * (per_exit / self.average).sum()

    def state_dict(self) -> dict:
        return {"average": self.average}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.average = None if state["average"] is None else state["average"].to(device)


def valid_share(per_sample: Tensor) -> Tensor:
    """Share (n_exits,) of the batch that still trains each exit (paper, fig. 3).

    A sample is valid for an exit when its loss there exceeds the 10th percentile of the first exit's losses in the batch.
    """
    return (per_sample > per_sample[0].quantile(0.1)).float().mean(dim=1)
