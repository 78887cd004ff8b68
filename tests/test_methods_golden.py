"""Sample weighting, block-dependent losses and collaborating exits equal their released implementations in float64."""
from __future__ import annotations

import copy

import golden
import pytest
import torch
from torch import nn

from args import parse_args
from models import BoostedNet, CollaborativeNet, build_backbone
from op_counter import measure_model
from utils.methods import Method
from utils.methods.block_losses import BlockLosses
from utils.methods.distillation import Distillation
from utils.methods.imta import Collaboration
from utils.methods.l2w import SampleWeighting, WeightNet, leaving
from utils.methods.losses import divergence
from utils.training.fast_forward import training_forward
from utils.training.optim import build_optimizer

L2W, BDL, IMTA = golden.load("l2w"), golden.load("bdl"), golden.load("imta")


def exact(value: float):
    return pytest.approx(value, rel=1e-9)


def network(arch: str, flags: str) -> nn.Module:
    words = flags.split()
    if "--arch" in words:
        words[words.index("--arch") + 1] = arch
    else:
        words += ["--arch", arch]
    words[words.index("--data")] = "--dataset"
    return build_backbone(parse_args(words))


def alone(backbone: nn.Module) -> BoostedNet:
    """The network with exits that predict alone."""
    return BoostedNet(backbone, [0.0] * backbone.n_exits).train()


def sgd(backbone: nn.Module, momentum: float = 0.9) -> torch.optim.Optimizer:
    return build_optimizer(backbone, name="sgd", lr=0.1, momentum=momentum, weight_decay=[1e-4])


def float64(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def buffers(model: nn.Module, kind: str) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith(kind)]


def assert_gradients(named_parameters, stored, noise=()) -> None:
    got = dict(named_parameters)
    assert list(got) == [name for name, *_ in stored]
    for name, total, l2 in stored:
        if total is None or l2 is None:
            assert got[name].grad is None, name
        elif name not in noise:   # zero in exact arithmetic: what is stored there is rounding noise
            stats = golden.sum_l2([got[name].grad])
            assert stats.l2 == pytest.approx(l2, rel=1e-8), name
            assert abs(stats.sum - total) <= 1e-8 * l2, name


# Learning to weight samples.

def spied(method, name: str, seen: list):
    """Let `seen` have what the method's function `name` returns, computed as always."""
    function = getattr(method, name)

    def spy(*arguments):
        seen.append(function(*arguments))
        return seen[-1]

    setattr(method, name, spy)


@pytest.fixture(scope="module")
def l2w_backbone() -> nn.Module:
    return golden.fill(network("msdnet", L2W["model_flags"]))


def weighting(backbone, run) -> SampleWeighting:
    model = alone(copy.deepcopy(backbone))
    method = SampleWeighting(model, sgd(model.backbone, 0.0 if run["scenario"] == "A" else 0.9),
                             network=training_forward(model, batch_size=run["batch"]),
                             reads=run["weight_net_input"], centring=run["constraint"], epsilon=0.3, target_p_index=15,
                             meta_lr=1e-4, meta_weight_decay=1e-4)
    golden.fill(method.weight_net)
    return method


@pytest.mark.parametrize("run", L2W["runs"], ids=lambda r: "-".join(
    str(r[name]) for name in ("scenario", "batch", "constraint", "weight_net_input")))
