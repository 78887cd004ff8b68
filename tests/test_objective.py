"""Losses of all exits, their equalisation, optimisers and schedules, against sums done by hand."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from models import MSDNet, RANet
from utils.core.errors import UserError
from utils.methods import losses
from utils.methods.losses import ExitLosses, cross_entropies
from utils.training.engine import valid_share
from utils.training.optim import Schedule, build_optimizer


def _predictions(*exits):
    return [torch.tensor(rows, requires_grad=True) for rows in exits]


def _loss(objective, predictions, labels, share=1.0):
    return objective(cross_entropies(predictions, labels), share)


def test_two_exits_by_hand():
    predictions = _predictions([[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]])
    per_sample = cross_entropies(predictions, torch.tensor([0, 1]))
    first, easy, hard = 0.6931472, 0.3132617, 1.3132617   # ln 2, ln(1 + 1/e), ln(1 + e)
    torch.testing.assert_close(per_sample, torch.tensor([[first, first], [easy, hard]]))
    assert ExitLosses()(per_sample).item() == pytest.approx(first + (easy + hard) / 2, rel=1e-6)


def test_smoothed_targets_by_hand():
    """With 0.1 of two classes: 0.95 of the label's cross entropy and 0.05 of the other class's."""
    easy, hard = 0.3132617, 1.3132617
    found = cross_entropies(_predictions([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), 0.1)
    torch.testing.assert_close(found, torch.tensor([[0.95 * easy + 0.05 * hard, 0.95 * hard + 0.05 * easy]]))


def test_equalised_loss_divides_by_the_moving_average_and_starts_from_the_first_value():
    objective, y = ExitLosses(equalise=True), torch.tensor([0])
    a = torch.tensor([0.5, 2.0])
    for step in range(3):
        predictions = _predictions([[0.3 * step, 0.0]], [[-1.0, float(step)]])
        per_exit = torch.stack([F.cross_entropy(p, y) for p in predictions])
        a = per_exit.detach() if step == 0 else 0.9 * a + 0.1 * per_exit.detach()
        loss = _loss(objective, predictions, y)
        torch.testing.assert_close(loss, a.mean() * (per_exit / a).sum())
        loss.backward()
        want = torch.autograd.grad((a.mean() / a * torch.stack([F.cross_entropy(p, y) for p in predictions])).sum(), predictions)
        for p, g in zip(predictions, want, strict=True):   # a carries no gradient
            torch.testing.assert_close(p.grad, g)


def test_a_ranks_share_weights_its_loss():
    predictions, y = _predictions([[1.0, -1.0]]), torch.tensor([1])
    assert _loss(ExitLosses(), predictions, y, share=0.5).item() == pytest.approx(_loss(ExitLosses(), predictions, y).item() / 2)


def test_the_moving_average_is_over_all_ranks_and_comes_back_from_a_checkpoint(monkeypatch):
    assert ExitLosses().equalise is False and ExitLosses().state_dict() == {"average": None}
    monkeypatch.setattr(losses, "world_size", lambda: 2)
    monkeypatch.setattr(losses, "all_reduce_sum", lambda mine: mine + torch.tensor([0.6, 1.0]))   # of the other rank
    objective = ExitLosses(equalise=True)
    objective(torch.tensor([[1.0, 3.0], [4.0, 4.0]]), share=0.5)
    torch.testing.assert_close(objective.average, torch.tensor([(2 * 0.5 + 0.6) / 2, (4 * 0.5 + 1) / 2]))
    again = ExitLosses(equalise=True)
    again.load_state_dict(objective.state_dict(), torch.device("cpu"))
    assert torch.equal(again.average, objective.average)
    again.load_state_dict({"average": None}, torch.device("cpu"))
    assert again.average is None


def test_valid_samples_are_those_above_the_tenth_percentile_of_the_first_exit():
    first = torch.arange(1.0, 11.0)   # the 10th percentile lies between the lowest and the second
    share = valid_share(torch.stack([first, torch.full((10,), 1.5), torch.full((10,), 5.0)]))
    assert share.tolist() == pytest.approx([0.9, 0.0, 1.0])


def test_the_optimizer_flag_selects_the_optimizer():
    net = MSDNet(n_blocks=2, n_channels=4, base=1)
    for name, kind in (("sgd", torch.optim.SGD), ("rmsprop", torch.optim.RMSprop), ("adam", torch.optim.Adam)):
        optimizer = build_optimizer(net, name=name, lr=0.2, momentum=0.7, weight_decay=[1e-3])
        assert type(optimizer) is kind
        group, = optimizer.param_groups
        assert group["lr"] == 0.2 and group["weight_decay"] == 1e-3 and group.get("momentum", 0.7) == 0.7
        assert len(group["params"]) == len(list(net.parameters()))


def test_two_weight_decays_are_interpolated_over_blocks_with_their_classifiers():
    net = MSDNet(n_blocks=3, n_channels=4, base=1)
    optimizer = build_optimizer(net, name="sgd", lr=0.1, momentum=0.9, weight_decay=[1e-4, 5e-4])
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([1e-4, 3e-4, 5e-4])
    for i, group in enumerate(optimizer.param_groups):
        assert {id(p) for p in group["params"]} == {id(p) for m in (net.blocks[i], net.classifier[i]) for p in m.parameters()}
    ranet = RANet(n_blocks=1, n_channels=4, scale_list=[1, 2, 3], gr_factor=[4, 2, 1], bn_factor=[4, 2, 1])
    with pytest.raises(UserError, match="MSDNet's; pass one"):
        build_optimizer(ranet, name="sgd", lr=0.1, momentum=0.9, weight_decay=[1e-4, 5e-4])
    net.extra = torch.nn.Linear(2, 2)   # such as what `start` runs, of which `block` says nothing
    with pytest.raises(UserError, match="extra.weight is in none of them"):
        build_optimizer(net, name="sgd", lr=0.1, momentum=0.9, weight_decay=[1e-4, 5e-4])


@pytest.mark.parametrize("kind, want", [("multistep", [1.0, 1.0, 0.1, 0.1, 0.01]),
                                        ("cosine", [1.0, 0.9045, 0.6545, 0.3455, 0.0955]),
                                        ("linear", [1.0, 0.8, 0.6, 0.4, 0.2])])
def test_schedules(kind, want):
    for step in ("batch", "epoch"):
        schedule = Schedule(kind, lr=1.0, epochs=5, milestones=[2, 4], decay_rate=0.1, step=step)
        assert [schedule(epoch) for epoch in range(5)] == pytest.approx(want, abs=1e-4), step


@pytest.mark.parametrize("kind, want", [("multistep", [0.8, 0.08, 0.08]), ("cosine", [0.6828427, 0.2469266, 0.0304482]),
                                        ("linear", [0.6, 0.3, 0.1])])
def test_within_an_epoch_the_rate_moves_per_batch_and_stays_per_epoch(kind, want):
    """0.4 (1 + cos(pi/4)), 0.4 (1 + cos(5 pi/8)), 0.4 (1 + cos(7 pi/8)); drops come at the epochs' borders alone."""
    places = [1.0, 2.5, 3.5]   # of 4 epochs
    schedule = Schedule(kind, lr=0.8, epochs=4, milestones=[2])
    assert [schedule(progress) for progress in places] == pytest.approx(want, abs=1e-7)
    per_epoch = Schedule(kind, lr=0.8, epochs=4, milestones=[2], step="epoch")
    assert [per_epoch(progress) for progress in places] == [per_epoch(int(progress)) for progress in places]


