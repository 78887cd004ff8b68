"""Optimisers and learning-rate schedules by their command-line names."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn


def build_optimizer(backbone: nn.Module, *, name: str, lr: float, momentum: float,
                    weight_decay: Sequence[float]) -> torch.optim.Optimizer:
    """Optimiser over the parameters of a backbone that are not frozen.

    Args:
        name: "sgd", "rmsprop" or "adam".
        momentum: of SGD and RMSprop; Adam keeps its own averages.
        weight_decay: one value for all parameters, or two that are interpolated linearly over MSDNet's blocks from the
            first to the last; a block's classifier belongs to it.
    Raises:
        ValueError: two weight decays for a backbone that is not a plain chain of blocks.
    """
    groups = _groups(backbone, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, momentum=momentum)
    return torch.optim.Adam(groups, lr=lr)


def _groups(backbone: nn.Module, weight_decay: Sequence[float]) -> list[dict]:
    if len(weight_decay) == 1:
        return [{"params": [p for p in backbone.parameters() if p.requires_grad], "weight_decay": weight_decay[0]}]
    if not hasattr(backbone, "blocks"):
        raise ValueError("two --weight-decay values are interpolated over MSDNet's blocks; pass one for this architecture")
    first, last = weight_decay
    steps = max(backbone.n_exits - 1, 1)
    return [{"params": [*block.parameters(), *classifier.parameters()], "weight_decay": first + (last - first) * i / steps}
            for i, (block, classifier) in enumerate(zip(backbone.blocks, backbone.classifier, strict=True))]


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the epochs done.

    Both kinds multiply in the order of torch's schedulers, and so give their rates to the last bit.

    Attributes:
        kind: "multistep" (times `decay_rate` at each milestone) or "cosine" (to zero at the end).
        lr: at the start.
        epochs: in all.
        milestones: epochs after which the rate drops, rising.
    """

    kind: str
    lr: float
    epochs: int
    milestones: Sequence[int] = ()
    decay_rate: float = 0.1

    def __call__(self, epochs_done: int) -> float:
        lr = self.lr
        if self.kind == "cosine":
            heights = [1 + math.cos(math.pi * epoch / self.epochs) for epoch in range(epochs_done + 1)]
            for before, after in pairwise(heights):
                lr = after / before * lr
            return lr
        for _ in range(sum(milestone <= epochs_done for milestone in self.milestones)):
            lr *= self.decay_rate
        return lr