def test_an_iteration_of_sample_weighting(l2w_backbone, run, monkeypatch):
    method = weighting(l2w_backbone, run)
    model, images, labels = method.model, golden.images(run["batch"], 32), golden.targets(run["batch"], 100)
    assert labels.tolist() == L2W[f"batch{run['batch']}"]["targets"]
    if run["scenario"] == "B":
        plain = Method(model, method.optimizer, network=method.network)
        totals = [plain.step(images, labels).total.item() for _ in range(2)]
        assert totals == pytest.approx(run["two_plain_step_losses"], rel=1e-9)

    weights, meta_losses, outcomes, selected, meta_gradients, gradients = [], [], [], [], [], []
    spied(method, "weights", weights)
    spied(method, "meta_loss", meta_losses)
    spied(method, "update", outcomes)
    monkeypatch.setattr("utils.methods.l2w.leaving", lambda *a: selected.append(leaving(*a)) or selected[-1])
    meta_step, step = method.meta_optimizer.step, method.optimizer.step
    monkeypatch.setattr(method.meta_optimizer, "step", lambda: (
        meta_gradients.append({n: p.grad.clone() for n, p in method.weight_net.named_parameters()}), meta_step()))
    monkeypatch.setattr(method.optimizer, "step", lambda: (
        gradients.append(golden.sum_l2(p.grad for p in model.parameters() if p.grad is not None)), step()))
    whole = method.step(images, labels)

    for i, part in enumerate((run["part1"], run["part2"])):
        torch.testing.assert_close(weights[2 * i].T, float64(part["weights"]), rtol=1e-9, atol=1e-12)
        assert [sorted(index.tolist()) for index in selected[i]] == [sorted(s) for s in part["selected_samples_per_exit"]]
        assert meta_losses[i].item() == exact(part["meta_loss"])
        for name, total, l2 in part["weight_net_grads"]:
            stats = golden.sum_l2([meta_gradients[i][name]])
            assert stats.l2 == pytest.approx(l2, rel=1e-8) and abs(stats.sum - total) <= 1e-8 * l2, name
        torch.testing.assert_close(weights[2 * i + 1].T, float64(part["classification_weights_after_weight_net_update"]),
                                   rtol=1e-9, atol=1e-12)
        assert outcomes[i].total.item() == exact(part["classification_loss_total"])
        losses = float64(part["classification_losses_per_sample"]).T
        torch.testing.assert_close(outcomes[i].per_sample, losses, rtol=1e-9, atol=0)
        torch.testing.assert_close(whole.per_sample[:, i * run["batch"] // 2:][:, :run["batch"] // 2], losses, rtol=1e-9, atol=0)
        assert gradients[i].l2 == exact(part["classification_gradient_l2"])

    after = run["after_iteration"]
    for kind in ("parameters", "running_mean", "running_var"):
        stats = golden.sum_l2(model.parameters() if kind == "parameters" else buffers(model, kind))
        assert (stats.sum, stats.l2) == (exact(after["model"][kind]["sum"]), exact(after["model"][kind]["l2"])), kind
    for name, (total, l2) in after["weight_net"].items():
        stats = golden.sum_l2([method.weight_net.get_parameter(name)])
        assert (stats.sum, stats.l2) == (pytest.approx(total, abs=1e-9 * l2), exact(l2)), name
    assert buffers(model, "num_batches_tracked")[0] == after["num_batches_tracked"]


def test_the_weight_network_and_the_target_shares_are_the_released_ones(l2w_backbone):
    for reads, width in (("loss_or_conf", 5), ("both", 10)):
        net = WeightNet(width, 5, 500, 1)
        assert [[n, list(t.shape)] for n, t in net.state_dict().items()] == L2W["weight_net"][f"state_dict_{reads}_input"]
    method = weighting(l2w_backbone, L2W["runs"][0])
    assert method.shares.tolist() == pytest.approx(L2W["target_probs_used"], rel=1e-6)   # float32


# Block-dependent losses.

BLOCKS = {"overlap3": {"overlap": 3}, "overlap3_include_final": {"overlap": 3, "include_final": True},
          "no_overlap": {"groups": [3, 4]}, "local_error": {"overlap": 1}, "conventional": {"groups": [7]}}


@pytest.fixture(scope="module")
def bdl_backbone() -> nn.Module:
    return golden.fill(network("msdnet", BDL["model_flags"]))


def block_losses(backbone, name: str, **distillation) -> BlockLosses:
    model = alone(copy.deepcopy(backbone))
    options = {"distill_weight": 0.0, "temperature": 1.0, **distillation, **BLOCKS[name]}
    method = BlockLosses(model, sgd(model.backbone), **options)
    method.optimizer.step = lambda: None   # the gradients are what is compared
    return method


@pytest.mark.parametrize("name", BLOCKS)
def test_block_dependent_losses_and_gradients(bdl_backbone, name):
    want, method = BDL["methods"][name], block_losses(bdl_backbone, name)
    outcome = method.step(golden.images(4, 32), golden.targets(4, 100))
    assert [list(range(first, n + 1)) for n, first in enumerate(method.first_blocks)] == want["blocks_reached_by_exit"]
    assert outcome.per_sample.mean(dim=1).tolist() == pytest.approx(want["exit_losses"], rel=1e-9)
    assert outcome.total.item() == exact(want["total_loss"])
    for got, logits in zip(outcome.predictions, want["raw_logits_train_mode"], strict=True):
        golden.assert_logits(got, logits)
    assert_gradients(method.model.backbone.named_parameters(), want["grads"])
    once = BDL["methods"]["conventional"]["bn_totals_after_one_forward"]   # the others' come from several passes
    for kind in ("running_mean", "running_var"):
        stats = golden.sum_l2(buffers(method.model, kind))
        assert stats.sum == exact(once[f"{kind}_sum"])


@pytest.mark.parametrize("name", BLOCKS)
def test_self_distillation_with_block_dependent_losses(bdl_backbone, name):
    want = BDL["self_distillation"][name]
    method = block_losses(bdl_backbone, name, distill_weight=want["distill_co"], temperature=want["T"])
    outcome = method.step(golden.images(4, 32), golden.targets(4, 100))
    assert outcome.per_sample.mean(dim=1).tolist() == pytest.approx(want["cross_entropy_per_exit"], rel=1e-9)
    terms = method.distillation(golden.images(4, 32), outcome.predictions)
    assert [t.item() for t in terms] == pytest.approx(want["distillation_per_exit"][:-1], rel=1e-9)
    assert len(terms) == len(outcome.predictions) - 1   # the last exit teaches, and its own term would be 0
    assert outcome.total.item() == exact(want["total_loss"])
    assert_gradients(method.model.backbone.named_parameters(), want["grads"])


def test_one_pass_for_conventional_losses_is_the_joint_method(bdl_backbone):
    want = BDL["self_distillation"]["conventional"]
    model = alone(copy.deepcopy(bdl_backbone))
    method = Distillation(model, torch.optim.SGD(model.parameters(), lr=0.0), distill_weight=0.35, temperature=2.5)
    assert method.step(golden.images(4, 32), golden.targets(4, 100)).total.item() == exact(want["total_loss"])
    assert_gradients(model.backbone.named_parameters(), want["grads"])


# Collaborating exits.

@pytest.fixture(scope="module")
def collaborative() -> CollaborativeNet:
    return golden.fill(CollaborativeNet(network("msdnet_ge", IMTA["model_flags"])))


def test_collaborating_exits_have_the_released_names_and_logits(collaborative):
    net, want = copy.deepcopy(collaborative).eval(), IMTA["eval"]
    assert [[n, list(t.shape)] for n, t in net.state_dict().items()] == IMTA["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == IMTA["total_params"]
    with torch.no_grad():
        logits = net(golden.images(2, 32))
        backbone_logits = net.net(golden.images(2, 32))
    for got, stored in zip([*logits, *backbone_logits], [*want["imta_logits"], *want["backbone_logits"]], strict=True):
        golden.assert_logits(got, stored)
    macs, params = measure_model(net, 32, 32)
    unused = sum(p.numel() for classifier in net.net.classifier for p in classifier.linear.parameters())
    assert params[-1] == IMTA["total_params"] - unused   # nobody reads the old answers
    own, _ = measure_model(net.net, 32, 32)
    assert macs[0] == own[0]   # the first exit costs what it did; the others read 128 features and 128 of the exit before
    assert macs[1] - own[1] == 128 * 101 + 128 + 128 * 100


@pytest.mark.parametrize("name", IMTA["runs"])
def test_training_collaborating_exits(collaborative, name):
    want, net = IMTA["runs"][name], copy.deepcopy(collaborative)
    method = Collaboration(alone(net), sgd(net), gamma=want["gamma"], temperature=want["T"])
    method.scale /= 100   # the released program's divergence is a mean over the classes too
    net.net.train()       # and its frozen network goes on moving its statistics
    images, labels = golden.images(4, 32), golden.targets(4, 100)
    frozen = [p.clone() for p in net.net.parameters()]
    totals = []
    for i in range(4):
        outcome = method.loss(images, labels)
        totals.append(outcome.total.item())
        if i == 0:
            for got, stored in zip(outcome.predictions, want["imta_logits_train"], strict=True):
                golden.assert_logits(got, stored)
            assert outcome.per_sample.mean(dim=1).tolist() == pytest.approx(want["cross_entropy_per_exit"], rel=1e-9)
            means = want["running_mean_sum_after_first_forward"]
            for part in ("net", "isc_modules"):
                stats = golden.sum_l2(buffers(net.get_submodule(part), "running_mean"))
                assert stats.sum == exact(means[part])
        if i < 3:
            method.optimizer.zero_grad()
            outcome.total.backward()
            if i == 0:
                trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
                noise = {n for n, _ in trained if n.startswith("isc_modules") and n.endswith(".0.bias")}
                noise |= {n for n, _ in trained if n.startswith("classifier") and n.endswith("bias")}
                assert_gradients(trained, want["grads"], noise)
            method.optimizer.step()
    assert totals == pytest.approx(want["sgd_total_losses"], rel=1e-8)
    assert all(torch.equal(a, b) for a, b in zip(frozen, net.net.parameters()))
    stats = golden.sum_l2(p for p in net.parameters() if p.requires_grad)
    assert stats.sum == pytest.approx(want["after_3_steps"]["classifier_and_isc_parameters"]["sum"], rel=1e-8)


@pytest.mark.parametrize("name", IMTA["runs"])
def test_the_paper_s_divergence_is_the_one_summed_over_the_classes(collaborative, name):
    want, net = IMTA["runs"][name], copy.deepcopy(collaborative).train()
    net.net.train()
    with torch.no_grad():
        predictions, teacher = net.with_teacher(golden.images(4, 32))
    golden.assert_logits(teacher, want["soft_target_logits_train"])
    assert [divergence(p, teacher, want["T"]).item() for p in predictions[:-1]] == pytest.approx(
        want["kl_sum_over_classes_mean_over_batch_per_exit_but_last_not_used"], rel=1e-9)
