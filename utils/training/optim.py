"""Optimisers and learning-rate schedules by their command-line names."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from utils.core.errors import UserError


def build_optimizer(backbone: nn.Module, *, name: str, lr: float, momentum: float, weight_decay: Sequence[float],
                    nesterov: bool = False) -> torch.optim.Optimizer:
    """Optimiser over the parameters of a backbone that are not frozen.

    Args:
        name: "sgd", "rmsprop" or "adam".
        momentum: of SGD and RMSprop; Adam keeps its own averages.
        weight_decay: one value for all parameters, or two that are interpolated linearly from the first exit to the last; to an
            exit belong its classifier and the block in front of it.
        nesterov: Nesterov's momentum, of SGD only.
    Raises:
        UserError: two weight decays for a backbone that is not a plain chain of blocks, or whose blocks lack a parameter.
    """
    groups = _groups(backbone, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, momentum=momentum)
    return torch.optim.Adam(groups, lr=lr)


def _groups(backbone: nn.Module, weight_decay: Sequence[float]) -> list[dict]:
    if len(weight_decay) == 1:
        return [{"params": [p for p in backbone.parameters() if p.requires_grad], "weight_decay": weight_decay[0]}]
    if not (hasattr(backbone, "block") and hasattr(backbone, "head")):
        raise UserError("two --weight-decay values are interpolated over the blocks of a chain, such as MSDNet's; pass one for "
                        "this network, which does not say what its blocks are")
    first, last = weight_decay
    steps = max(backbone.n_exits - 1, 1)
    groups = [{"params": [p for module in (*backbone.block(n), backbone.head(n)) for p in module.parameters() if p.requires_grad],
               "weight_decay": first + (last - first) * n / steps} for n in range(backbone.n_exits)]
    grouped = {p for group in groups for p in group["params"]}
    left_out = [name for name, p in backbone.named_parameters() if p.requires_grad and p not in grouped]
    if left_out:   # they would not be trained
        raise UserError(f"two --weight-decay values are interpolated over the blocks of a chain, and {left_out[0]} is in none of "
                        f"them; let {type(backbone).__name__}.block(0) have what `start` runs, or pass one value")
    return groups


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of progress: epochs done, and of the epoch under way the part that is done.

    Per epoch, the rates are those of torch's schedulers to the last bit: both kinds there are multiply in the same order.

    Attributes:
        kind: "multistep" (times `decay_rate` at each milestone), "cosine" or "linear" (to zero at the end).
        lr: from which it falls.
        epochs: in all.
        milestones: epochs after which the rate drops, rising.
        step: "batch" or "epoch": what the rate stays the same for, apart from the warm-up.
        warmup_epochs: during which the rate is multiplied by a factor that rises linearly from 0 to 1, batch by batch.
    """

    kind: str
    lr: float
    epochs: int
    milestones: Sequence[int] = ()
    decay_rate: float = 0.1
    step: str = "batch"
    warmup_epochs: float = 0.0

    def __call__(self, progress: float) -> float:
        lr = self._falling(self._stepped(progress))
        return lr * (progress / self.warmup_epochs) if progress < self.warmup_epochs else lr

    def cosine(self, lr: float) -> Callable[[float], float]:
        """The rate of another optimiser in the same run, which falls from `lr` to zero as a cosine, without a warm-up."""
        return lambda progress: _half_cosine(lr, self._stepped(progress), self.epochs)

    def _stepped(self, progress: float) -> float:
        return math.floor(progress) if self.step == "epoch" else progress

    def _falling(self, progress: float) -> float:
        if self.kind == "linear":
            return self.lr * (1 - progress / self.epochs)
        if self.kind == "cosine" and self.step == "batch":
            return _half_cosine(self.lr, progress, self.epochs)
        lr = self.lr
        if self.kind == "cosine":
            heights = [1 + math.cos(math.pi * epoch / self.epochs) for epoch in range(math.floor(progress) + 1)]
            for before, after in pairwise(heights):
                lr = after / before * lr
            return lr
        for _ in range(sum(milestone <= progress for milestone in self.milestones)):
            lr *= self.decay_rate
        return lr


def _half_cosine(lr: float, progress: float, epochs: int) -> float:
    return 0.5 * lr * (1 + math.cos(math.pi * progress / epochs))
