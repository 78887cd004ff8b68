"""What the networks promise beyond the reference vectors: stepping, gradient rescaling, initialisation, refusals."""
import math

import pytest
import torch
import torch.nn.functional as F

import models.grouped
import models.msdnet
import models.ranet
from args import parse_args
from models import BoostedNet, MSDNet, RANet, expand_temperatures, map_state
from models.grouped import grouped_form
from op_counter import measure_model
from utils.options.network import NetworkSpec
from utils.runs.restore import build_model
from utils.training.fast_forward import training_forward

MSD = dict(n_blocks=3, n_channels=4, base=1, step=1, num_classes=7)
RAN = dict(n_blocks=2, n_channels=4, step=2, scale_list=[1, 2, 3], gr_factor=[4, 2, 1], bn_factor=[4, 2, 1], num_classes=7)


@pytest.fixture(params=["msdnet", "ranet"])
def backbone(request):
    torch.manual_seed(0)
    return (MSDNet(**MSD) if request.param == "msdnet" else RANet(**RAN)).eval()


def _tensors(state):
    found = []
    map_state(found.append, state)
    return found


def test_stepping_gives_the_logits_of_the_full_forward_pass(backbone):
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        state, logits = backbone.start(x), []
        for n in range(backbone.n_exits):
            before = [t.clone() for t in _tensors(state)]
            exit_logits, following = backbone.step(n, state)
            assert all(torch.equal(a, b) for a, b in zip(before, _tensors(state), strict=True)), "a step changed its state"
            logits.append(exit_logits)
            state = following
        for got, want in zip(logits, backbone(x), strict=True):
            assert torch.equal(got, want)


def test_selected_rows_go_on_as_if_they_were_alone(backbone):
    x, rows = torch.randn(5, 3, 32, 32), torch.tensor([4, 1])
    with torch.no_grad():
        wanted = [logits[rows] for logits in backbone(x)]
        state = backbone.start(x)
        for n in range(backbone.n_exits):
            logits, state = backbone.step(n, state)
            if n == 0:
                logits, state = logits[rows], map_state(lambda t: t[rows], state)
                assert all(len(t) == 2 for t in _tensors(state))
                assert isinstance(backbone, MSDNet) or isinstance(state, models.ranet.State)
            torch.testing.assert_close(logits, wanted[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "grouped"])
@pytest.mark.parametrize("build, module, config", [(MSDNet, models.msdnet, MSD), (RANet, models.ranet, RAN)])
def test_rescaled_gradient_of_every_classifier_map_follows_the_formula(monkeypatch, build, module, config, form):
    seen = []
    module = module if form == "plain" else models.grouped
    original = module.rescale_at_exit

    def watch(x, n, n_exits):
        parts = original(x, n, n_exits)
        for t in (x, *parts):
            t.retain_grad()
        seen.append((x, *parts))
        return parts

    monkeypatch.setattr(module, "rescale_at_exit", watch)
    torch.manual_seed(0)
    net = build(**config, rescale_gradients=True).double().train()
    y, call = torch.arange(4) % 7, net if form == "plain" else grouped_form(net)
    sum(F.cross_entropy(logits, y) for logits in call(torch.randn(4, 3, 32, 32).double())).backward()
    assert len(seen) == net.n_exits
    for i, (x, for_classifier, onward) in enumerate(seen):
        remaining = net.n_exits - i
        g_next = onward.grad if onward.grad is not None else torch.zeros_like(x)
        assert i == net.n_exits - 1 or g_next.abs().sum() > 0
        # Any path that went around `onward` (RANet's feature lists) would show up here.
        torch.testing.assert_close(x.grad, (for_classifier.grad + (remaining - 1) * g_next) / remaining)


def test_gradient_rescaling_leaves_the_forward_pass_alone(backbone):
    config = MSD if isinstance(backbone, MSDNet) else RAN
    other = type(backbone)(**config, rescale_gradients=True).eval()
    other.load_state_dict(backbone.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), other(x), strict=True))


