"""Boosted exits on any chain of modules, and on torchvision's ResNets."""
from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import command, make_images, one_line_error
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

import eval_cifar100
import train_cifar100
from adaptive_inference import EarlyExit, exit_index
from args import choose_network, parse_args
from models import Backbone, BoostedNet, ChainNet, CollaborativeNet, PooledClassifier, ResNet, check_backbone
from models.folding import _has_hooks, fold_batch_norm
from op_counter import measure_model
from utils.core.errors import UserError
from utils.evaluation.fast_form import prepare_for_inference
from utils.evaluation.programs import export_steps
from utils.runs import checkpoint
from utils.training.optim import build_optimizer

CLASSES = 5


class PreActivation(nn.Module):
    """A residual block in which normalisation and ReLU come before each convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class Block(nn.Module):
    """Convolution, normalisation, ReLU, with the order of their names the other way round."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.z, self.a = nn.Conv2d(width, out_width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(self.z(x)))


def with_statistics(net: nn.Module, *, side: int = 16) -> nn.Module:
    """A network in eval mode whose normalisations have weights and statistics of their own."""
    draw = torch.Generator().manual_seed(3)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=draw)
        nn.init.normal_(norm.bias, generator=draw)
    net.train()
    with torch.no_grad():
        for _ in range(5):
            net(torch.randn(16, 3, side, side, generator=draw))
    return net.eval()


def chain(**options) -> ChainNet:
    torch.manual_seed(0)
    stages = [Block(3, 4), nn.Sequential(PreActivation(4), Block(4, 6)), Block(6, 8)]
    return with_statistics(ChainNet(stages, [PooledClassifier(width, CLASSES) for width in (4, 6, 8)], **options))


def images(n: int, side: int = 16) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def test_a_chain_runs_its_stages_one_after_the_other_and_rescales_gradients():
    net, x = chain(), images(4)
    features, expected = x, []
    for stage, classifier in zip(net.stages, net.classifier):
        features = stage(features)
        expected.append(classifier.linear(features.mean((2, 3))))
    for got, want in zip(net(x), expected, strict=True):
        torch.testing.assert_close(got, want)
    gradients = []
    for rescale in (False, True):
        net = chain(rescale_gradients=rescale)
        net(x)[0].sum().backward()
        gradients.append(net.stages[0].z.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0] / 3)   # of three exits, the first one's share
    for wrong in ([], [nn.Identity()] * 2):
        with pytest.raises(ValueError, match="one classifier for each stage"):
            ChainNet(wrong, [PooledClassifier(3, CLASSES)])


# The protocol.

class Pair(NamedTuple):
    first: Tensor
    rest: list[Tensor]


