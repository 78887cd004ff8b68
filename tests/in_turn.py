"""What several processes do in a step, computed one after the other in this one."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from utils.methods import Method, Outcome
from utils.methods.imta import Collaboration
from utils.methods.l2w import SampleWeighting
from utils.methods.losses import cross_entropies

Part = tuple[Tensor, Tensor, float]   # images, labels, weight of the mean over them


class InTurn:
    """Processes that share one network: each normalises by its own images, and so has buffers of its own."""

    def __init__(self, method: Method, world: int) -> None:
        self.method = method
        self.buffers = [[b.clone() for b in method.model.buffers()] for _ in range(world)]

    def step(self, parts: Sequence[Part]) -> list[Outcome] | None:
        """The step of a method in all processes; their outcomes, None where the batch is left out."""
        alone = min(len(y) for _, y, _ in parts) == 1
        if isinstance(self.method, Collaboration) and alone:
            return None
        if isinstance(self.method, SampleWeighting) and not alone:
            return self.weighted_step(parts)
        if self.method.objective.equalise:
            self.average_losses(parts)
        return self.update(parts)

    def update(self, parts: Sequence[Part]) -> list[Outcome]:
        outcomes, gradients = [], []
        for rank, part in enumerate(parts):
            with self.own_buffers(rank):
                outcomes.append(self.method.loss(*part))
                self.method.optimizer.zero_grad(set_to_none=True)
                self.method.backward(outcomes[-1].total)
                gradients.append([p.grad for p in self.method.model.parameters()])
        take_mean_step(self.method.model.parameters(), gradients, self.method.optimizer)
        return outcomes

    def weighted_step(self, parts: Sequence[Part]) -> list[Outcome]:
        """Both halves of learning to weight samples; the halves of a batch are the first and the second halves of its parts."""
        method: SampleWeighting = self.method
        first = weigh([(x[:len(y) // 2], y[:len(y) // 2]) for x, y, _ in parts])
        second = weigh([(x[len(y) // 2:], y[len(y) // 2:]) for x, y, _ in parts])
        outcomes = []
        for training, held_out in ((first, second), (second, first)):
            if method.batches % method.meta_interval == 0:
                net = list(method.weight_net.parameters())
                gradients = [torch.autograd.grad(share * method.meta_loss(x, y, held_x, held_y), net)
                             for (x, y, _), (held_x, held_y, share) in zip(training, held_out)]
                take_mean_step(net, gradients, method.meta_optimizer)
            outcomes += self.update(training)
        method.batches += 1
        return outcomes

    def average_losses(self, parts: Sequence[Part]) -> None:
        """Put the moving average of the exits' losses over all processes in the place of one process's."""
        losses = []
        for rank, (x, y, share) in enumerate(parts):
            with self.own_buffers(rank, keep=True), torch.no_grad():
                losses.append(share * cross_entropies(self.method.predict(x), y).mean(dim=1))
        current, objective = sum(losses) / len(losses), self.method.objective
        objective.average = current if objective.average is None else 0.9 * objective.average + 0.1 * current
        objective._equalised = lambda per_exit, _: objective.average.mean() * (per_exit / objective.average).sum()

    @contextmanager
    def own_buffers(self, rank: int, keep: bool = False):
        """While the block runs the network has the buffers of one process; with `keep` they do not change."""
        with torch.no_grad():
            for buffer, value in zip(self.method.model.buffers(), self.buffers[rank], strict=True):
                buffer.copy_(value)
        yield
        if not keep:
            self.buffers[rank] = [b.clone() for b in self.method.model.buffers()]


def weigh(parts: Sequence[tuple[Tensor, Tensor]]) -> list[Part]:
    total = sum(len(y) for _, y in parts)
    return [(x, y, len(y) * len(parts) / total) for x, y in parts]


def take_mean_step(parameters, gradients: Sequence[Sequence[Tensor | None]], optimizer: torch.optim.Optimizer) -> None:
    for parameter, each in zip(parameters, zip(*gradients), strict=True):
        there = [gradient for gradient in each if gradient is not None]
        parameter.grad = sum(there) / len(each) if there else None
    optimizer.step()
