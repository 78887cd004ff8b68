"""Resolution adaptive network (RANet, arXiv:2003.07326), with or without gradient rescaling."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from models.backbone import Backbone
from models.layers import (
    PAPER_MAPS,
    Bottleneck,
    Classifier,
    ConvBNReLU,
    Stem,
    check_choice,
    check_map,
    check_positive,
    choose_stem,
    concatenate,
    finest_side,
    halved,
    rescale_at_exit,
    resize_like,
)


class State(NamedTuple):
    """What a step of a RANet hands to the next one.

    Attributes:
        pyramid: maps that the sub-networks still to come start from, coarsest first.
        x: map that the next block reads (before exit 0: the image).
        features: feature list of every block of the current sub-network so far. The step that begins the next sub-network
            reads all of them; in the last sub-network nothing does, and there are none.
    """

    pyramid: list[Tensor]
    x: Tensor
    features: list[list[Tensor]]


class DenseLayer(nn.Module):
    """Adds `growth` channels to its input."""

    def __init__(self, width: int, growth: int, *, bn_factor: int, bottleneck: bool) -> None:
        super().__init__()
        self.conv_normal = Bottleneck(width, growth, bn_factor=bn_factor, bottleneck=bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        return concatenate(x, self.conv_normal(x))


class FusionLayer(nn.Module):
    """Adds `growth` channels to its input: `fused` of them from the coarser sub-network's features, the rest its own."""

    def __init__(self, width: int, growth: int, coarser_width: int, fused: int, *, bn_factor: int, coarser_bn_factor: int,
                 stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.conv_up = Bottleneck(coarser_width, fused, bn_factor=coarser_bn_factor, bottleneck=bottleneck)
        self.conv_normal = Bottleneck(width, growth - fused, bn_factor=bn_factor, stride=stride, bottleneck=bottleneck)

    def forward(self, x: Tensor, coarser: Tensor) -> Tensor:
        """The input, what the coarser map adds and what the input adds, side by side in the resolution of the last."""
        own, up = self.conv_normal(x), self.conv_up(coarser)
        return concatenate(resize_like(x, own.shape[2:]), resize_like(up, own.shape[2:]), own)


class Block(nn.Module):
    """Dense layers, a fusion with the coarser sub-network's block of the same index where there is one, a transition.

    Args:
        width: input channels.
        coarser_widths: widths of the coarser block's feature list, or None for a block without fusion.
        transition: factor of the width in the 1x1 convolution at the end, or None for none.
        down_sample: the last layer has stride 2 (fusion blocks only).
    """

    def __init__(self, width: int, n_layers: int, growth: int, *, coarser_widths: list[int] | None, compress_factor: float,
                 bn_factor: int, coarser_bn_factor: int | None, down_sample: bool, transition: float | None,
                 bottleneck: bool) -> None:
        super().__init__()
        self.list_widths = [width + growth * i for i in range(n_layers + 1)]
        fuses = coarser_widths is not None
        self.layers = nn.ModuleList()
        for i in range(n_layers):
            if fuses:
                fused = math.floor(growth * compress_factor)
                if not 0 < fused < growth:
                    raise ValueError(f"compress_factor {compress_factor} gives {fused} of {growth} channels to fusion; "
                                     "both parts need at least one")
                self.layers.append(FusionLayer(
                    self.list_widths[i], growth, coarser_widths[i], fused, bn_factor=bn_factor,
                    coarser_bn_factor=coarser_bn_factor, stride=2 if down_sample and i == n_layers - 1 else 1,
                    bottleneck=bottleneck))
            else:
                self.layers.append(DenseLayer(self.list_widths[i], growth, bn_factor=bn_factor, bottleneck=bottleneck))
        self.out_width = self.list_widths[-1]
        if fuses:
            last_width = math.floor(self.out_width * compress_factor)
            self.conv_last = ConvBNReLU(coarser_widths[-1], last_width, kernel=1)
            self.out_width += last_width
        self.fuses = fuses
        self.has_transition = transition is not None
        if self.has_transition:
            reduced = math.floor(transition * self.out_width)
            if reduced < 1:
                raise ValueError(f"reduction {transition} leaves no channel of {self.out_width}")
            self.trans = ConvBNReLU(self.out_width, reduced, kernel=1)
            self.out_width = reduced

    def forward(self, x: Tensor, coarser: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return (output map, feature list: the input and every layer's output) for the coarser block's feature list."""
        features = [x]
        for i, layer in enumerate(self.layers):
            features.append(layer(features[-1], coarser[i]) if self.fuses else layer(features[-1]))
        x = features[-1]
        if self.fuses:
            x = concatenate(x, resize_like(self.conv_last(coarser[-1]), x.shape[2:]))
        return (self.trans(x) if self.has_transition else x), features


class RANet(Backbone):
    """RANet: sub-networks of rising resolution; the last blocks of each one end in a classifier.

    All lists run from the coarsest sub-network to the finest.

    Args:
        n_blocks: blocks of sub-network 0; each following one has `block_step` more.
        step, step_mode: layers of block i (from 1) are `step` ("even") or `step * i` ("lin_grow").
        scale_list: scale of each sub-network; neighbours with equal entries share a resolution.
        n_channels: channel base of the first layer, times gr_factor of the sub-network.
        growth_rate: channels a layer adds, times gr_factor.
        bn_factor: bottleneck factor per sub-network.
        compress_factor: share of the growth that a fusion block takes from the coarser sub-network.
        reduction: factor of the width at a transition.
        num_classes, image_size: classes; side of the images in pixels, from 32 on.
        stem: first layer, "small" or "large"; default: large for images from 97 pixels on.
        rescale_gradients: gradient rescaling at every exit (backward pass only).
    Raises:
        ValueError: on values that do not describe a network, or whose classifiers would not all read maps of one size, which is
            8x8 for 32 pixels and 7x7 for 224.
    """

    def __init__(self, *, n_blocks: int, block_step: int = 2, step: int = 1, step_mode: str = "even",
                 scale_list: Sequence[int] = (1, 2, 3), n_channels: int = 32, growth_rate: int = 6,
                 gr_factor: Sequence[int] = (1, 2, 4), bn_factor: Sequence[int] = (1, 2, 4), compress_factor: float = 0.25,
                 reduction: float = 0.5, bottleneck: bool = True, num_classes: int = 100, image_size: int = 32,
                 stem: str | None = None, rescale_gradients: bool = False) -> None:
        super().__init__()
        scale_list, gr_factor, bn_factor = list(scale_list), list(gr_factor), list(bn_factor)
        check_positive(n_blocks=n_blocks, block_step=block_step, step=step, n_channels=n_channels, growth_rate=growth_rate,
                       num_classes=num_classes, scale_list=scale_list, gr_factor=gr_factor, bn_factor=bn_factor)
        check_choice("step_mode", step_mode, ("even", "lin_grow"))
        n_subnets = len(scale_list)
        if not len(gr_factor) == len(bn_factor) == n_subnets:
            raise ValueError(f"scale_list has {n_subnets} values, gr_factor {len(gr_factor)}, bn_factor {len(bn_factor)}; "
                             "give one of each per sub-network")
        self.rescale_gradients, self.image_size = rescale_gradients, image_size
        blocks_of = [n_blocks + block_step * s for s in range(n_subnets)]
        stem = choose_stem(image_size, stem)
        self._check_map_sizes(scale_list, blocks_of, image_size, stem)

        self.scale_flows, self.classifier = nn.ModuleList(), nn.ModuleList()
        coarser: list[Block] = []
        self._steps: list[tuple[int, range]] = []   # per exit: sub-network, its blocks to run
        for s in range(n_subnets):
            n_fusion = blocks_of[s - 1] if s else 0
            down_at = _down_sampling_blocks(s, scale_list[s], blocks_of)
            transition_at = {(j + 1) * blocks_of[s] // scale_list[s] for j in range(scale_list[s] - 1)}
            width, blocks = n_channels * gr_factor[s], []
            for i in range(1, blocks_of[s] + 1):
                fuses = i <= n_fusion
                blocks.append(Block(
                    width, step if step_mode == "even" else step * i, growth_rate * gr_factor[s],
                    coarser_widths=coarser[i - 1].list_widths if fuses else None, compress_factor=compress_factor,
                    bn_factor=bn_factor[s], coarser_bn_factor=bn_factor[s - 1] if fuses else None,
                    down_sample=fuses and i in down_at, transition=reduction if i in transition_at else None,
                    bottleneck=bottleneck))
                width = blocks[-1].out_width
                if not fuses:
                    self._steps.append((s, range(0 if i == n_fusion + 1 else i - 1, i)))
                    self.classifier.append(Classifier(width, num_classes, image_size, stem))
            self.scale_flows.append(nn.ModuleList(blocks))
            coarser = blocks
        self._initialise()
        # After the initialisation: the first layer keeps PyTorch's own, as in the released networks.
        self.FirstLayer = Stem([n_channels * f for f in reversed(gr_factor)],
                               [1 if a == b else 2 for a, b in zip(scale_list[:0:-1], scale_list[-2::-1])],
                               stem)

    @staticmethod
    def _check_map_sizes(scale_list: list[int], blocks_of: list[int], image_size: int, stem: str) -> None:
        starts = [finest_side(image_size, stem)]   # sides of the maps that the sub-networks begin with, finest first
        for finer, coarser in zip(scale_list[:0:-1], scale_list[-2::-1]):
            starts.append(starts[-1] if finer == coarser else halved(starts[-1]))
        needed, reason = starts[-1], "sub-network 1 ends in {0}x{0}, and all classifiers read maps of one size"
        if (stem, image_size) in PAPER_MAPS:
            needed, reason = PAPER_MAPS[stem, image_size], f"classifiers for {image_size}-pixel images read {{0}}x{{0}}"
        for s, side in zip(reversed(range(len(scale_list))), starts):
            n_fusion = blocks_of[s - 1] if s else 0
            for _ in _down_sampling_blocks(s, scale_list[s], blocks_of) & set(range(1, n_fusion + 1)):
                side = halved(side)
            if side != needed:
                raise ValueError(f"scale_list {'-'.join(map(str, scale_list))} leads sub-network {s + 1} to a {side}x{side} map; "
                                 f"{reason.format(needed)}")
        check_map(needed, image_size, stem, f"{len(scale_list)} sub-networks",
                  "fewer entries of scale_list, gr_factor and bn_factor")

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def start(self, x: Tensor) -> State:
        return State(pyramid=[], x=x, features=[])

    def advance(self, n: int, state: State) -> tuple[Tensor, State]:
        subnet, block_range = self._steps[n]
        blocks = self.scale_flows[subnet]
        pyramid, x, features = state
        if n == 0:
            x, *pyramid = reversed(self.FirstLayer(x))
        coarser: list[list[Tensor]] = []
        if block_range.start == 0:   # a new sub-network begins; the one before becomes the coarser one
            coarser, features = features, []
        for i in block_range:
            x, block_features = blocks[i](x, coarser[i] if blocks[i].fuses else None)
            features = [*features, block_features]
        onward = x
        if self.rescale_gradients:
            x, onward = rescale_at_exit(x, n, self.n_exits)
            if not blocks[i].has_transition:   # then x is in the feature list too: later gradients meet in one place
                block_features[-1] = onward
        if subnet == len(self.scale_flows) - 1:
            features = []
        elif i == len(blocks) - 1:
            onward, *pyramid = pyramid
        return x, State(pyramid, onward, features)


def _down_sampling_blocks(subnet: int, scale: int, blocks_of: list[int]) -> set[int]:
    """Indices (from 1) of the blocks of a sub-network that halve the resolution, if they are fusion blocks."""
    return set([0, *blocks_of[:subnet]][-(scale - 1):]) if scale > 1 else set()
