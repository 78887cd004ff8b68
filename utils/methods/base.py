"""What a training method is, and the two methods that are nothing but a sum over the exits."""
from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import BoostedNet
from utils.core import distributed
from utils.core.errors import UserError
from utils.data.sampling import global_batch_size, part_sizes
from utils.methods.losses import ExitLosses, cross_entropies
from utils.runs import checkpoint


class Outcome(NamedTuple):
    """Loss of one forward pass and what the figures of an epoch are made of.

    Attributes:
        total: scalar to call backward on.
        predictions: n_exits x (B, num_classes).
        labels: (B,).
        per_sample: (n_exits, B) cross entropies, smoothed where the method smooths labels, without gradient.
    """

    total: Tensor
    predictions: list[Tensor]
    labels: Tensor
    per_sample: Tensor


class Method:
    """Turns (model, batch) into a step of the optimiser. This one: the sum over the exits of their mean cross entropies.

    With a boosted head that is BoostNet (arXiv:2211.16726, eq. 6), with every temperature 0 the joint baseline. Another method
    overrides `loss`, or `step` where a batch is more than one pass; docs/methods.md, "How to add a method".

    In several processes every gradient is averaged over them before it is used. All processes have to take the same course in a
    step, or they wait for each other for ever: what they do may depend on the size of the whole batch, never on that of their own
    part or on what is in it.

    Args:
        model: the network in training.
        optimizer: over its parameters.
        network: what to call for predictions in training: another form of the model, with the same parameters and buffers
            (`training_forward`). Default: the model itself. In several processes it is replaced by what
            `distributed.wrap` returns.
        label_smoothing: of every cross entropy in training, see `losses.cross_entropies`.
        equalise: see `ExitLosses`.
    Attributes:
        other_optimizers: of networks of the method's own; each rate falls to zero as a cosine over the run.
    """

    other_optimizers: tuple[torch.optim.Optimizer, ...] = ()

    def __init__(self, model: BoostedNet, optimizer: torch.optim.Optimizer, *, network: nn.Module | None = None,
                 label_smoothing: float = 0.0, equalise: bool = False) -> None:
        self.model, self.optimizer, self.network = model, optimizer, network or model
        self.label_smoothing = label_smoothing
        self.objective = ExitLosses(equalise)

    @classmethod
    def options(cls, args: argparse.Namespace) -> dict[str, Any]:
        """Keywords of the constructor that come from the method's own flags."""
        return {"equalise": args.loss_equal}

    @staticmethod
    def load_start(model: BoostedNet, saved: dict[str, Any], source: str, *, new_classifier: bool = False) -> list[str]:
        """Begin with the weights of a checkpoint (from `checkpoint.load`); return the names of the tensors that are left new.

        Raises:
            UserError: when they do not fit.
        """
        return checkpoint.load_weights(model.backbone, saved["state_dict"], source, new_classifier=new_classifier,
                                       is_start=True)

    def step(self, images: Tensor, labels: Tensor, share: float = 1.0) -> Outcome | None:
        """Train on one batch, images (B, 3, H, W) and labels (B,); None when it was left out.

        `share`: see `ExitLosses`.
        """
        return self.update(images, labels, share)

    @staticmethod
    def smallest_pass(n: int) -> int:
        """Images of the smallest forward pass, in training mode, that `step` makes of a batch of n >= 1 images."""
        return n

    def update(self, images: Tensor, labels: Tensor, share: float = 1.0) -> Outcome:
        """One forward pass, one backward pass, one step of the optimiser."""
        outcome = self.loss(images, labels, share)
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(outcome.total)
        if not distributed.is_averaged(self.network):
            distributed.average_gradients(self.model.parameters())
        self.optimizer.step()
        return outcome

    def loss(self, images: Tensor, labels: Tensor, share: float = 1.0) -> Outcome:
        """Forward pass and loss."""
        predictions = self.predict(images)
        per_sample = self.cross_entropies(predictions, labels)
        return Outcome(self.objective(per_sample, share), predictions, labels, per_sample.detach())

    def predict(self, images: Tensor) -> list[Tensor]:
        """Predictions of all exits in training, n_exits x (B, num_classes)."""
        return self.network(images)

    def cross_entropies(self, predictions: list[Tensor], labels: Tensor) -> Tensor:
        """Cross entropies in training, (n_exits, B)."""
        return cross_entropies(predictions, labels, self.label_smoothing)

    def backward(self, total: Tensor) -> None:
        """Put the gradients of this process's loss into the parameters."""
        total.backward()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides model and optimiser: tensors and plain types."""
        return self.objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state, next(self.model.parameters()).device)


def parts_of_batch(labels: Tensor, share: float) -> list[int]:
    """How many images of the global batch each process was given, where this one's labels (B,) weigh `share`.

    The same in all processes, whatever part each of them has and could read.
    """
    world = distributed.world_size()
    return part_sizes(global_batch_size(len(labels), share, world), world)


def is_divisible(labels: Tensor, share: float) -> bool:
    """Whether every process has at least two images in this step, labels (B,) here; the same answer in all of them.

    Raises:
        UserError: when all were given two, and this one could not read them: the others would wait for it.
    """
    if distributed.world_size() == 1:
        return len(labels) > 1
    divisible = min(parts_of_batch(labels, share)) > 1
    if divisible and len(labels) < 2:
        raise UserError("a process has a batch with a single image that can be read, see above; remove files that cannot")
    return divisible