def test_boosted_head_is_the_frozen_sum_and_the_joint_baseline_is_temperature_zero(backbone):
    logits = [torch.randn(2, 7, requires_grad=True) for _ in range(backbone.n_exits)]
    temperatures = [9.0] + [0.5 + 0.1 * n for n in range(1, backbone.n_exits)]
    model = BoostedNet(backbone, temperatures)
    expected = logits[0]
    predictions = model.boost(logits)
    for n in range(1, backbone.n_exits):
        expected = temperatures[n] * expected + logits[n]
        torch.testing.assert_close(predictions[n], expected)
    predictions[2].sum().backward()
    assert logits[2].grad is not None and logits[0].grad is None and logits[1].grad is None
    trainable = model.boost(logits, trainable=True)
    trainable[2].sum().backward()
    torch.testing.assert_close(logits[1].grad, torch.full((2, 7), temperatures[2]))
    joint = BoostedNet(backbone, [0.0] * backbone.n_exits)
    assert all(torch.equal(a, b) for a, b in zip(joint.boost(logits), logits, strict=True))
    assert [n for n in model.state_dict() if not n.startswith("backbone.")] == []


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_the_flag_of_the_ablation_lets_the_last_exit_train_the_ones_before_through_the_sum(trainable, fast):
    flags = "--dataset cifar100 --result_dir run --nBlocks 3 --nChannels 4 --base 1 --ensemble_reweight 0.3,0.5,0.7".split()
    model = build_model(NetworkSpec.from_args(parse_args([*flags, *["--trainable_ensemble"] * trainable]))).double().eval()
    network = training_forward(model, batch_size=4, channels_last=True) if fast else model
    x, y = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.arange(2)
    before, predictions = model.backbone(x), network(x)
    predictions[-1].gather(1, y[:, None]).sum().backward()
    got = [classifier.linear.bias.grad for classifier in model.backbone.classifier]
    assert all(torch.allclose(a, b) for a, b in zip(predictions, model.boost(before)))
    picked = torch.bincount(y, minlength=100).double()
    torch.testing.assert_close(got[2], picked)
    for bias, factor in zip(got, [0.5 * 0.7, 0.7]):   # t_2 t_3 and t_3
        if trainable:
            torch.testing.assert_close(bias, factor * picked)
        else:
            assert bias is None


def test_temperatures_expand_from_one_two_or_all_values():
    assert expand_temperatures([0.5], 3) == [0.5, 0.5, 0.5]
    assert expand_temperatures([0.3, 0.7], 3) == pytest.approx([0.3, 0.5, 0.7])
    assert expand_temperatures([0.1, 0.2, 0.3], 3) == [0.1, 0.2, 0.3]
    assert expand_temperatures([0.3, 0.7], 1) == [0.3]
    with pytest.raises(ValueError, match="3 values for 4 exits"):
        expand_temperatures([1, 2, 3], 4)


def test_temperatures_that_make_no_sense_are_refused_and_the_sum_is_frozen_unless_asked_otherwise():
    for wrong, message in (([0.5], "1 temperatures for 2 exits"), ([0.5, math.nan], "finite"), ([math.inf, 0.5], "finite")):
        with pytest.raises(ValueError, match=message):
            BoostedNet(Counted(), wrong)
    model, raw, previous = BoostedNet(Counted(), [0, 0.5]), torch.ones(1, 4), torch.ones(1, 4, requires_grad=True)
    assert model.trainable_ensemble is False and not model.add(1, raw, previous).requires_grad
    assert model.add(1, raw, previous, trainable=True).requires_grad


