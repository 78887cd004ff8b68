"""One epoch of training, whose losses and counts stay on the device until they are read."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from utils.core.distributed import all_gather, all_reduce_sum, rank, world_size
from utils.core.errors import TrainingDiverged, UserError
from utils.methods import Method

NO_STATISTICS = "Expected more than 1 value per channel"   # beginning of what torch's batch normalisation says


def valid_share(per_sample: Tensor) -> Tensor:
    """Share (n_exits,) of the batch that still trains each exit (paper, fig. 3), from cross entropies (n_exits, B).

    A sample is valid for an exit when its loss there exceeds the 10th percentile of the first exit's losses in the batch.
    """
    return (per_sample > per_sample[0].quantile(0.1)).float().mean(dim=1)


class EpochMeters:
    """Sums over the samples of one epoch, per exit, on the device.

    Attributes:
        sums: (3, n_exits) float64: loss, correct predictions, valid samples (paper, fig. 3).
        first_bad: (n_exits,) int64: step at which the exit's loss first was NaN or infinite, -1 for never.
        samples, steps, skipped: counted so far, on the host; a skipped step is a step without samples.
        seconds: spent on them.
    """

    def __init__(self, n_exits: int, device: torch.device) -> None:
        self.sums = torch.zeros(3, n_exits, dtype=torch.float64, device=device)
        self.first_bad = torch.full((n_exits,), -1, dtype=torch.int64, device=device)
        self.samples = self.steps = self.skipped = 0
        self.seconds = 0.0

    @torch.no_grad()
    def add(self, predictions: list[Tensor], labels: Tensor, per_sample: Tensor) -> None:
        """Count one batch: predictions n_exits x (B, C), labels (B,), per_sample losses (n_exits, B)."""
        size = len(labels)
        correct = torch.stack([(p.argmax(dim=1) == labels).sum() for p in predictions])
        loss = per_sample.double().sum(dim=1)
        self.sums += torch.stack([loss, correct.double(), valid_share(per_sample).double() * size])
        self.first_bad = torch.where((self.first_bad < 0) & ~loss.isfinite(), self.steps, self.first_bad)
        self.samples += size
        self.steps += 1

    def skip(self) -> None:
        """Count a step that was left out."""
        self.skipped += 1
        self.steps += 1

    def check(self, epoch: int, lr: float) -> None:
        """Raise TrainingDiverged if a loss was not finite. This waits for the device."""
        steps = self.first_bad.tolist()
        if max(steps) >= 0:
            step, n = min((step, n) for n, step in enumerate(steps) if step >= 0)
            raise TrainingDiverged(f"the loss of exit {n + 1} became NaN or infinite at epoch {epoch + 1}, step {step + 1} "
                                   f"(learning rate {lr:g}); try a lower --lr_f, or look at the data")

    def summary(self) -> dict[str, list[float]]:
        """Means over all samples of all ranks: train_loss, train_top1 in percent, valid_share; one value per exit."""
        counts = torch.tensor([self.samples], dtype=torch.float64, device=self.sums.device)
        total = all_reduce_sum(torch.cat([self.sums.flatten(), counts]))
        loss, top1, valid = (total[:-1] / total[-1]).view_as(self.sums)
        return {"train_loss": loss.tolist(), "train_top1": (100 * top1).tolist(), "valid_share": valid.tolist()}

    def state_dict(self) -> dict:
        """Sums of each process, which all have to call this; the rest is the same in all of them."""
        samples = torch.tensor(self.samples, device=self.sums.device)
        return {"sums": all_gather(self.sums), "first_bad": all_gather(self.first_bad),
                "samples": all_gather(samples).tolist(), "steps": self.steps, "skipped": self.skipped, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.sums.copy_(state["sums"][rank()])
        self.first_bad.copy_(state["first_bad"][rank()])
        self.samples, self.steps, self.skipped = state["samples"][rank()], state["steps"], state["skipped"]
        self.seconds = state["seconds"]


def train_epoch(method: Method, batches: Iterable, meters: EpochMeters, *, after_step: Callable[[int], bool],
                before_step: Callable[[int], None] = lambda step: None) -> bool:
    """Train on every batch.

    Args:
        method: makes a step of a batch.
        batches: of (images (B, 3, H, W), labels (B,), share), on the device.
        meters: is added to.
        before_step: called with the number of steps done in this epoch.
        after_step: called with the number of steps done in this epoch; returns True to stop before the next one.
    Returns:
        Whether the epoch is complete.
    """
    method.network.train()
    with tuned_convolutions():
        for batch in batches:
            if not len(batch[1]) and world_size() > 1:   # the others would wait for its gradients
                raise UserError("a process has a batch without an image that can be read, see above; remove such files")
            before_step(meters.steps)
            _train_step(method, batch, meters)
            if after_step(meters.steps):
                return False
    return True


@contextmanager
def statistics_needed() -> Iterator[None]:
    """While the block trains, a batch for which batch normalisation has no statistics is one line: one image on maps of 1x1.

    Raises:
        UserError: in place of torch's own error.
    """
    try:
        yield
    except ValueError as error:
        if NO_STATISTICS not in str(error):
            raise
        raise UserError("batch normalisation has no statistics of one image on a map of 1x1; choose another --batch-size, so "
                        "that no training batch is left with one image, a larger --image_size or fewer scales") from error


def _train_step(method: Method, batch: tuple[Tensor, Tensor, float], meters: EpochMeters) -> None:
    """One step and its meters. The outcome ends here: a CUDA graph cannot be captured while an earlier autograd graph lives."""
    with statistics_needed():
        outcome = method.step(*batch) if len(batch[1]) else None
    if outcome is None:
        meters.skip()
    else:
        meters.add(outcome.predictions, outcome.labels, outcome.per_sample)


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """While the block runs cuDNN times its algorithms for every new shape, unless --deterministic asks for equal bits.

    For training only: in evaluation and early exit nearly every batch has another size, and each would be timed anew.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no tensor has a NaN or an infinite number, as a bool tensor on their device."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return torch.nn.utils.get_total_norm(floats, norm_type=math.inf).isfinite()
