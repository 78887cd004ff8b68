"""Forms of MSDNet and RANet for inference only: batch normalisation folded away, and features written where they are read.

A layer of a dense network outputs its input and a few new channels. The growing forms give every map one buffer with room for
all the channels it will ever have, and each layer writes its own behind those that are there: nothing is copied to be
concatenated, and RANet's feature lists are prefixes of one tensor. 1x1 convolutions are matrix products that read such a
prefix in place, one product for all convolutions with the same input.

State handed from step to step consists of these buffers; a step writes only behind the channels that earlier steps wrote.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.collaboration import CollaborativeNet
from models.layers import Classifier, all_exits
from models.msdnet import MSDLayer, MSDNet, Transition
from models.ranet import Block, FusionLayer, RANet


def fold_batch_norm(module: nn.Module) -> None:
    """Merge every batch normalisation into the convolution in front of it, in place. The module must be in eval mode."""
    for name, child in list(module.named_children()):
        fold_batch_norm(child)
        if isinstance(child, nn.Sequential):
            merged: list[nn.Module] = []
            for layer in child:
                if isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                    merged[-1] = fuse_conv_bn_eval(merged[-1], layer)
                else:
                    merged.append(layer)
            setattr(module, name, nn.Sequential(*merged))


def growing_form(backbone: nn.Module) -> nn.Module:
    """The form with growing buffers of a backbone whose batch normalisation is folded; they share their weights."""
    if isinstance(backbone, CollaborativeNet):
        form = CollaborativeNet(growing_form(backbone.net))
        form.classifier, form.isc_modules = backbone.classifier, backbone.isc_modules
        return form
    return GrowingMSDNet(backbone) if isinstance(backbone, MSDNet) else GrowingRANet(backbone)


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


# For one image oneDNN's call costs more than its work (6 channels of 32x32: 59 us against 19 us); this is the routine that
# PyTorch's convolution takes without oneDNN.
_small_convolution = getattr(torch._C._nn, "thnn_conv2d", None)


class Convolution(nn.Module):
    """A convolution with less overhead for single images."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.in_width, self.out_width, self.stride = convolution.in_channels, convolution.out_channels, convolution.stride
        # Outside the module's own registers, where looking them up costs as much as a small operation.
        self._arguments = self.weight, self.bias, self.stride, convolution.padding, convolution.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, stride, padding, kernel = self._arguments
        if len(x) == 1 and not x.is_cuda and _small_convolution and not torch.is_autocast_enabled("cpu"):
            return _small_convolution(x, weight, kernel, bias, stride, padding)
        return F.conv2d(x, weight, bias, stride, padding)


def _rectify_into(buffer: Tensor, channel: int, x: Tensor) -> None:
    """Write relu(x) to the channels of `buffer` from `channel` on."""
    torch.clamp_min(x, 0, out=buffer.narrow(1, channel, x.size(1)))


