"""The grouped form computes what the plain network does, on the plain network's own modules."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from models import MSDNet, RANet
from models.grouped import grouped_form, resize
from models.layers import Bottleneck

MSD = dict(n_blocks=3, n_channels=4, base=1, step=1, num_classes=7)
RAN = dict(n_blocks=2, n_channels=4, step=2, scale_list=[1, 2, 3], gr_factor=[4, 2, 1], bn_factor=[4, 2, 1], num_classes=7)
BOTH = pytest.mark.parametrize("build, config", [(MSDNet, MSD), (RANet, RAN)])


def images(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(1))


def silent(net: nn.Module, form: nn.Module, x: torch.Tensor) -> set[nn.Module]:
    """Modules of `net` without children whose hooks do not fire in a call of `form`."""
    leaves, fired = [module for module in net.modules() if not any(module.children())], set()
    hooks = [module.register_forward_hook(lambda module, *_: fired.add(module)) for module in leaves]
    form(x)
    for hook in hooks:
        hook.remove()
    return set(leaves) - fired


def joined_parts(net: nn.Module) -> set[nn.Module]:
    """Every 1x1 convolution of a bottleneck, with its normalisation and its ReLU."""
    return {part for module in net.modules() if isinstance(module, Bottleneck) for part in list(module.net)[:3]}


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_every_hook_of_the_plain_network_fires_and_in_the_grouped_form_all_but_those_of_joined_convolutions(
        build, config, training):
    net = build(**config).train(training)
    x = images(torch.float32)
    assert not silent(net, net, x)
    quiet = silent(net, grouped_form(net), x)
    assert quiet <= joined_parts(net) and bool(quiet) is training
    if training and build is RANet:
        assert quiet == joined_parts(net)


@pytest.mark.parametrize("build, config, all_read", [
    (MSDNet, MSD | {"n_blocks": 4}, False),   # two scales come out of the last of four layers, and nothing reads the finer one
    (MSDNet, MSD | {"n_blocks": 2}, False),
    (MSDNet, MSD | {"n_blocks": 3, "base": 3, "step": 2}, True),
    (MSDNet, MSD | {"bottleneck": False}, True),
    (RANet, RAN, True),
    (RANet, RAN | {"scale_list": [1, 2, 3, 3], "gr_factor": [4, 2, 1, 1], "bn_factor": [4, 2, 1, 1]}, True)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_and_statistics_are_those_of_the_plain_network(build, config, all_read, layout):
    torch.manual_seed(0)
    plain = build(**config, rescale_gradients=True).double().to(memory_format=layout)
    joined = copy.deepcopy(plain)
    for call in (plain, grouped_form(joined)):
        logits = call(images().contiguous(memory_format=layout))
        sum(F.cross_entropy(part, torch.arange(6)) for part in logits).backward()
    for (name, want), got in zip(plain.state_dict().items(), joined.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14, msg=name)
    unread = 0
    for (name, want), got in zip(plain.named_parameters(), joined.parameters(), strict=True):
        assert (got.grad is None) is (want.grad is None), name   # an optimiser would shrink what has a gradient of zero
        unread += want.grad is None
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-12, msg=name)
    assert (unread == 0) is all_read


class Synchronised(nn.BatchNorm2d):
    """Stands in for nn.SyncBatchNorm, which needs GPUs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


def bottleneck_norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module.net[1] for module in net.modules() if isinstance(module, Bottleneck)]


@BOTH
def test_normalisations_replaced_after_the_form_was_made_run_as_themselves(build, config):
    net = build(**config)
    form = grouped_form(net)
    for bottleneck in (module for module in net.modules() if isinstance(module, Bottleneck)):
        bottleneck.net[1] = Synchronised(bottleneck.net[1].num_features)   # as convert_sync_batchnorm does
    form(images(torch.float32))
    assert [norm.calls for norm in bottleneck_norms(net)] == [1] * len(bottleneck_norms(net))


@BOTH
def test_normalisations_that_evaluate_keep_their_statistics_and_the_others_move(build, config):
    net = build(**config)
    norms = bottleneck_norms(net)
    for norm in norms[1::2]:
        norm.eval()
    before = [norm.running_mean.clone() for norm in norms]
    grouped_form(net)(images(torch.float32))
    assert [torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before)] == [not norm.training for norm in norms]


@BOTH
def test_a_functional_call_uses_the_tensors_it_is_given(build, config):
    torch.manual_seed(0)
    net = build(**config).double()
    form, other = grouped_form(net), build(**config).double()
    before = copy.deepcopy(net.state_dict())
    given = {name: tensor.clone() for name, tensor in grouped_form(other).state_dict().items()}
    got = functional_call(form, given, images())
    for logits, want in zip(got, other(images()), strict=True):
        torch.testing.assert_close(logits, want)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    torch.testing.assert_close(given, grouped_form(other).state_dict())   # statistics moved as those of a plain call


def test_a_backbone_without_a_grouped_form_is_returned_as_it_is():
    other = nn.Identity()
    assert grouped_form(other) is other


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_interpolation_gets_a_dense_gradient_in_the_layout_of_its_map(layout):
    arriving = []
    maps = torch.randn(2, 6, 8, 8).contiguous(memory_format=layout).requires_grad_()
    resized = resize(maps, torch.Size((16, 16)))
    resized.grad_fn.next_functions[0][0].register_prehook(lambda grads: arriving.extend(grads))
    torch.cat([resized, torch.randn(2, 3, 16, 16).contiguous(memory_format=layout)], dim=1).square().sum().backward()
    assert [grad.is_contiguous(memory_format=layout) for grad in arriving] == [True]
    torch.testing.assert_close(arriving[0], 2 * resized)
