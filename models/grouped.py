"""Forms of MSDNet and RANet for training only: 1x1 convolutions that read the same map run as a single wide one.

Such a convolution costs mostly the reading of its input and the writing of its input's gradient. Logits and gradients are those
of the plain network to rounding. The forms have no weights of their own: they keep the plain network as a submodule and look
every weight and every normalisation up in it at each call, so that these may be replaced at any time (conversion to
SyncBatchNorm, `torch.func.functional_call`).

A convolution that runs with others is not called as a module, nor are the normalisation and the ReLU behind it: their hooks do
not fire. Those of the plain network always do.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Bottleneck, concatenate, rescale_at_exit, resize_like
from models.msdnet import MSDLayer, MSDNet
from models.ranet import Block, RANet


def grouped_form(backbone: nn.Module) -> nn.Module:
    """The grouped form of an MSDNet or RANet; any other backbone is returned as it is."""
    return GroupedForm(backbone) if isinstance(backbone, (MSDNet, RANet)) else backbone


class GroupedForm(nn.Module):
    """What to call in training in place of `backbone`, whose weights and buffers it uses."""

    def __init__(self, backbone: MSDNet | RANet) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def n_exits(self) -> int:
        return self.backbone.n_exits

    def forward(self, x: Tensor) -> list[Tensor]:
        """Raw logits (B, num_classes) of every exit, shallow to deep, for images x (B, 3, H, W)."""
        return run_msdnet(self.backbone, x) if isinstance(self.backbone, MSDNet) else run_ranet(self.backbone, x)


def run_msdnet(net: MSDNet, x: Tensor) -> list[Tensor]:
    """Logits of all exits. The convolutions of a scale and of the next coarser one read the same map."""
    scales, logits = x, []
    n_read = sum(isinstance(module, MSDLayer) for block in net.blocks for module in block)
    for n, block in enumerate(net.blocks):
        for module in block:
            if isinstance(module, MSDLayer):
                scales = run_layer(module, scales, n_read)
                n_read -= 1   # what a layer computes reaches the next coarser scale one layer later
            else:
                scales = module(scales)
        coarsest = scales[-1]
        if net.rescale_gradients:
            coarsest, scales[-1] = rescale_at_exit(coarsest, n, net.n_exits)
        logits.append(net.classifier[n](coarsest))
    return logits


def run_layer(layer: MSDLayer, scales: list[Tensor], n_read: int) -> list[Tensor]:
    """What `layer` returns, of which the coarsest `n_read` scales lead to a classifier.

    The convolutions of the other scales get no gradient. They run by themselves, because together with others each would get
    one of zero, and optimisers shrink such weights.
    """
    outputs = dict(enumerate(layer.layers, start=layer.dropped))
    grown = [[x] for x in scales]
    for s, x in enumerate(scales):   # finest first, so that a map gets the channels from the finer scale first
        readers = {t: outputs[t].conv_normal if t == s else outputs[t].conv_down for t in (s, s + 1) if t in outputs}
        together = min(readers) >= len(scales) - n_read
        for t, y in zip(readers, run_bottlenecks(list(readers.values()), x, together), strict=True):
            grown[t].append(y)
    return [concatenate(*parts) for parts in grown[layer.dropped:]]


def run_ranet(net: RANet, x: Tensor) -> list[Tensor]:
    """Logits of all exits. Each `conv_up` runs ahead of its turn, with the coarser convolution that reads the same map."""
    pyramid, logits = net.FirstLayer(x)[::-1], []
    coarser: list[tuple[Tensor, list[Tensor]]] = []   # per block: its last feature, `conv_up` of the finer block of the others
    for blocks, finer_blocks, x in zip(net.scale_flows, [*net.scale_flows[1:], None], pyramid, strict=True):
        these: list[tuple[Tensor, list[Tensor]]] = []
        for i, block in enumerate(blocks):
            finer = finer_blocks[i] if finer_blocks else None
            x, last, ups = run_block(block, x, *(coarser[i] if block.fuses else ()), finer=finer)
            if not block.fuses:   # an exit follows
                features = x
                if net.rescale_gradients:
                    features, x = rescale_at_exit(x, len(logits), net.n_exits)
                logits.append(net.classifier[len(logits)](features))
                last = last if block.has_transition else x
            these.append((last, ups))
        coarser = these
    return logits


def run_block(block: Block, x: Tensor, coarser: Tensor | None = None, ups: Sequence[Tensor] = (), *,
              finer: Block | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A block of a RANet.

    Args:
        coarser, ups: for a block with fusion, the coarser block's last feature and the results of this block's `conv_up`.
        finer: the block that will read this one's features, if any.
    Returns:
        Output map, last feature, results of `conv_up` of `finer`.
    """
    finer_ups: list[Tensor] = []
    for i, layer in enumerate(block.layers):
        own, *ahead = run_bottlenecks([layer.conv_normal, *([finer.layers[i].conv_up] if finer else [])], x)
        finer_ups += ahead
        size = own.shape[2:]
        x = concatenate(resize(x, size), *([resize(ups[i], size)] if block.fuses else []), own)
    last = x
    if block.fuses:
        x = concatenate(x, resize(block.conv_last(coarser), x.shape[2:]))
    return (block.trans(x) if block.has_transition else x), last, finer_ups