def _room_for(x: Tensor, channels: int) -> Tensor:
    """A buffer of `channels` channels that begins with those of x."""
    buffer = x.new_empty(len(x), channels, *x.shape[2:])
    buffer.narrow(1, 0, x.size(1)).copy_(x)
    return buffer


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class Pointwise(nn.Module):
    """1x1 convolutions that read the same map, each followed by ReLU, as one matrix product."""

    def __init__(self, convolutions: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        weight = torch.cat([c.weight.detach().flatten(1) for c in convolutions])[None]
        bias = torch.cat([c.bias.detach() for c in convolutions])[None, :, None]
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.in_width, self.widths = convolutions[0].in_channels, [c.out_channels for c in convolutions]
        self._arguments = self.weight, self.bias
        self._parts = [(sum(self.widths[:i]), width) for i, width in enumerate(self.widths)]

    def forward(self, buffer: Tensor) -> list[Tensor]:
        """Outputs of all convolutions for the first channels of `buffer`."""
        weight, bias = self._arguments
        n, _, height, width = buffer.shape
        x = buffer.narrow(1, 0, self.in_width).flatten(2)
        out = torch.baddbmm(bias, weight.expand(n, -1, -1), x).view(n, -1, height, width)
        if n == 1 or len(self._parts) == 1:   # parts of one image lie in one piece
            out.relu_()
            return [out] if len(self._parts) == 1 else [out.narrow(1, start, size) for start, size in self._parts]
        return [out.narrow(1, start, size).relu() for start, size in self._parts]


class Prefix(nn.Module):
    """Stands in for `Pointwise` where there is no bottleneck: the convolutions read the map itself."""

    def __init__(self, in_width: int, n_readers: int) -> None:
        super().__init__()
        self.in_width, self.n_readers = in_width, n_readers

    def forward(self, buffer: Tensor) -> list[Tensor]:
        return [buffer.narrow(1, 0, self.in_width)] * self.n_readers


def _reader(bottlenecks: Sequence[nn.Module]) -> nn.Module:
    """What the 3x3 convolutions of `bottlenecks` need of the map that they share."""
    first = [_convolutions(b)[0] for b in bottlenecks]
    if first[0].kernel_size == (1, 1):
        return Pointwise(first)
    return Prefix(first[0].in_channels, len(first))


class GrowingClassifier(nn.Module):
    """`Classifier` on the first channels of a buffer."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.first, self.second = (Convolution(c) for c in _convolutions(classifier))
        self.linear = classifier.linear

    def pool(self, buffer: Tensor) -> Tensor:
        """The features (B, width) that the linear layer reads."""
        x = self.first(buffer.narrow(1, 0, self.first.in_width)).relu_()
        return F.avg_pool2d(self.second(x).relu_(), 2).flatten(1)

    def forward(self, buffer: Tensor) -> Tensor:
        return self.linear(self.pool(buffer))


class GrowingLayer(nn.Module):
    """`MSDLayer` that writes its new channels into the buffers of the scales."""

    def __init__(self, layer: MSDLayer) -> None:
        super().__init__()
        self.dropped = layer.dropped
        scales = list(layer.layers)
        n_in = len(scales) + self.dropped
        readers_of: list[list[nn.Module]] = [[] for _ in range(n_in)]
        convolutions: list[nn.Module] = []
        self._writes = []   # convolution, its input scale, place among that scale's readers, output scale, channel
        self.out_widths = []
        for scale, dense in enumerate(scales, start=self.dropped):
            channel = _convolutions(dense.conv_normal)[0].in_channels
            inputs = [(scale, dense.conv_normal)]
            if dense.reads_finer:
                inputs.insert(0, (scale - 1, dense.conv_down))
            for source, bottleneck in inputs:
                convolutions.append(Convolution(_convolutions(bottleneck)[-1]))
                self._writes.append((convolutions[-1].forward, source, len(readers_of[source]), scale, channel))
                readers_of[source].append(bottleneck)
                channel += convolutions[-1].out_width
            self.out_widths.append(channel)
        self.convolutions = nn.ModuleList(convolutions)
        self.readers = nn.ModuleList(_reader(bottlenecks) for bottlenecks in readers_of)
        self._read = [reader.forward for reader in self.readers]

    def room_before(self, room: Sequence[int] | None) -> list[int]:
        """Channels that the input maps need room for, where the output maps need `room` (None: what they have)."""
        return [reader.in_width for reader in self.readers[:self.dropped]] + list(room or self.out_widths)

    def forward(self, scales: list[Tensor]) -> list[Tensor]:
        inputs = [read(buffer) for read, buffer in zip(self._read, scales)]
        for convolve, source, place, target, channel in self._writes:
            _rectify_into(scales[target], channel, convolve(inputs[source][place]))
        return scales[self.dropped:]


class GrowingTransition(nn.Module):
    """`Transition` into new buffers with room for `room` channels per scale (None: as many as there are)."""

    def __init__(self, transition: Transition, room: Sequence[int] | None) -> None:
        super().__init__()
        self.m = nn.ModuleList(Pointwise(_convolutions(conv)) for conv in transition.m)
        self.out_widths = [conv.widths[0] for conv in self.m]
        self.room = list(room or self.out_widths)

    def room_before(self) -> list[int]:
        return [conv.in_width for conv in self.m]

    def forward(self, scales: list[Tensor]) -> list[Tensor]:
        return [_room_for(conv(x)[0], room) for conv, x, room in zip(self.m, scales, self.room)]


class GrowingMSDNet(nn.Module):
    """Inference form of an MSDNet with folded batch normalisation."""

    def __init__(self, net: MSDNet) -> None:
        super().__init__()
        blocks = [list(block) for block in net.blocks]
        self.stem = blocks[0].pop(0)
        room, growing = None, []
        for block in reversed(blocks):   # from the end, because a buffer is made for all the layers that follow
            layers: list[nn.Module] = []
            for module in reversed(block):
                if isinstance(module, MSDLayer):
                    layers.append(GrowingLayer(module))
                    room = layers[-1].room_before(room)
                else:
                    layers.append(GrowingTransition(module, room))
                    room = layers[-1].room_before()
            growing.append(nn.ModuleList(reversed(layers)))
        self.room = room
        self.blocks = nn.ModuleList(reversed(growing))
        self.classifier = nn.ModuleList(GrowingClassifier(c) for c in net.classifier)

    @property
    def n_exits(self) -> int:
        return len(self.blocks)

    def start(self, x: Tensor) -> list[Tensor]:
        """State in front of exit 0 for images x (B, 3, H, W)."""
        return [x]

    def step(self, n: int, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run block n on the state that step n-1 returned: (logits (B, num_classes) of exit n, next state)."""
        features, state = self.advance(n, state)
        return self.classifier[n](features), state

    def advance(self, n: int, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`step` without the classifier: (map that it reads, next state)."""
        scales = state
        if n == 0:
            scales = [_room_for(x, room) for x, room in zip(self.stem(state[0]), self.room)]
        for layer in self.blocks[n]:
            scales = layer(scales)
        return scales[-1], scales

    def live(self, n: int, state: list[Tensor]) -> list[Tensor]:
        """The channels of the state after step n that have been written."""
        return [buffer[:, :width] for buffer, width in zip(state, self.blocks[n][-1].out_widths)]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Raw logits (B, num_classes) of every exit."""
        return all_exits(self, x)


class GrowingBlock(nn.Module):
    """`Block` that writes its new channels into one buffer; where the last layer halves the resolution, into a second one.

    The buffers are the block's feature list: entry i is the first `list_widths[i]` channels of its buffer.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        layers = list(block.layers)
        fusion_layers = [layer for layer in layers if isinstance(layer, FusionLayer)]
        self.own = nn.ModuleList(_reader([layer.conv_normal]) for layer in layers)
        self.own_convolutions = nn.ModuleList(Convolution(_convolutions(layer.conv_normal)[-1]) for layer in layers)
        self.fused = nn.ModuleList(_reader([layer.conv_up]) for layer in fusion_layers)
        self.fused_convolutions = nn.ModuleList(Convolution(_convolutions(layer.conv_up)[-1]) for layer in fusion_layers)
        self.last = Pointwise(_convolutions(block.conv_last)) if block.fuses else None
        self.transition = Pointwise(_convolutions(block.trans)) if block.has_transition else None
        self.widths = block.list_widths
        self.halves = self.own_convolutions[-1].stride == (2, 2)
        self.room = self.widths[-1] + (self.last.widths[0] if block.fuses else 0)
        n = len(layers)
        self._layers = list(zip(self.widths, *([module.forward for module in modules] or [None] * n for modules in (
            self.own, self.own_convolutions, self.fused, self.fused_convolutions)), [False] * (n - 1) + [self.halves]))

    def forward(self, x: Tensor, coarser: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Return (output map, buffers) for the buffers of the coarser sub-network's block with the same index."""
        buffer = _room_for(x, self.widths[-2] if self.halves else self.room)
        buffers = [buffer]
        for width, read, convolve, read_coarser, convolve_coarser, halves in self._layers:
            own = convolve(read(buffer)[0])
            if halves:
                buffer = _room_for(_resize(buffer, own.shape[2:]), self.room)
                buffers.append(buffer)
            if read_coarser:
                # Layer i reads entry i of the coarser list, a prefix of its first buffer: only the entry behind the last
                # layer can be in a second one.
                up = convolve_coarser(read_coarser(coarser[0])[0]).relu_()
                buffer.narrow(1, width, up.size(1)).copy_(_resize(up, own.shape[2:]))
                width += up.size(1)
            _rectify_into(buffer, width, own)
        if self.last:
            buffer[:, self.widths[-1]:] = _resize(self.last(coarser[-1])[0], buffer.shape[2:])
        return (self.transition(buffer)[0] if self.transition else buffer), buffers


class GrowingRANet(nn.Module):
    """Inference form of a RANet with folded batch normalisation.

    State: `stem`, the features that the sub-networks still to come start from, coarsest first; `lists`, the buffers of
    every block of the current sub-network, where a finer one will read them; `x`, the map that the next block reads,
    unless it is the last buffer or a new sub-network begins.
    """

    def __init__(self, net: RANet) -> None:
        super().__init__()
        self.stem, self._steps = net.FirstLayer, list(net._steps)
        self.blocks = nn.ModuleList(nn.ModuleList(GrowingBlock(block) for block in flow) for flow in net.scale_flows)
        self.classifier = nn.ModuleList(GrowingClassifier(c) for c in net.classifier)

    @property
    def n_exits(self) -> int:
        return len(self.classifier)

    def start(self, x: Tensor) -> dict[str, list]:
        """State in front of exit 0 for images x (B, 3, H, W)."""
        return {"stem": [x], "x": [], "lists": []}

    def step(self, n: int, state: dict[str, list]) -> tuple[Tensor, dict[str, list]]:
        """Run the blocks up to exit n on the state that step n-1 returned: (logits (B, num_classes), next state)."""
        features, state = self.advance(n, state)
        return self.classifier[n](features), state

    def advance(self, n: int, state: dict[str, list]) -> tuple[Tensor, dict[str, list]]:
        """`step` without the classifier: (map that it reads, next state)."""
        subnet, block_range = self._steps[n]
        stem = self.stem(state["stem"][0])[::-1] if n == 0 else state["stem"]
        coarser: list[list[Tensor]] = []
        if block_range.start == 0:
            x, stem, coarser, lists = stem[0], stem[1:], state["lists"], []
        else:
            lists = state["lists"]
            x = (state["x"] or lists[-1])[-1]
        is_read = subnet < len(self.blocks) - 1   # a finer sub-network will read the lists
        for i in block_range:
            x, buffers = self.blocks[subnet][i](x, coarser[i] if i < len(coarser) else None)
            if is_read:
                lists = [*lists, buffers]
        ends = block_range.stop == len(self.blocks[subnet])
        in_lists = is_read and x is lists[-1][-1]
        return x, {"stem": stem, "x": [] if ends or in_lists else [x], "lists": lists}

    def forward(self, x: Tensor) -> list[Tensor]:
        """Raw logits (B, num_classes) of every exit."""
        return all_exits(self, x)
