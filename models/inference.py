"""Forms of MSDNet and RANet for inference only, of networks whose batch normalisation is folded away (`models.folding`): features
are written where they are read.

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

from models.backbone import Backbone
from models.collaboration import CollaborativeNet
from models.layers import Bottleneck, Classifier, resize_like
from models.msdnet import MSDLayer, MSDNet, Transition
from models.ranet import Block, DenseLayer, FusionLayer, RANet, State


def has_growing_form(backbone: nn.Module) -> bool:
    """Whether there is a form with growing buffers of a network."""
    # Not for classes derived from these two, which may do something else.
    return has_growing_form(backbone.net) if isinstance(backbone, CollaborativeNet) else type(backbone) in (MSDNet, RANet)


def growing_form(backbone: nn.Module) -> nn.Module:
    """The form with growing buffers of a backbone that has one, with folded batch normalisation; they share their weights."""
    if isinstance(backbone, CollaborativeNet):
        form = CollaborativeNet(growing_form(backbone.net))
        form.classifier, form.isc_modules = backbone.classifier, backbone.isc_modules
        return form
    return GrowingMSDNet(backbone) if isinstance(backbone, MSDNet) else GrowingRANet(backbone)


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def _rectify_into(buffer: Tensor, channel: int, x: Tensor) -> None:
    """Write relu(x) to the channels of `buffer` from `channel` on."""
    torch.clamp_min(x, 0, out=buffer.narrow(1, channel, x.size(1)))


def _room_for(x: Tensor, channels: int) -> Tensor:
    """A buffer of `channels` channels that begins with those of x."""
    buffer = x.new_empty(len(x), channels, *x.shape[2:])
    buffer.narrow(1, 0, x.size(1)).copy_(x)
    return buffer


class Pointwise(nn.Module):
    """1x1 convolutions that read the same map, each followed by ReLU, as one matrix product."""

    def __init__(self, convolutions: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        weight = torch.cat([c.weight.detach().flatten(1) for c in convolutions])[None]
        bias = torch.cat([c.bias.detach() for c in convolutions])[None, :, None]
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.in_width, self.widths = convolutions[0].in_channels, [c.out_channels for c in convolutions]
        self._parts = [(sum(self.widths[:i]), width) for i, width in enumerate(self.widths)]

    def forward(self, buffer: Tensor) -> list[Tensor]:
        """Outputs of all convolutions for the first channels of `buffer`."""
        n, _, height, width = buffer.shape
        x = buffer.narrow(1, 0, self.in_width).flatten(2)
        out = torch.baddbmm(self.bias, self.weight.expand(n, -1, -1), x).view(n, -1, height, width)
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


def _reader(bottlenecks: Sequence[Bottleneck]) -> nn.Module:
    """What the 3x3 convolutions of `bottlenecks` need of the map that they share."""
    first = [_convolutions(b)[0] for b in bottlenecks]
    if first[0].kernel_size == (1, 1):
        return Pointwise(first)
    return Prefix(first[0].in_channels, len(first))


class GrowingClassifier(nn.Module):
    """`Classifier` on the first channels of a buffer."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.first, self.second = _convolutions(classifier)
        self.linear = classifier.linear

    def pool(self, buffer: Tensor) -> Tensor:
        """The features (B, width) that the linear layer reads."""
        x = self.first(buffer.narrow(1, 0, self.first.in_channels)).relu_()
        x = self.second(x).relu_()
        return F.avg_pool2d(x, x.shape[2:]).flatten(1)   # of 2x2 in the paper's networks, whose classifiers name this kernel

    def forward(self, buffer: Tensor) -> Tensor:
        return self.linear(self.pool(buffer))


class WritingConvolution(nn.Module):
    """The 3x3 convolution of a bottleneck, whose output goes to the channels of a buffer from `channel` on."""

    def __init__(self, bottleneck: Bottleneck, channel: int) -> None:
        super().__init__()
        self.convolution = _convolutions(bottleneck)[-1]
        self.channel, self.end = channel, channel + self.convolution.out_channels

    def forward(self, x: Tensor, buffer: Tensor) -> None:
        _rectify_into(buffer, self.channel, self.convolution(x))


class GrowingLayer(nn.Module):
    """`MSDLayer` that writes its new channels into the buffers of the scales."""

    def __init__(self, layer: MSDLayer) -> None:
        super().__init__()
        self.dropped = layer.dropped
        self.conv_down, self.conv_normal = nn.ModuleList(), nn.ModuleList()
        read_by: list[list[Bottleneck]] = [[] for _ in range(self.dropped + len(layer.layers))]   # per input scale
        for s, scale in enumerate(layer.layers, start=self.dropped):
            channel = _convolutions(scale.conv_normal)[0].in_channels
            if s > 0:
                self.conv_down.append(WritingConvolution(scale.conv_down, channel))
                read_by[s - 1].append(scale.conv_down)
                channel = self.conv_down[-1].end
            self.conv_normal.append(WritingConvolution(scale.conv_normal, channel))
            read_by[s].append(scale.conv_normal)
        self.readers = nn.ModuleList(_reader(bottlenecks) for bottlenecks in read_by)
        self.out_widths = [convolution.end for convolution in self.conv_normal]

    def room_before(self, room: Sequence[int] | None) -> list[int]:
        """Channels that the input maps need room for, where the output maps need `room` (None: what they have)."""
        return [reader.in_width for reader in self.readers[:self.dropped]] + list(room or self.out_widths)

    def forward(self, scales: list[Tensor]) -> list[Tensor]:
        # Of what is read of a scale, the first part is for its own convolution, the last for that of the next coarser one.
        read = [reader(buffer) for reader, buffer in zip(self.readers, scales)]
        for s, convolution in enumerate(self.conv_down, start=max(self.dropped, 1)):
            convolution(read[s - 1][-1], scales[s])
        for s, convolution in enumerate(self.conv_normal, start=self.dropped):
            convolution(read[s][0], scales[s])
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


