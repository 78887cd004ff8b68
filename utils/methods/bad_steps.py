"""Steps that must not count: their loss or a gradient is NaN or infinite."""
from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from utils.core.distributed import any_rank
from utils.methods.losses import ExitLosses


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no tensor has a NaN or an infinite number, as a bool tensor on their device."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return torch.nn.utils.get_total_norm(floats, norm_type=math.inf).isfinite()


class BadSteps:
    """Finds steps whose loss or gradient is not finite, and takes back what their forward pass changed.

    Finding them waits for the device in every step.
    """

    def __init__(self, model: nn.Module, objective: ExitLosses) -> None:
        self.objective = objective
        self.parameters, self.buffers = list(model.parameters()), list(model.buffers())

    def before_forward(self) -> None:
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.average_before = self.objective.average   # a new tensor in every step

    def found(self, per_sample: Tensor) -> bool:
        """Whether this step, with losses (n_exits, B), is bad on any rank; to be called after the backward pass."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return any_rank(not (per_sample.isfinite().all() & all_finite(gradients)))

    @torch.no_grad()
    def undo(self) -> None:
        for buffer, before in zip(self.buffers, self.buffers_before):
            buffer.copy_(before)
        self.objective.average = self.average_before
