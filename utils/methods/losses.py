"""From the predictions of all exits to losses."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.core.distributed import all_reduce_sum, world_size


def cross_entropies(predictions: list[Tensor], labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy (n_exits, B) of every exit and sample, for n_exits predictions (B, num_classes) and labels (B,).

    With label smoothing E (arXiv:1512.00567, section 7) the target is 1 - E for the label, plus E spread evenly over all classes.
    """
    return torch.stack([F.cross_entropy(p, labels, reduction="none", label_smoothing=label_smoothing) for p in predictions])


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from softmax(teacher / T) to softmax(logits / T), mean over the batch, without a factor T^2.

    Both are (B, num_classes); the teacher is a constant. The divergence of a sample is a sum over the classes.
    """
    target = F.log_softmax(teacher.detach() / temperature, dim=1)
    return F.kl_div(F.log_softmax(logits / temperature, dim=1), target, reduction="batchmean", log_target=True)


class ExitLosses:
    """Sum over the exits of the mean cross entropy (BoostNet, arXiv:2211.16726, eq. 6), optionally equalised.

    With `equalise`, exit n's loss is divided by a_n, its moving average over steps and ranks, and the sum is multiplied by
    the mean of all a_n: every exit then pulls equally hard (docs/methods.md, "Loss equalisation").
    """

    def __init__(self, equalise: bool = False) -> None:
        self.equalise = equalise
        self.average: Tensor | None = None   # (n_exits,) moving averages a_n

    def __call__(self, per_sample: Tensor, share: float = 1.0) -> Tensor:
        """Loss (a scalar) of cross entropies (n_exits, B).

        `share` weights this process's mean where the processes' batches differ in size (1.0 in a single process).
        """
        per_exit = per_sample.mean(dim=1)
        total = self._equalised(per_exit, share) if self.equalise else per_exit.sum()
        return total * share if share != 1.0 else total

    def _equalised(self, per_exit: Tensor, share: float) -> Tensor:
        current = all_reduce_sum(per_exit.detach() * share) / world_size()
        self.average = current if self.average is None else 0.9 * self.average + 0.1 * current
        return self.average.mean() * (per_exit / self.average).sum()

    def state_dict(self) -> dict:
        return {"average": self.average}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.average = None if state["average"] is None else state["average"].to(device)
