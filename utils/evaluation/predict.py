"""One pass of evaluation over a data set; its figures stay on the device until they are asked for."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.core.distributed import gather_samples, sum_over_ranks
from utils.evaluation.confidence import Measure, confidence


class Predictions(NamedTuple):
    """What evaluation keeps of a data set: two numbers per exit and sample, never the logits.

    Attributes:
        confidence: (n_exits, N) float32, largest softmax probability, or what else tells a certain answer.
        correct: (n_exits, N) bool, top-1 hit.
        top5: (n_exits,) float64, percent of samples whose label is among the five highest (all, with fewer classes).
    """

    confidence: Tensor
    correct: Tensor
    top5: Tensor

    @property
    def n_samples(self) -> int:
        """Images judged, without those that were left out as unreadable."""
        return self.correct.shape[1]

    @property
    def top1(self) -> list[float]:
        """Percent correct at every exit."""
        return (100 * self.correct.double().mean(dim=1)).tolist()


@torch.inference_mode()
def predict(model: nn.Module, batches, measure: Measure = confidence) -> Predictions:
    """Evaluate every exit on every sample of `batches`, each process its part; all get the whole, on the CPU, in file order.

    `measure` turns logits (n_exits, B, C) into what is kept as confidence (n_exits, B).
    """
    was_training = model.training
    model.eval()
    n_exits, device = model.n_exits, next(model.parameters()).device
    certainty, correct = [torch.empty(n_exits, 0, device=device)], [torch.empty(n_exits, 0, dtype=torch.bool, device=device)]
    top5 = torch.zeros(n_exits, dtype=torch.int64, device=device)
    for images, labels, _ in batches:
        if not len(labels):   # its images could not be read
            continue
        all_logits = torch.stack([p.float() for p in model(images)])
        certainty.append(measure(all_logits))
        correct.append(all_logits.argmax(dim=2) == labels)
        k = min(5, all_logits.shape[2])
        top5 += (all_logits.topk(k, dim=2).indices == labels[:, None]).any(dim=2).sum(dim=1)
    model.train(was_training)
    certainty, correct = torch.cat(certainty, dim=1), torch.cat(correct, dim=1)
    index = batches.index[:certainty.shape[1]]   # images left out as unreadable shift the order, not the figures
    certainty, correct = gather_samples(certainty, index).cpu(), gather_samples(correct.byte(), index).bool().cpu()
    return Predictions(certainty, correct, 100 * sum_over_ranks(top5).double().cpu() / certainty.shape[1])
