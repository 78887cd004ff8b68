"""Second stage on a trained network: new exits that hand their answers on and learn from the network's last one."""
from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor

from models import BoostedNet
from utils.core.errors import UserError
from utils.methods.base import Method, Outcome, is_divisible
from utils.methods.losses import divergence
from utils.runs import checkpoint


class Collaboration(Method):
    """Inline subnetwork collaboration and one-for-all distillation (arXiv:1908.06294) on a trained, frozen network.

    The loss is the cross entropy of the last exit plus, for each other exit, (1 - gamma) * cross entropy + gamma * T^2 *
    divergence from the answer of the network's own last classifier, both softened by T.

    This follows the paper, and the released program does not: it averages the divergence over samples and classes, so that its
    distillation is as many times weaker as there are classes; and it goes on moving the batch-norm statistics of the frozen
    network, where here they stay as trained, in training as in evaluation.

    A batch of one image is left out, as is in several processes one of which any has a single image only: batch normalisation of
    vectors has no statistics for it.

    Args:
        gamma: share of the distillation.
        temperature: T.
    """

    def __init__(self, *args: Any, gamma: float = 0.9, temperature: float = 3.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gamma, self.temperature = gamma, temperature
        self.scale = gamma * temperature ** 2   # of a sample's divergence

    @classmethod
    def options(cls, args: argparse.Namespace) -> dict[str, Any]:
        return {"gamma": args.distill_weight, "temperature": args.distill_T}

    @staticmethod
    def load_start(model: BoostedNet, saved: dict[str, Any], source: str, *, new_classifier: bool = False) -> list[str]:
        if any(saved.get("temperatures", [])):
            raise UserError(f"{source} has boosted exits, whose last one is no teacher by itself; give a network whose exits "
                            "predict alone, such as one trained with --method joint")
        return checkpoint.load_weights(model.backbone.net, saved["state_dict"], source)

    @staticmethod
    def smallest_pass(n: int) -> int:
        return max(n, 2)

    def step(self, images: Tensor, labels: Tensor, share: float = 1.0) -> Outcome | None:
        return self.update(images, labels, share) if is_divisible(labels, share) else None

    def loss(self, images: Tensor, labels: Tensor, share: float = 1.0) -> Outcome:
        predictions, teacher = self.model.backbone.with_teacher(images)
        per_sample = self.cross_entropies(predictions, labels)
        *earlier, last = per_sample.mean(dim=1)
        total = last + sum((1 - self.gamma) * loss + self.scale * divergence(p, teacher, self.temperature)
                           for loss, p in zip(earlier, predictions))
        return Outcome(total * share if share != 1.0 else total, predictions, labels, per_sample.detach())
