"""One pass of evaluation over a data set; its figures stay on the device until they are read."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.core import distributed
from utils.core.distributed import all_reduce_sum, gather_samples
from utils.core.errors import UserError
from utils.evaluation.confidence import Measure, confidence, margin

PART = 4096   # images whose stored logits are read at a time


class Details(NamedTuple):
    """What more than confidence and hits is known of the probabilities of every exit; all are (n_exits, N).

    Attributes:
        prediction: int64, class with the largest probability.
        margin: float32, the largest probability less the second largest.
        entropy: float32, of the probabilities, in nats.
        log_likelihood: float32, natural logarithm of the true class's probability.
        squares: float32, sum of the squared probabilities.
    """

    prediction: Tensor
    margin: Tensor
    entropy: Tensor
    log_likelihood: Tensor
    squares: Tensor


class Predictions(NamedTuple):
    """What evaluation keeps of a data set: a few numbers per exit and sample, not the logits.

    Attributes:
        confidence: (n_exits, N) float32, largest softmax probability, or what else tells a certain answer.
        correct: (n_exits, N) bool, top-1 hit.
        top5: (n_exits,) float64, percent of samples whose label is among the five highest (all, with fewer classes).
        details: None unless requested.
    """

    confidence: Tensor
    correct: Tensor
    top5: Tensor
    details: Details | None = None

    @property
    def n_samples(self) -> int:
        """Images judged, without those that were left out as unreadable."""
        return self.correct.shape[1]

    @property
    def top1(self) -> list[float]:
        """Percent correct at every exit."""
        return (100 * self.correct.double().mean(dim=1)).tolist()


class Outputs(NamedTuple):
    """All predictions of a network for a data set, in file order, on the CPU.

    Attributes:
        logits: (n_exits, N, C) float32, F_n before softmax.
        labels: (N,) int64.
    """

    logits: Tensor
    labels: Tensor


@torch.inference_mode()
def predict(model: nn.Module, batches, measure: Measure = confidence, *, calibration: Sequence[float] | None = None,
            details: bool = False) -> Predictions:
    """Evaluate every exit on every sample of `batches`, each process its part; all get the whole, on the CPU, in file order.

    Args:
        measure: turns logits (n_exits, B, C) into what is kept as confidence (n_exits, B).
        calibration: (n_exits,) temperatures that divide the logits for confidence and details.
        details: keep `Details` too.
    """
    was_training = model.training
    model.eval()
    found = _Figures(model.n_exits, next(model.parameters()).device, measure, calibration, details)
    for images, labels, _ in batches:
        if len(labels):   # else its images could not be read
            found.add(torch.stack([p.float() for p in model(images)]), labels)
    model.train(was_training)
    return found.all_gather(batches.index)


@torch.inference_mode()
def collect(model: nn.Module, batches) -> Outputs:
    """Predictions of every exit for every sample of `batches`; all processes get the whole.

    It takes 4 N C bytes for each exit, 1 GB for 50,000 images of ImageNet and 5 exits.
    """
    was_training = model.training
    model.eval()
    logits, labels = [], []
    for images, known, _ in batches:
        if len(known):
            logits.append(torch.stack([p.float() for p in model(images)]))
            labels.append(known)
    model.train(was_training)
    if distributed.any_rank(not logits):   # all end here, where one would leave the others waiting in the exchange below
        raise UserError("a process has no image of this set that can be read; use fewer processes")
    logits, labels = torch.cat(logits, dim=1), torch.cat(labels)
    n_exits, n, n_classes = logits.shape
    index = batches.index[:n]
    flat = gather_samples(logits.transpose(1, 2).reshape(n_exits * n_classes, n), index)
    return Outputs(flat.view(n_exits, n_classes, -1).transpose(1, 2).cpu(), gather_samples(labels[None], index)[0].cpu())


def read(outputs: Outputs, measure: Measure = confidence, *, calibration: Sequence[float] | None = None,
         details: bool = False) -> Predictions:
    """`predict` of a data set whose outputs were collected."""
    found = _Figures(len(outputs.logits), outputs.logits.device, measure, calibration, details)
    for logits, labels in zip(outputs.logits.split(PART, dim=1), outputs.labels.split(PART)):
        found.add(logits, labels)
    return found.of_this_rank()


def _no_details(n_exits: int, device: torch.device) -> Details:
    """Of no images."""
    nothing = torch.empty(n_exits, 0, device=device)
    return Details(nothing.long(), nothing, nothing, nothing, nothing)


class _Figures:
    """Collects figures batch by batch."""

    def __init__(self, n_exits: int, device: torch.device, measure: Measure, calibration: Sequence[float] | None,
                 details: bool) -> None:
        self.measure = measure
        # Like those below, with an empty part: a process without a batch takes part in the gathering too.
        self.details = [_no_details(n_exits, device)] if details else None
        self.temperatures = None if calibration is None else torch.tensor(calibration, device=device)[:, None, None]
        self.certainty = [torch.empty(n_exits, 0, device=device)]
        self.correct = [torch.empty(n_exits, 0, dtype=torch.bool, device=device)]
        self.top5 = torch.zeros(n_exits, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Judge logits (n_exits, B, C)."""
        scaled = logits if self.temperatures is None else logits / self.temperatures
        prediction = logits.argmax(dim=2)
        self.certainty.append(self.measure(scaled))
        self.correct.append(prediction == labels)
        k = min(5, logits.shape[2])
        self.top5 += (logits.topk(k, dim=2).indices == labels[:, None]).any(dim=2).sum(dim=1)
        if self.details is not None:
            logs = scaled.log_softmax(dim=2)
            probabilities = logs.exp()
            of_label = logs.gather(2, labels.expand(len(logs), -1)[..., None])[..., 0]
            self.details.append(Details(prediction, margin(scaled), torch.special.entr(probabilities).sum(dim=2), of_label,
                                        probabilities.square().sum(dim=2)))

    def of_this_rank(self) -> Predictions:
        certainty, correct = torch.cat(self.certainty, dim=1), torch.cat(self.correct, dim=1)
        details = self.details and Details(*(torch.cat(column, dim=1).cpu() for column in zip(*self.details)))
        return Predictions(certainty.cpu(), correct.cpu(), 100 * self.top5.double().cpu() / certainty.shape[1], details)

    def all_gather(self, index: Tensor) -> Predictions:
        certainty, correct = torch.cat(self.certainty, dim=1), torch.cat(self.correct, dim=1)
        index = index[:certainty.shape[1]]   # images left out as unreadable shift the order, not the figures
        certainty, correct = gather_samples(certainty, index).cpu(), gather_samples(correct.byte(), index).bool().cpu()
        details = self.details and Details(*(gather_samples(torch.cat(column, dim=1), index).cpu()
                                             for column in zip(*self.details)))
        return Predictions(certainty, correct, 100 * all_reduce_sum(self.top5).double().cpu() / certainty.shape[1], details)