class Ones(Backbone):
    """A network that keeps the protocol, and in the subclasses below breaks it in one place each."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.ModuleList([PooledClassifier(3, CLASSES), PooledClassifier(3, CLASSES)])
        self.register_buffer("shift", torch.ones(3, 3, 1, 1))

    def start(self, x):
        return Pair(x, [])

    def advance(self, n, state):
        return state.first, Pair(state.first + 1, [state.first])


def breaks(message: str):
    """Marks a subclass with the message that `check_backbone` has for it."""
    def mark(network: type) -> type:
        network.message = message
        BROKEN.append(network)
        return network
    return mark


BROKEN: list[type] = []


@breaks("forward returned 1 of them; it has 2 exits")
class OneLogit(Ones):
    def forward(self, x):
        return super().forward(x)[:1]


@breaks("n_exits is 0")
class NoExits(Ones):
    n_exits = 0


@breaks("returned a state with NoneType in it")
class Nothing(Ones):
    def start(self, x):
        return Pair(x, [None])


@breaks("returned a state with dict in it")
class Dictionary(Ones):
    def advance(self, n, state):
        x = state["x"] if n else state.first
        return x, {"x": x}


@breaks(r"returned a state with a tensor of shape \[2, 3, 16, 16\] for 3 images")
class RowsLost(Ones):
    def start(self, x):
        return Pair(x, [x[:2]])


@breaks("shares memory")
class Expanded(Ones):
    def start(self, x):
        return Pair(x, [x[:1].expand_as(x)])


@breaks("shares memory")
class Repeated(Ones):
    def start(self, x):
        return Pair(x, [x.mean((1, 2, 3))[:, None].expand(-1, 2)])


@breaks("shares memory")
class Buffer(Ones):
    def start(self, x):
        return Pair(x, [self.shift])


@breaks("writes to the state")
class InPlace(Ones):
    def advance(self, n, state):
        return state.first.relu_(), state


@breaks("no row may depend on another")
class OverTheBatch(Ones):
    def advance(self, n, state):
        return state.first - state.first.mean(dim=0), Pair(state.first + 1, [])


@breaks("gives other logits than OtherForward.forward")
class OtherForward(Ones):
    def forward(self, x):
        return [logits + torch.arange(CLASSES) for logits in super().forward(x)]


@breaks("gives other logits than SmallLogits.forward")
class SmallLogits(Ones):
    def step(self, n, state):
        logits, state = super().step(n, state)
        return 1e-6 * logits, state

    def forward(self, x):
        return [2 * logits for logits in super().forward(x)]


@breaks(r"logits of shape \[3, 5, 1\]")
class WrongShape(Ones):
    def step(self, n, state):
        logits, state = super().step(n, state)
        return logits[..., None], state


@breaks(r"returned a tensor of shape \[3, 5\]; it returns \(logits, next state\)")
class LogitsOnly(Ones):
    def step(self, n, state):
        return super().step(n, state)[0]

    def forward(self, x):
        return [torch.zeros(len(x), CLASSES)] * 2


class Odd(Ones):
    """What the protocol allows: numbers as a state, rounding in a logit of 0, and dimensions of size 1 with any stride."""

    def start(self, x):
        one = x.mean((1, 2, 3))
        return Pair(x, [one, one.clone().as_strided((len(x), 1), (1, 0))])

    def step(self, n, state):
        logits, state = super().step(n, state)
        return logits * (torch.arange(CLASSES) > 0), state

    def forward(self, x):
        return [logits * (1 + 1e-6) for logits in super().forward(x)]


class Single(Ones):
    """One exit, and nothing after it; its logits are 0 as in a network whose classifier begins so."""

    n_exits = 1

    def step(self, n, state):
        return torch.zeros(len(state.first), CLASSES), None


def test_a_network_that_keeps_the_protocol_passes_and_is_left_as_it_is():
    for net in (chain(), chain().train(), Ones(), Odd(), Single()):
        net.classifier[0].train()
        draws = torch.get_rng_state()
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        modes = [module.training for module in net.modules()]
        check_backbone(net, num_classes=CLASSES, image_size=16)
        assert [module.training for module in net.modules()] == modes
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
        assert torch.equal(torch.get_rng_state(), draws)


def test_a_frozen_backbone_trains_its_exits_alone_from_the_start():
    net = chain().eval()
    assert net.train().training and net.stages.training
    net.freeze()
    assert net.training and net.classifier.training and not net.stages.training
    assert not net.train(False).classifier.training and not net.train().stages.training


@pytest.mark.parametrize("network", BROKEN)
def test_a_network_that_breaks_the_protocol_is_told_where(network):
    with pytest.raises(ValueError, match=network.message):
        check_backbone(network(), num_classes=CLASSES, image_size=16)


@pytest.mark.parametrize("thing, message", [(nn.Linear(1, 1), "no n_exits, start, step"), ([], "is a torch.nn.Module, got list")])
def test_what_is_no_backbone_at_all_is_told_what_one_has(thing, message):
    with pytest.raises(ValueError, match=message):
        check_backbone(thing, num_classes=CLASSES, image_size=16)


# Folding.

def test_normalisations_that_alone_read_a_convolution_are_folded_and_others_stay():
    net, x = chain(), images(6)
    folded = fold_batch_norm(net, x)
    assert norms(net) == 5 and norms(folded) == 1
    assert isinstance(folded.stages[1][0].bn1, nn.BatchNorm2d)   # in front of its convolution
    for got, want in zip(folded(x), net(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Twisted(nn.Module):
    """Normalisations that must not be folded, one of each kind, and one that may."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(6))
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(6))
        self.free = nn.BatchNorm2d(3, track_running_stats=False)
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        both = self.convs[0](x)
        x = self.bns[0](both) + both                                # something else reads the convolution too
        x = self.bns[1](self.convs[1](x) + x)                       # it reads a sum
        x = self.bns[2](self.bns[2](self.convs[2](x)))              # it runs twice
        x = self.bns[3](self.scaled(x))                             # a convolution that makes its own weights
        x = self.free(self.convs[3](x))                             # no statistics
        x = self.bns[4](self.convs[4](x))                           # this one is folded
        returned = self.convs[5](x)
        return [torch.add(x.mean((2, 3)), x.amax((2, 3)), alpha=1e4), returned, self.bns[5](returned)]