def run_bottlenecks(bottlenecks: Sequence[Bottleneck], x: Tensor, together: bool = True) -> list[Tensor]:
    """Outputs of bottlenecks that read the same map x.

    Their 1x1 convolutions run as one if `together` and if each has one with plain BatchNorm2d in training mode behind it.
    """
    as_product = x.is_cpu and x.is_contiguous()   # for a convolution, oneDNN would first bring x into a layout of its own
    together &= all(len(b.net) > 3 and type(b.net[1]) is nn.BatchNorm2d and b.net[1].training for b in bottlenecks)
    if not together or (len(bottlenecks) == 1 and not as_product):
        return [b(x) for b in bottlenecks]
    convs, norms = [b.net[0] for b in bottlenecks], [b.net[1] for b in bottlenecks]
    kernels = torch.cat([conv.weight for conv in convs])
    if as_product:   # torch.matmul would copy the map, too
        y = torch.bmm(kernels.flatten(1).expand(len(x), -1, -1), x.flatten(2)).unflatten(2, x.shape[2:])
    else:
        y = F.conv2d(x, kernels)
    mean, var, weight, bias = (torch.cat([getattr(norm, name) for norm in norms])
                               for name in ("running_mean", "running_var", "weight", "bias"))
    y = F.batch_norm(y, mean, var, weight, bias, training=True, momentum=norms[0].momentum, eps=norms[0].eps)
    widths = [conv.out_channels for conv in convs]
    with torch.no_grad():
        torch._foreach_copy_([buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)],
                             [part for parts in zip(mean.split(widths), var.split(widths)) for part in parts])
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    outputs = []
    for b, part in zip(bottlenecks, y.split(widths, dim=1)):
        part = F.relu(part)   # out of place, because a slice is not dense, and what follows wants it so
        for module in list(b.net)[3:]:
            part = module(part)
        outputs.append(part)
    return outputs


class _DenseGradient(torch.autograd.Function):
    """Identity whose gradient comes back dense, in the memory layout it has."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):
        dense = grad.is_contiguous() or grad.is_contiguous(memory_format=torch.channels_last)
        return grad if dense else grad.clone()   # clone keeps the order of the strides


def resize(x: Tensor, size: torch.Size) -> Tensor:
    """`resize_like` with a dense gradient.

    The gradient is a slice of that of a concatenation. For slices in channels-last layout PyTorch's backward pass of the
    interpolation goes through the other layout, on the way in and on the way out.
    """
    resized = resize_like(x, size)
    return _DenseGradient.apply(resized) if resized is not x and resized.requires_grad else resized