def test_msdnet_keeps_the_default_initialisation():
    torch.manual_seed(0)
    for conv in (m for m in MSDNet(n_blocks=4, n_channels=16).modules() if isinstance(m, torch.nn.Conv2d)):
        bound = 1 / math.sqrt(conv.in_channels * conv.kernel_size[0] ** 2)   # uniform in (-bound, bound)
        assert conv.weight.abs().max() <= bound
        if conv.weight.numel() > 2000:
            assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_ranet_draws_its_convolutions_from_a_normal_of_the_output_fan_and_leaves_its_first_layer():
    torch.manual_seed(0)
    net = RANet(n_blocks=2, n_channels=16, step=4, scale_list=[1, 2, 3], gr_factor=[4, 2, 1], bn_factor=[4, 2, 1])
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.bias.abs().max() == 0
        if not isinstance(module, torch.nn.Conv2d) or module.weight.numel() < 2000:
            continue
        k2 = module.kernel_size[0] ** 2
        if name.startswith("FirstLayer"):
            assert module.weight.abs().max() <= 1 / math.sqrt(module.in_channels * k2)
        else:
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / (k2 * module.out_channels)), rel=0.1)
            assert module.weight.abs().max() > 2.5 * module.weight.std()   # normal, not uniform


@pytest.mark.parametrize("build, change, message", [
    (MSDNet, dict(growth_rate=3, gr_factor=[1, 1, 2]), "odd width 3"),
    (MSDNet, dict(bn_factor=[1, 2]), "bn_factor 2"),
    (MSDNet, dict(gr_factor=[1, 2], bn_factor=[1, 2]), "16x16 map"),
    (MSDNet, dict(image_size=31), "at least 32"),
    (RANet, dict(image_size=64.0), "at least 32"),
    (MSDNet, dict(stem="medium"), "small, large"),
    (RANet, dict(scale_list=[1, 2, 2]), "read 8x8"),
    (RANet, dict(scale_list=[1, 2], gr_factor=[2, 1], bn_factor=[2, 1]), "read 8x8"),
    (RANet, dict(gr_factor=[1, 2]), "scale_list has 3"),
    (RANet, dict(growth_rate=1), "compress_factor"),
])
def test_impossible_networks_are_refused_with_the_reason(build, change, message):
    with pytest.raises(ValueError, match=message):
        build(**{**(MSD if build is MSDNet else RAN), **change})


@pytest.mark.parametrize("options", [dict(step_mode="lin_grow", prune="min"), dict(bottleneck=False), dict(prune="min", base=4)])
def test_other_flags_build_networks_that_train(options):
    net = MSDNet(**{**MSD, **options}).train()
    sum(logits.sum() for logits in net(torch.randn(2, 3, 32, 32))).backward()
    assert net.blocks[0][0].layers[0].net[0].weight.grad.abs().sum() > 0


def test_counting_leaves_the_model_as_it_is(backbone):
    model = BoostedNet(backbone, [0.5] * backbone.n_exits).train()
    model.backbone.classifier[0].eval()
    modes = [m.training for m in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    macs, params = measure_model(model, 32, 32)
    assert measure_model(model.backbone, 32, 32) == (macs, params)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


class Counted(torch.nn.Module):
    """Two exits of every kind of layer that is counted, with kernels and images that are not square."""

    n_exits = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 6, (3, 5), padding=(1, 2), groups=3), torch.nn.BatchNorm2d(6),
                                          torch.nn.ReLU(), torch.nn.AvgPool2d((2, 3)))
        self.pool = torch.nn.MaxPool2d(3)
        self.classifier = torch.nn.ModuleList([torch.nn.Linear(216, 4), torch.nn.Linear(24, 4)])

    def start(self, x):
        return x

    def step(self, n, state):
        state = self.pool(state) if n else self.layers(state)
        return self.classifier[n](state.flatten(1)), state


def test_macs_and_parameters_counted_by_hand():
    first = 6 * 12 * 18 * 3 * 5 + 6 * 12 * 18 + 6 * 6 * 6 * 2 * 3 + 217 * 4   # convolution, ReLU, pooling, classifier
    second = 6 * 2 * 2 * 3 * 3 + 25 * 4
    weights = 6 * 3 * 5 + 6 + 2 * 6 + 217 * 4
    assert measure_model(Counted(), 12, 18) == ([first, first + second], [weights, weights + 25 * 4])
    assert measure_model(BoostedNet(Counted().double(), [0.5, 0.5]), 12, 18)[0] == [first, first + second]