def test_normalisations_that_cannot_be_folded_stay_and_nothing_changes():
    torch.manual_seed(0)
    net, x = with_statistics(Twisted()), images(4)
    folded = fold_batch_norm(net, x)
    assert [type(norm).__name__ for norm in folded.bns] == ["BatchNorm2d"] * 4 + ["Identity", "BatchNorm2d"]
    assert isinstance(folded.free, nn.BatchNorm2d)
    assert _get_current_dispatch_mode() is None and not any(map(_has_hooks, net.modules()))
    for got, want in zip(folded(x), net(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hooked", ["forward hook", "hook before", "forward of its own"])
def test_a_convolution_in_whose_calls_more_happens_is_not_folded(hooked):
    net = Twisted()
    net = with_statistics(nn.Sequential(*(layer for i in (0, 1) for layer in (net.convs[i], net.bns[i]))))
    if hooked == "forward hook":
        net[0].register_forward_hook(lambda module, inputs, output: output + 1)
    elif hooked == "hook before":
        net[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    else:
        net[0].forward = lambda x, forward=net[0].forward: forward(x) + 1
    assert [type(layer).__name__ for layer in fold_batch_norm(net, images(4))] == ["Conv2d", "BatchNorm2d", "Conv2d", "Identity"]


class Sneaky(nn.Module):
    """Reads a convolution's weight behind the back of everything that looks at calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> list[Tensor]:
        first, *others = self.bn(self.conv(x)).mean((2, 3)).unbind(1)
        return [torch.stack([first, *(other * self.conv.weight.norm() for other in others)], dim=1)]


def test_a_network_that_answers_otherwise_when_folded_is_left_as_it_is(caplog):
    net = with_statistics(Sneaky())
    assert fold_batch_norm(net, images(2)) is net
    assert "Sneaky is not merged" in caplog.text


# Everything that runs a network.

@pytest.mark.parametrize("form", [None, "folded"])
def test_early_exit_leaves_where_the_simulation_says(form):
    net, x = chain(), images(40)
    model = BoostedNet(net, [0.5] * 3).eval()
    with pytest.raises(ValueError, match="ChainNet has no image_size; pass a few"):
        prepare_for_inference(model, form)
    with pytest.raises(UserError, match="no growing form"):
        prepare_for_inference(model, "growing", images=x)
    ready = prepare_for_inference(model, form, images=x)
    with torch.inference_mode():
        confidence = torch.stack(ready(x)).softmax(dim=2).amax(dim=2).numpy()
    torch.testing.assert_close(torch.stack(ready(x)), torch.stack(model(x)), rtol=1e-4, atol=1e-4)
    thresholds = np.sort(confidence, axis=1)[:, 19:21].mean(axis=1)   # between two confidences
    for sizes in (None, 4):
        found = EarlyExit(ready, thresholds, sizes_per_doubling=sizes)(x)
        assert found.exit.tolist() == exit_index(confidence, thresholds).tolist() and len(set(found.exit.tolist())) == 3


def test_every_exit_is_a_program_with_the_weights_of_its_own_step():
    net, x = chain(), images(7)
    steps = list(export_steps(BoostedNet(net, [0.5] * 3).eval(), 16))
    with torch.no_grad():
        expected, state = BoostedNet(net, [0.5] * 3).eval()(x), (x,)
        for step, want in zip(steps, expected, strict=True):
            state = step.program.module()(*state)
            torch.testing.assert_close(state[0], want, rtol=1e-4, atol=1e-4)
    weights = [sum(tensor.numel() for tensor in step.program.state_dict.values()) for step in steps]
    assert max(weights) < sum(parameter.numel() for parameter in net.parameters())


class Prepared(Ones):
    """Uses weights of its own before exit 0, and in one form looks at values."""

    def __init__(self, *, looks: bool = False) -> None:
        super().__init__()
        self.first, self.looks = nn.Conv2d(3, 3, 1), looks

    def start(self, x):
        return super().start(self.first(x))

    def advance(self, n, state):
        features, state = super().advance(n, state)
        return (features if not self.looks or features.mean() > 0 else -features), state


def test_the_first_program_has_the_weights_that_the_start_reads_and_code_that_cannot_be_followed_is_one_line():
    model, x = BoostedNet(Prepared(), [0.5, 0.5]).eval(), images(2)
    first = next(export_steps(model, 16))
    with torch.no_grad():
        torch.testing.assert_close(first.program.module()(x)[0], model(x)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="torch.export cannot follow the code of exit 1") as error:
        next(export_steps(BoostedNet(Prepared(looks=True), [0.5, 0.5]).eval(), 16))
    assert "\n" not in str(error.value)


class Attention(nn.Module):
    """A stage whose output projection is read without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).unflatten(2, x.shape[2:])


def test_weights_that_a_function_reads_are_part_of_a_program():
    torch.manual_seed(0)
    net = with_statistics(ChainNet([Block(3, 4), Attention()], [PooledClassifier(4, CLASSES) for _ in range(2)]))
    first, second = export_steps(BoostedNet(net, [0.5, 0.5]).eval(), 16)
    x = images(2)
    with torch.no_grad():
        torch.testing.assert_close(second.program.module()(*first.program.module()(x))[0],
                                   BoostedNet(net, [0.5, 0.5]).eval()(x)[1], rtol=1e-4, atol=1e-4)
    check_backbone(net, num_classes=CLASSES, image_size=16)


def test_costs_are_those_of_the_stages_and_classifiers_so_far():
    net = chain()
    macs, params = measure_model(net, 16, 16)
    first = 3 * 4 * 9 * 64 + 4 * 64 + 4 * 64 + 5 * CLASSES   # convolution, ReLU, mean, linear layer
    assert macs[0] == first and params[0] == 3 * 4 * 9 + 8 + 5 * CLASSES
    assert params[-1] == sum(parameter.numel() for parameter in net.parameters())


def test_weight_decay_rises_from_exit_to_exit():
    net = chain()
    groups = build_optimizer(net, name="sgd", lr=0.1, momentum=0.9, weight_decay=[1e-4, 3e-4]).param_groups
    assert [group["weight_decay"] for group in groups] == pytest.approx([1e-4, 2e-4, 3e-4])
    for stage, classifier, group in zip(net.stages, net.classifier, groups, strict=True):
        assert {*group["params"]} == {*stage.parameters(), *classifier.parameters()}


def test_collaborating_exits_take_classifiers_that_pool():
    net, x = chain(), images(3)
    logits = CollaborativeNet(net).eval()(x)
    assert [part.shape for part in logits] == [(3, CLASSES)] * 3
    with pytest.raises(ValueError, match="Sequential has not the parts `pool` and `linear`"):
        CollaborativeNet(ChainNet([Block(3, 4)], [nn.Sequential(nn.Flatten(), nn.Linear(256, CLASSES))]))
    with pytest.raises(ValueError, match="derived from models.Backbone, got Linear"):
        CollaborativeNet(nn.Linear(1, 1))


def test_a_frozen_network_trains_its_exits_only_and_keeps_its_statistics():
    net, x = chain(), images(8)
    net.freeze()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = build_optimizer(net, name="sgd", lr=0.1, momentum=0.9, weight_decay=[1e-4, 1e-3])
    BoostedNet(net, [0.5] * 3).train()
    sum(logits.sum() for logits in net(x)).backward()
    optimizer.step()
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("classifier.")}


# ResNet.

def of_torchvision(arch: str, num_classes: int = 1000) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return getattr(torchvision.models, arch)(num_classes=num_classes).eval()


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
def test_a_file_of_torchvision_loads_and_its_logits_are_those_of_the_last_exit(arch):
    original, net = of_torchvision(arch), ResNet(arch, rescale_gradients=True).eval()
    first = net.classifier[0].linear.weight.clone()
    added = checkpoint.load_weights(net, original.state_dict(), "file", is_start=True)
    assert added == [f"classifier.{n}.linear.{part}" for n in range(3) for part in ("weight", "bias")]
    assert {*net.state_dict()} == {*original.state_dict(), *added} and torch.equal(net.classifier[0].linear.weight, first)
    x = images(1, 224)
    with torch.no_grad():
        logits, wanted = net(x), original(x)
        assert (logits[-1] - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        for n, stage in enumerate((original.layer1, original.layer2, original.layer3)):
            x = stage(x if n else original.maxpool(original.relu(original.bn1(original.conv1(x)))))
            torch.testing.assert_close(logits[n], net.classifier[n].linear(x.mean((2, 3))), rtol=1e-5, atol=1e-6)


def test_in_evaluation_a_file_without_the_exits_is_refused_and_a_start_with_another_first_layer_names_the_flag():
    weights = of_torchvision("resnet18", 7).state_dict()
    small, large, same = (ResNet(num_classes=n, image_size=side) for n, side in ((7, 32), (9, 224), (7, 224)))
    for net, is_start, message in ((same, False, "it has no classifier.0.linear.weight"),
                                   (small, False, r"expected \[64, 3, 3, 3\]$"),
                                   (small, True, r"expected \[64, 3, 3, 3\]; --new_classifier starts it anew"),
                                   (large, True, r"fc.weight has shape \[7, 512\], expected \[9, 512\]; --new_classifier")):
        with pytest.raises(UserError, match=message):
            checkpoint.load_weights(net, weights, "file", is_start=is_start)
    assert not {name.split(".")[0] for name in checkpoint.load_weights(small, weights, "file", new_classifier=True)} \
        - {"classifier", "conv1", "bn1"}
    assert torch.equal(small.fc.weight, weights["fc.weight"])   # the classes agree
    assert {name.split(".")[0] for name in checkpoint.load_weights(large, weights, "file", new_classifier=True)} \
        == {"classifier", "fc"}


def test_small_images_have_the_small_first_layer():
    net = ResNet(num_classes=CLASSES, image_size=32).eval()
    assert net.conv1.kernel_size == (3, 3) and net.conv1.stride == (1, 1) and isinstance(net.maxpool, nn.Identity)
    with torch.no_grad():
        assert net.advance(0, images(1, 32))[0].shape == (1, 64, 32, 32)
    for image_size, stem in ((32, "large"), (97, None)):
        net = ResNet(num_classes=CLASSES, image_size=image_size, stem=stem)
        assert net.conv1.kernel_size == (7, 7) and isinstance(net.maxpool, nn.MaxPool2d)
    check_backbone(ResNet(num_classes=CLASSES, image_size=32), num_classes=CLASSES, image_size=32)
    with pytest.raises(ValueError, match="arch is 'resnet50'; choose one of resnet18, resnet34"):
        ResNet("resnet50")


def test_resnets_costs_are_half_of_torchs_count_and_what_that_leaves_out():
    net = ResNet(num_classes=CLASSES, image_size=224).eval()
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        net.to("meta")(torch.empty(1, 3, 224, 224))
    relus = 64 * 112**2 + 4 * 64 * 56**2 + 4 * 128 * 28**2 + 4 * 256 * 14**2 + 4 * 512 * 7**2
    pools = 9 * 64 * 56**2 + 64 * 56**2 + 128 * 28**2 + 256 * 14**2 + 512 * 7**2
    assert measure_model(net, 224, 224)[0][-1] == counter.get_total_flops() // 2 + relus + pools + 4 * CLASSES
    assert measure_model(net, 224, 224)[1][-1] == sum(parameter.numel() for parameter in net.parameters())


def test_all_of_resnets_norms_are_folded():
    net = with_statistics(ResNet(num_classes=CLASSES, image_size=32), side=32)
    model = BoostedNet(net, [0.5] * 4).eval()
    ready = prepare_for_inference(model)
    assert norms(net) == 20 and norms(ready) == 0
    with torch.no_grad():
        for got, want in zip(ready(images(3, 32)), model(images(3, 32)), strict=True):
            assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_resnets_programs_share_no_weights():
    net = ResNet(num_classes=CLASSES, image_size=32).eval()
    steps, state = list(export_steps(BoostedNet(net, [0.5] * 4).eval(), 32)), (images(2, 32),)
    with torch.no_grad():
        for step, want in zip(steps, BoostedNet(net, [0.5] * 4)(state[0]), strict=True):
            state = step.program.module()(*state)
            torch.testing.assert_close(state[0], want, rtol=1e-4, atol=1e-5)
    weights = sum(tensor.numel() for step in steps for tensor in step.program.state_dict.values())
    assert weights < 1.01 * sum(parameter.numel() for parameter in net.parameters())


def test_the_name_of_a_resnet_says_all_about_it(capsys):
    line = "--dataset cifar100 --result_dir run --arch resnet34".split()
    assert choose_network(parse_args(line)) is None
    assert "makes 4 here" in one_line_error(capsys, lambda: choose_network(parse_args([*line, "--ensemble_reweight", "1,2,3"])))


def resnet_command(data: Path, folder: Path, *more: str) -> list[str]:
    """A run of one epoch; nothing is said of the network but its name."""
    flags = command(data, folder, "--epochs", "1", *more)
    start, end = flags.index("--arch"), flags.index("--batch-size")
    return [*flags[:start], *flags[end:], "--arch", "resnet18_ge"]


@pytest.mark.parametrize("image_size", [32, pytest.param(224, marks=pytest.mark.slow)])
def test_a_resnet_begins_with_torchvisions_file_is_trained_resumed_and_evaluated(tmp_path, capsys, image_size):
    data = make_images(tmp_path / "data", classes=2, train=5, test=3, side=image_size)
    torch.save(of_torchvision("resnet18").state_dict(), tmp_path / "resnet18.pth")
    size = ["--valid_size", "4", "--image_size", str(image_size), "--workers", "0"]
    line = resnet_command(data, tmp_path / "run", *size, "--checkpoint", str(tmp_path / "resnet18.pth"))
    mistake = one_line_error(capsys, lambda: train_cifar100.main(line))
    assert "--new_classifier starts it anew" in mistake and ("conv1.weight" if image_size == 32 else "fc.weight") in mistake
    assert train_cifar100.main([*line, "--new_classifier"]) == 0
    printed = capsys.readouterr().out
    anew = "14 tensors of the classifiers and of the first layer" if image_size == 32 else "8 tensors of the classifiers"
    assert f"--new_classifier: {anew} start anew" in printed and "taking the paper's" not in printed
    assert train_cifar100.main([*resnet_command(data, tmp_path / "run", *size), "--epochs", "2", "--lr_milestones", "1",
                                "--resume"]) == 0
    best = tmp_path / "run" / "model_best.pth"
    assert eval_cifar100.main(["--data-root", str(data), "--evaluate-from", str(best), "--evalmode", "realtime", "--device",
                               "cpu", "--threads", "1"]) == 0
    result = json.loads((tmp_path / "run" / "realtime.json").read_text())
    assert result["arch"] == "resnet18_ge" and len(result["macs"]) == 4
    assert [point["n_differ"] - point["n_differ_by_rounding"] for point in result["points"]] == [0] * 5
