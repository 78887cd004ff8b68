"""One epoch of steps: what may not outlive a step, what is switched on for its length, and what ends it."""
from __future__ import annotations

import weakref

import pytest
import torch

from models import BoostedNet, MSDNet
from utils.core.errors import UserError
from utils.methods import Method
from utils.training import engine
from utils.training.engine import EpochMeters, train_epoch


@pytest.fixture
def model() -> BoostedNet:
    torch.manual_seed(0)
    return BoostedNet(MSDNet(n_blocks=2, n_channels=4, base=1, step=1, num_classes=3), [0.5, 0.5])


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    return [(torch.randn(n, 3, 32, 32), torch.arange(n) % 3, 1.0) for n in sizes]


class Watched(Method):
    """Notes before every step whether the autograd graph of an earlier one is alive, and whether cuDNN times its algorithms."""

    def __init__(self, model: BoostedNet) -> None:
        super().__init__(model, torch.optim.SGD(model.parameters(), lr=0.01))
        self.totals: list[weakref.ref] = []
        self.alive: list[int] = []
        self.tuned: list[bool] = []

    def step(self, images, labels, share=1.0):
        self.alive.append(sum(total() is not None for total in self.totals))
        self.tuned.append(torch.backends.cudnn.benchmark)
        outcome = super().step(images, labels, share)
        self.totals.append(weakref.ref(outcome.total))
        return outcome


def run(method: Method, data: list) -> EpochMeters:
    meters = EpochMeters(2, torch.device("cpu"))
    assert train_epoch(method, data, meters, after_step=lambda step: False)
    return meters


def test_the_graph_of_a_step_is_gone_before_the_next_one(model):
    """CUDA refuses to capture a step while an earlier, eager one still has its graph, as after a batch of another size."""
    method = Watched(model)
    run(method, batches(5, 6, 6))
    assert method.alive == [0, 0, 0]


def test_convolutions_are_tuned_in_training_alone_and_never_in_deterministic_runs(model, deterministic):
    method = Watched(model)
    run(method, batches(4))
    assert method.tuned == [True] and not torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    run(method, batches(4))
    assert method.tuned == [True, False]


def test_a_batch_without_an_image_is_counted_alone_and_refused_among_several_processes(model, monkeypatch):
    """The others would wait for its gradients for ever."""
    meters = run(Watched(model), batches(4, 0, 4))
    assert (meters.steps, meters.skipped, meters.samples) == (3, 1, 8)
    monkeypatch.setattr(engine, "world_size", lambda: 2)
    with pytest.raises(UserError, match="without an image that can be read"):
        run(Watched(model), batches(4, 0, 4))