class Unusual(torch.nn.Module):
    """Two exits whose operations come from functions, of a layer used twice and of one that no exit reads; attention."""

    n_exits = 2

    def __init__(self, *, on_host: bool) -> None:
        super().__init__()
        self.shared, self.unread = torch.nn.Conv2d(3, 3, 3, padding=1, bias=False), torch.nn.Linear(9, 9)
        self.attention, self.linear = torch.nn.MultiheadAttention(3, 1, batch_first=True), torch.nn.Linear(3, 4)
        self.on_host = on_host

    def start(self, x):
        return x

    def step(self, n, x):
        if n:
            tokens = x.flatten(2).transpose(1, 2)
            x = self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).unflatten(2, x.shape[2:])
        else:
            x = F.conv2d(self.shared(x).relu(), self.shared.weight, padding=1)
        if self.on_host and not x.isfinite().all():   # a value is looked at, which takes storage
            raise ValueError
        return self.linear(x.mean((2, 3)) if n else F.adaptive_avg_pool2d(x, 1).flatten(1)), x


@pytest.mark.parametrize("on_host", [False, True])
def test_functions_count_as_modules_do_and_a_parameter_once(on_host):
    area, head = 8 * 8, 3 * 8 * 8 + 4 * 4   # of the map; pooling and linear layer
    first = 2 * 3 * 3 * 9 * area + 3 * area + head
    attention = area * 3 * 9 + 2 * 3 * area ** 2 + area * 3 * 3 + area * 3   # three projections, two products, projection, bias
    net = Unusual(on_host=on_host)
    weights = 3 * 3 * 9 + 4 * 4
    assert measure_model(net, 8, 8) == ([first, first + attention + head], [weights, weights + 3 * 9 + 9 + 3 * 3 + 3])


class Particular(torch.nn.Module):
    """Attention that PyTorch has one operation for, pooling with an uneven kernel, and values that are looked at."""

    n_exits = 1

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)

    def start(self, x):
        return x

    def step(self, n, x):
        x = F.max_pool2d(x, (2, 3), stride=1)
        x = F.avg_pool2d(x, [2], stride=1)
        if not x.isfinite().all() or torch.add(torch.ones(()), torch.ones(()), alpha=3) != 4:   # so it is counted on the CPU
            raise ValueError
        tokens = x.flatten(1)[:, :20].unflatten(1, (5, 4))
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1), None


def test_functions_with_parameters_of_their_own_are_counted_and_settings_left_as_they_are():
    pooled, averaged = 3 * 7 * 6, 3 * 6 * 5
    attention = 5 * 4 * 4 * 4 + 5 * 4 * 4 + 2 * 4 * 5 * 5   # three projections and the last, their biases, two products
    assert torch.backends.mha.get_fastpath_enabled()
    assert measure_model(Particular(), 8, 8)[0] == [pooled * 6 + averaged * 4 + attention + 20]
    assert torch.backends.mha.get_fastpath_enabled()


def test_macs_of_convolutions_and_linear_layers_agree_with_torchs_counter(backbone):
    from torch.utils.flop_counter import FlopCounterMode

    free = {torch.nn.ReLU, torch.nn.AvgPool2d, torch.nn.MaxPool2d}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.randn(1, 3, 32, 32))
    extra = 0

    def count(module, inputs, output):
        nonlocal extra
        extra += output.numel() * (4 if isinstance(module, torch.nn.AvgPool2d) else 1)

    hooks = [m.register_forward_hook(count) for m in backbone.modules() if type(m) in free]
    with torch.no_grad():
        backbone(torch.randn(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    biases = sum(m.out_features for m in backbone.modules() if isinstance(m, torch.nn.Linear))
    assert measure_model(backbone, 32, 32)[0][-1] == counter.get_total_flops() // 2 + extra + biases
