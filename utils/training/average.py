"""A moving average of the weights in training, which is what is evaluated and kept in place of the last step's."""
from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from models import BoostedNet


class WeightAverage:
    """Exponential moving average of a network's parameters and buffers over the steps of an optimiser.

    After the first step it is a copy; after each later one, decay * average + (1 - decay) * network. Whole numbers, which count
    the batches of batch normalisation, are copied. These are the bits of torch.optim.swa_utils.AveragedModel with
    use_buffers=True, which on a GPU would have the host wait for the device in every step, to read its own counter.

    Args:
        network: in training; its tensors have to stay the same objects.
        decay: between 0 and 1.
    Attributes:
        model: a network with the averages.
        n_averaged: steps so far.
    """

    def __init__(self, network: BoostedNet, decay: float) -> None:
        self.decay, self.n_averaged = decay, 0
        self.model = copy.deepcopy(network).requires_grad_(False)
        pairs = list(zip(_tensors(self.model), _tensors(network), strict=True))
        self._all = _columns(pairs)
        self._floats = _columns([pair for pair in pairs if pair[0].is_floating_point()])
        self._counts = _columns([pair for pair in pairs if not pair[0].is_floating_point()])

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network as it is after a step."""
        if self.n_averaged == 0:
            torch._foreach_copy_(*self._all)
        else:
            torch._foreach_lerp_(*self._floats, 1 - self.decay)
            if self._counts[0]:
                torch._foreach_copy_(*self._counts)
        self.n_averaged += 1


def _tensors(network: BoostedNet) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [average for average, _ in pairs], [value for _, value in pairs]