@pytest.mark.parametrize("step", ["batch", "epoch"])
def test_a_warm_up_is_linear_from_zero_and_goes_batch_by_batch(step):
    schedule = Schedule("multistep", lr=0.8, epochs=4, milestones=[1], warmup_epochs=2.0, step=step)
    assert [schedule(progress) for progress in (0, 0.5, 1.5, 2, 3)] == pytest.approx([0, 0.2, 0.06, 0.08, 0.08])


def test_another_optimiser_falls_as_a_cosine_in_the_same_steps_and_is_not_warmed_up():
    places = [0, 1, 1.5, 3, 3.999]
    schedule = Schedule("multistep", lr=9.0, epochs=4, milestones=[1], warmup_epochs=2.0)
    assert [schedule.cosine(0.2)(progress) for progress in places] == pytest.approx(
        [0.2, 0.1707107, 0.1382683, 0.0292893, 0], abs=1e-6)
    per_epoch = Schedule("multistep", lr=9.0, epochs=4, step="epoch").cosine(0.2)
    # Version 0.1 computed it so, to these bits.
    assert [per_epoch(progress) for progress in places] == [0.2 * (1 + math.cos(math.pi * n / 4)) / 2 for n in (0, 1, 1, 3, 3)]


def test_nesterov_is_for_sgd():
    net = MSDNet(n_blocks=2, n_channels=4, base=1)
    for nesterov in (True, False):
        optimizer = build_optimizer(net, name="sgd", lr=0.2, momentum=0.7, weight_decay=[1e-3], nesterov=nesterov)
        assert optimizer.param_groups[0]["nesterov"] is nesterov


@pytest.mark.parametrize("lr", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("kind", ["multistep", "cosine"])
def test_learning_rates_are_those_of_torchs_schedulers_to_the_last_bit(kind, lr):
    """Runs of version 0.1 had them, and go on with these."""
    schedule = Schedule(kind, lr, epochs=300, milestones=[75, 150, 151, 225], decay_rate=0.2, step="epoch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = (MultiStepLR(optimizer, milestones=[75, 150, 151, 225], gamma=0.2) if kind == "multistep" else
                 CosineAnnealingLR(optimizer, T_max=300))
    for epoch in range(300):
        assert schedule(epoch) == optimizer.param_groups[0]["lr"], epoch
        optimizer.step()
        scheduler.step()
