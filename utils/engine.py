"""One epoch of training and one pass of evaluation; both keep their figures on the device until they are asked for."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.distributed import sum_over_ranks
from utils.objective import ExitLosses, valid_share


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


class EpochFigures:
    """Sums over the samples of one epoch, per exit, on the device.

    Attributes:
        sums: (3, n_exits) float64: loss, correct predictions, valid samples (paper, fig. 3).
        first_bad: (n_exits,) int64: step at which the exit's loss first was NaN or infinite, -1 for never.
        samples, steps: counted so far, on the host.
    """

    def __init__(self, n_exits: int, device: torch.device) -> None:
        self.sums = torch.zeros(3, n_exits, dtype=torch.float64, device=device)
        self.first_bad = torch.full((n_exits,), -1, dtype=torch.int64, device=device)
        self.samples = self.steps = 0

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
        total = sum_over_ranks(torch.cat([self.sums.flatten(), counts]))
        loss, top1, valid = (total[:-1] / total[-1]).view_as(self.sums)
        return {"train_loss": loss.tolist(), "train_top1": (100 * top1).tolist(), "valid_share": valid.tolist()}

    def state_dict(self) -> dict:
        return {"sums": self.sums, "first_bad": self.first_bad, "samples": self.samples, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.sums.copy_(state["sums"])
        self.first_bad.copy_(state["first_bad"])
        self.samples, self.steps = state["samples"], state["steps"]


def train_epoch(model: nn.Module, objective: ExitLosses, batches: Iterable, optimizer: torch.optim.Optimizer,
                figures: EpochFigures, *, after_step: Callable[[int], bool]) -> bool:
    """Train on every batch.

    Args:
        model: returns the predictions of all exits for a batch of images (a BoostedNet or a wrapper around one).
        batches: of (images (B, 3, H, W), labels (B,), share), on the device.
        figures: is added to.
        after_step: called with the number of steps done in this epoch; returns True to stop before the next one.
    Returns:
        Whether the epoch is complete.
    """
    model.train()
    for images, labels, share in batches:
        predictions = model(images)
        loss = objective(predictions, labels, share)
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        optimizer.step()
        figures.add(predictions, labels, loss.per_sample)
        if after_step(figures.steps):
            return False
    return True


class Predictions(NamedTuple):
    """What evaluation keeps of a data set: two numbers per exit and sample, never the logits.

    Attributes:
        confidence: (n_exits, N) float32, largest softmax probability.
        correct: (n_exits, N) bool, top-1 hit.
        top5: (n_exits,) float64, percent of samples whose label is among the five highest (all, with fewer classes).
    """

    confidence: Tensor
    correct: Tensor
    top5: Tensor

    @property
    def top1(self) -> list[float]:
        """Percent correct at every exit."""
        return (100 * self.correct.double().mean(dim=1)).tolist()


@torch.inference_mode()
def predict(model: nn.Module, batches) -> Predictions:
    """Evaluate every exit on every sample of `batches`; results are on the CPU, in the order of the batches."""
    was_training = model.training
    model.eval()
    confidence, correct, top5 = [], [], 0
    for images, labels, _ in batches:
        all_logits = torch.stack([p.float() for p in model(images)])
        confidence.append(all_logits.softmax(dim=2).amax(dim=2))
        correct.append(all_logits.argmax(dim=2) == labels)
        k = min(5, all_logits.shape[2])
        top5 = top5 + (all_logits.topk(k, dim=2).indices == labels[:, None]).any(dim=2).sum(dim=1)
    model.train(was_training)
    confidence, correct = torch.cat(confidence, dim=1).cpu(), torch.cat(correct, dim=1).cpu()
    return Predictions(confidence, correct, 100 * top5.double().cpu() / confidence.shape[1])
