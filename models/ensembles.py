"""Other ways to read the exits of a trained network, to compare the additive head with."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.boosted_head import BoostedNet


class AveragedNet(BoostedNet):
    """A backbone whose exit n is read as the mean of the softmax probabilities of exits 1 to n.

    Its predictions F_n are the logarithms of these means, so that softmax(F_n) = (softmax(f_1) + ... + softmax(f_n)) / n.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone, [0.0] * backbone.n_exits)

    def add(self, n: int, raw: Tensor, previous: Tensor | None, trainable: bool = False) -> Tensor:
        log_probabilities = raw.log_softmax(dim=1)
        if previous is None:
            return log_probabilities
        # Index n counts from 0: `previous` is the mean of n exits, the result that of n + 1.
        return torch.logaddexp(previous + math.log(n / (n + 1)), log_probabilities - math.log(n + 1))


def read_as(ensemble: str, backbone: nn.Module, temperatures: Sequence[float]) -> BoostedNet:
    """The network whose exit n predicts from the raw logits f_1 ... f_n of a backbone in the named way.

    * none: f_n alone.
    * boost: the additive head with the given temperatures, one per exit.
    * average: the mean of the probabilities, `AveragedNet`.
    * poe: the product of the probabilities of exits 1 to n for each class, divided by its sum over the classes (product of
      experts). In logits it is f_1 + ... + f_n, which makes it the additive head with every temperature 1.
    """
    if ensemble == "average":
        return AveragedNet(backbone)
    fixed = {"none": 0.0, "poe": 1.0}
    return BoostedNet(backbone, [fixed[ensemble]] * backbone.n_exits if ensemble in fixed else temperatures)
