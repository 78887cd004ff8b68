"""A step of several processes is the mean of what each would do with its part of the batch, and all of them do the same."""
from __future__ import annotations

import pytest
import steps
import torch
from in_turn import InTurn
from jobs import ROOT, finish, launch
from steps import CASES, SIZES, WORLD
from tiny import differences
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.core import distributed
from utils.core.errors import UserError
from utils.methods import l2w
from utils.methods.base import is_divisible


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    """What each of two processes came to."""
    folder = tmp_path_factory.mktemp("together")
    finish(launch(WORLD, ROOT / "tests/steps.py", folder, output=folder / "output"), folder / "output")
    return [torch.load(folder / f"{rank}.pth") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_made_of_the_mean_of_the_gradients_of_all_parts(together, case):
    """The parts are computed one after the other. Where one is of a single image, sample weighting makes a plain step and
    collaborating exits make none.
    """
    method = steps.build(case)
    in_turn, before = InTurn(method, WORLD), steps.state(method)
    for i, n in enumerate(SIZES):
        outcomes = in_turn.step(steps.parts(n))
        with in_turn.own_buffers(0, keep=True):
            wanted = steps.state(method)
        first, second = (found[f"{case} {i}"] for found in together)
        torch.testing.assert_close(first, wanted, rtol=1e-9, atol=1e-11)
        # The statistics of the first process are the ones that are saved.
        second["network"] |= {name: buffer for name, buffer in first["network"].items() if "running" in name}
        assert not list(differences(first, second))
        moved = max((tensor - before["network"][name]).abs().max() for name, tensor in method.model.backbone.named_parameters())
        assert moved > 1e-3 if outcomes else moved == 0
        before = steps.state(method)


@pytest.mark.parametrize("case", CASES)
def test_processes_with_the_same_images_do_to_the_last_bit_what_one_does(together, case):
    method = steps.build(case)
    method.step(*steps.batch(6))
    for found in together:
        assert not list(differences(found[f"{case} same"], steps.state(method)))


def test_a_gradient_that_some_processes_lack_is_zero_there_and_one_that_all_lack_stays_missing(together):
    for found in together:
        everywhere, once, nowhere, frozen = found["mean"]
        assert torch.equal(everywhere, torch.arange(4.0).view(2, 2).T * 1.5)
        assert torch.equal(once, torch.full((2, 2), 1.5)) and nowhere is None and frozen is None


# On GPUs batch normalisation is one more thing for which the processes wait for each other.

class Exchange(torch.autograd.Function):
    """A copy that writes down when it is passed, forwards and backwards, as what the processes exchange there."""

    @staticmethod
    def forward(ctx, x: Tensor, log: list) -> Tensor:
        ctx.log = log
        log.append("forward")
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        ctx.log.append("backward")
        return gradient, None


class Synchronised(nn.modules.batchnorm._BatchNorm):
    """Stand-in for SyncBatchNorm, which refuses to run on the CPU: it exchanges something in both passes of training."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return Exchange.apply(y, self.log) if self.training else y


def synchronise(network: nn.Module, log: list) -> None:
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__, module.log = Synchronised, log


def test_the_trial_step_of_sample_weighting_normalises_by_the_images_of_its_process(monkeypatch):
    """SyncBatchNorm has no second derivative, which the weight network's gradient goes through."""
    log = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", lambda network: synchronise(network, log))
    method, (x, y), alone = steps.build("l2w", torch.device("cuda", 0)), steps.batch(6), steps.build("l2w")
    method.loss(x, y)
    assert log
    log.clear()
    assert torch.equal(method.meta_loss(x[:3], y[:3], x[3:], y[3:]), alone.meta_loss(x[:3], y[:3], x[3:], y[3:])) and not log


@pytest.mark.parametrize("case", ["l2w every other", "boost_l2w", "overlap", "local error", "self-distilled", "imta"])
def test_all_processes_exchange_the_same_in_the_same_order(monkeypatch, case):
    """Whatever their parts are: of a single image in all, in some and in none of them, equal and unequal."""
    logs = [[] for _ in range(3)]
    monkeypatch.setattr(distributed, "world_size", lambda: len(logs))
    for rank, log in enumerate(logs):
        monkeypatch.setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", lambda network, log=log: synchronise(network, log))
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, log=log: log.append(x.numel()))
        method = steps.build(case, torch.device("cuda", 0))
        for n in (3, 5, 6, 7):
            log.append(f"batch of {n}")
            method.step(*steps.parts(n, len(logs))[rank])
    assert logs[0] == logs[1] == logs[2]
    assert {"forward", "backward"} < set(logs[0]) and any(isinstance(entry, int) for entry in logs[0])


@pytest.mark.parametrize("n", [6, 7, 8, 9, 10, 11])
def test_the_halves_of_all_processes_weigh_by_their_sizes(monkeypatch, n):
    """In three processes with 2 to 4 images each. One that cannot be read weighs nothing, the others what they did."""
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    each = [l2w._halves(*part) for part in steps.parts(n, 3)]
    for halves in zip(*each, strict=True):
        sizes = [len(half.labels) for half in halves]
        assert [half.share for half in halves] == pytest.approx([3 * size / sum(sizes) for size in sizes])
    for (x, y, share), (first, second) in zip(steps.parts(n, 3), each):
        assert torch.equal(torch.cat([first.images, second.images]), x) and len(second.labels) - len(first.labels) in (0, 1)
        lost, _ = l2w._halves(x[1:], y[1:], share * (len(y) - 1) / len(y))
        assert lost.share * len(first.labels) == pytest.approx(first.share * len(lost.labels))


def test_one_process_divides_a_batch_of_two_images_lost_ones_or_not():
    labels = torch.zeros(3)
    assert [is_divisible(labels[:n], share=1.0) for n in (1, 2, 3)] == [False, True, True]


def test_a_process_that_has_lost_all_images_but_one_ends_the_run_and_no_other_does(monkeypatch):
    """Each image of a batch of n weighs 2 / n in two processes, where unreadable ones were left out too."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    labels = torch.zeros(9)
    with pytest.raises(UserError, match="a single image that can be read"):
        is_divisible(labels[:1], share=2 / 4)
    assert [is_divisible(labels[:m], share=m * 2 / n) for n, m in ((4, 2), (5, 2), (5, 3), (9, 4), (9, 2))] == [True] * 5
    assert not any(is_divisible(labels[:m], share=m * 2 / n) for n, m in ((2, 1), (3, 1), (3, 2)))
