"""Distillation: every exit also learns what the last exit, or another network, answers."""
from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from models import BoostedNet
from utils.methods.base import Method, Outcome
from utils.methods.losses import divergence


class Distillation(Method):
    """The sum over the exits of cross entropy + weight * divergence from a teacher.

    The teacher is the network's own last exit, which then has no such term itself, or the last exit of a trained network. Its
    answer is a constant (TNNLS 2023, block-dependent losses; there is no factor T^2).

    Args:
        distill_weight: factor of the divergence.
        temperature: T, by which both logits are divided.
        teacher: a trained network with the same classes; None for self-distillation.
    """

    def __init__(self, *args: Any, distill_weight: float, temperature: float, teacher: BoostedNet | None = None,
                 **options: Any) -> None:
        super().__init__(*args, **options)
        self.distill_weight, self.temperature = distill_weight, temperature
        self.teacher = teacher.eval().requires_grad_(False) if teacher else None

    @classmethod
    def options(cls, args: argparse.Namespace) -> dict[str, Any]:
        return super().options(args) | {"distill_weight": args.distill_weight, "temperature": args.distill_T}

    def loss(self, images: Tensor, labels: Tensor, share: float = 1.0) -> Outcome:
        outcome = super().loss(images, labels, share)
        if self.distill_weight == 0:
            return outcome
        terms = self.distillation(images, outcome.predictions)
        return outcome._replace(total=outcome.total + self.distill_weight * share * sum(terms))

    def distillation(self, images: Tensor, predictions: list[Tensor]) -> list[Tensor]:
        """Divergences of the exits that have a teacher: of all of them, or of all but the last, which teaches the others."""
        if self.teacher is None:
            return [divergence(p, predictions[-1], self.temperature) for p in predictions[:-1]]
        with torch.no_grad():
            answer = self.teacher(images)[-1]
        return [divergence(p, answer, self.temperature) for p in predictions]