class GrowingMSDNet(Backbone):
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

    def start(self, x: Tensor) -> list[Tensor]:
        return [x]

    def advance(self, n: int, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        scales = state
        if n == 0:
            scales = [_room_for(x, room) for x, room in zip(self.stem(state[0]), self.room)]
        for layer in self.blocks[n]:
            scales = layer(scales)
        return scales[-1], scales

    def live(self, n: int, state: list[Tensor]) -> list[Tensor]:
        """The channels of the state after step n that have been written."""
        return [buffer[:, :width] for buffer, width in zip(state, self.blocks[n][-1].out_widths)]


class GrowingDenseLayer(nn.Module):
    """`DenseLayer` or `FusionLayer` that writes its new channels behind those that it reads.

    Where it halves the resolution, it writes into a new buffer with room for `room` channels.
    """

    def __init__(self, layer: DenseLayer | FusionLayer, room: int) -> None:
        super().__init__()
        self.reader, self.conv_normal = _reader([layer.conv_normal]), _convolutions(layer.conv_normal)[-1]
        self.halves, self.room = self.conv_normal.stride == (2, 2), room
        self.fuses = isinstance(layer, FusionLayer)
        if self.fuses:
            self.coarser_reader, self.conv_up = _reader([layer.conv_up]), _convolutions(layer.conv_up)[-1]

    def forward(self, buffer: Tensor, coarser: Tensor | None) -> Tensor:
        """Return the buffer written to, for buffers of the input and of the coarser map."""
        own, width = self.conv_normal(self.reader(buffer)[0]), self.reader.in_width
        if self.halves:
            buffer = _room_for(resize_like(buffer, own.shape[2:]), self.room)
        if self.fuses:
            up = self.conv_up(self.coarser_reader(coarser)[0]).relu_()
            buffer.narrow(1, width, up.size(1)).copy_(resize_like(up, own.shape[2:]))
            width += up.size(1)
        _rectify_into(buffer, width, own)
        return buffer


class GrowingBlock(nn.Module):
    """`Block` that writes its new channels into one buffer; where the last layer halves the resolution, into a second one.

    The buffers are the block's feature list: entry i is the first `list_widths[i]` channels of its buffer.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.width, self.fuses = block.list_widths[-1], block.fuses
        self.last = Pointwise(_convolutions(block.conv_last)) if block.fuses else None
        self.transition = Pointwise(_convolutions(block.trans)) if block.has_transition else None
        room = self.width + (self.last.widths[0] if block.fuses else 0)
        self.layers = nn.ModuleList(GrowingDenseLayer(layer, room) for layer in block.layers)
        self.first_room = self.layers[-1].reader.in_width if self.layers[-1].halves else room

    def forward(self, x: Tensor, coarser: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Return (output map, buffers) for the buffers of the coarser sub-network's block with the same index."""
        buffers = [_room_for(x, self.first_room)]
        for layer in self.layers:
            # Layer i reads entry i of the coarser list, a prefix of its first buffer: only the entry behind the last layer can
            # be in a second one.
            buffer = layer(buffers[-1], coarser[0] if coarser else None)
            if layer.halves:
                buffers.append(buffer)
        if self.fuses:
            buffer[:, self.width:] = resize_like(self.last(coarser[-1])[0], buffer.shape[2:])
        return (self.transition(buffer)[0] if self.transition is not None else buffer), buffers


class GrowingRANet(RANet):
    """Inference form of a RANet with folded batch normalisation; the order of its blocks is RANet's own.

    The state has the buffers of a block in place of its feature list, and no `x` where that is the last buffer.
    """

    def __init__(self, net: RANet) -> None:
        nn.Module.__init__(self)
        self.FirstLayer, self.classifier = net.FirstLayer, nn.ModuleList(GrowingClassifier(c) for c in net.classifier)
        self.scale_flows = nn.ModuleList(nn.ModuleList(GrowingBlock(block) for block in flow) for flow in net.scale_flows)
        self._steps, self.rescale_gradients = net._steps, False

    def advance(self, n: int, state: State) -> tuple[Tensor, State]:
        if state.x is None:
            state = state._replace(x=state.features[-1][-1])
        x, state = super().advance(n, state)
        is_last_buffer = state.features and state.x is state.features[-1][-1]
        return x, state._replace(x=None) if is_last_buffer else state
