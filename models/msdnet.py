"""Multi-scale dense network (MSDNet, arXiv:1703.09844), with or without gradient rescaling."""
from __future__ import annotations

import math
from collections.abc import Sequence

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
)

State = list[Tensor]   # one feature map per scale still carried, finest first


class DenseScale(nn.Module):
    """The convolutions of one scale of an `MSDLayer`: of its own map, and of the next finer one where there is one."""

    def __init__(self, in_width: int, growth: int, bn_factor: int, *, finer_width: int | None = None,
                 finer_bn_factor: int | None = None, bottleneck: bool) -> None:
        super().__init__()
        if finer_width is not None:
            growth //= 2   # the other half comes from the finer scale
            self.conv_down = Bottleneck(finer_width, growth, bn_factor=finer_bn_factor, stride=2, bottleneck=bottleneck)
        self.conv_normal = Bottleneck(in_width, growth, bn_factor=bn_factor, bottleneck=bottleneck)


class MSDLayer(nn.Module):
    """One layer over the coarsest `n_out` scales; the finest of its `n_in` input scales is dropped where n_in > n_out.

    Args:
        width: channel base; scale s carries width * gr_factor[s] channels.
        growth: growth base; scale s grows by growth * gr_factor[s] channels.
    """

    def __init__(self, width: int, growth: int, gr_factor: list[int], bn_factor: list[int], n_in: int, n_out: int, *,
                 bottleneck: bool) -> None:
        super().__init__()
        n_scales = len(gr_factor)
        self.dropped = n_in - n_out
        self.layers = nn.ModuleList()
        for scale in range(n_scales - n_out, n_scales):
            finer = {}
            if scale > n_scales - n_in:   # every scale but the finest that comes in has a finer neighbour
                finer = {"finer_width": width * gr_factor[scale - 1], "finer_bn_factor": bn_factor[scale - 1]}
            self.layers.append(DenseScale(width * gr_factor[scale], growth * gr_factor[scale], bn_factor[scale],
                                          bottleneck=bottleneck, **finer))

    def forward(self, scales: State) -> State:
        """Each scale's map with its new channels behind it: those from the finer scale, then its own."""
        grown = []
        for s, scale in enumerate(self.layers, start=self.dropped):
            from_finer = [scale.conv_down(scales[s - 1])] if s > 0 else []
            grown.append(concatenate(scales[s], *from_finer, scale.conv_normal(scales[s])))
        return grown


class Transition(nn.Module):
    """1x1 convolution per scale that narrows channel base `width` to `reduced`."""

    def __init__(self, width: int, reduced: int, gr_factor: list[int]) -> None:
        super().__init__()
        self.m = nn.ModuleList([ConvBNReLU(width * f, reduced * f, kernel=1) for f in gr_factor])

    def forward(self, scales: State) -> State:
        return [conv(x) for conv, x in zip(self.m, scales, strict=True)]


class MSDNet(Backbone):
    """MSDNet with a classifier after every block.

    Args:
        n_blocks: number of blocks, which is the number of exits.
        n_channels: channel base of the first layer.
        base, step, step_mode: layers of block 0; layers of block i > 0 are `step` ("even") or `step * i + 1` ("lin_grow").
        growth_rate: channels a layer adds, times gr_factor of the scale.
        gr_factor, bn_factor: width and bottleneck factor per scale, finest first.
        prune: "max" drops the finest scale at equal intervals, "min" keeps only what later layers still need.
        reduction: factor of the channel base at a transition.
        bottleneck: 1x1 convolutions in front of the 3x3 ones.
        num_classes, image_size: classes; side of the images in pixels, from 32 on.
        stem: first layer, "small" or "large"; default: large for images from 97 pixels on.
        rescale_gradients: gradient rescaling at every exit (backward pass only).
    Raises:
        ValueError: on values that do not describe a network.
    """

    def __init__(self, *, n_blocks: int, n_channels: int = 32, base: int = 4, step: int = 1, step_mode: str = "even",
                 growth_rate: int = 6, gr_factor: Sequence[int] = (1, 2, 4), bn_factor: Sequence[int] = (1, 2, 4),
                 prune: str = "max", reduction: float = 0.5, bottleneck: bool = True, num_classes: int = 100,
                 image_size: int = 32, stem: str | None = None, rescale_gradients: bool = False) -> None:
        super().__init__()
        gr_factor, bn_factor = list(gr_factor), list(bn_factor)
        check_positive(n_blocks=n_blocks, n_channels=n_channels, base=base, step=step, growth_rate=growth_rate,
                       num_classes=num_classes, gr_factor=gr_factor, bn_factor=bn_factor)
        check_choice("step_mode", step_mode, ("even", "lin_grow"))
        check_choice("prune", prune, ("max", "min"))
        n_scales = len(gr_factor)
        if len(bn_factor) != n_scales:
            raise ValueError(f"gr_factor has {n_scales} values, bn_factor {len(bn_factor)}; give one of each per scale")
        odd = [growth_rate * f for f in gr_factor[1:] if growth_rate * f % 2]
        if odd:
            raise ValueError(f"growth_rate {growth_rate} with gr_factor {gr_factor} gives the odd width {odd[0]}; "
                             "all but the finest scale split their growth in two equal halves")
        stem = choose_stem(image_size, stem)
        self._check_map_size(n_scales, image_size, stem)
        self.rescale_gradients, self.image_size = rescale_gradients, image_size
        n_layers = [base, *(step if step_mode == "even" else step * i + 1 for i in range(1, n_blocks))]
        total = sum(n_layers)
        if prune == "min" and total < n_scales - 1:
            raise ValueError(f"prune min needs at least {n_scales - 1} layers for {n_scales} scales; n_blocks, base and step "
                             f"make {total}")

        first = Stem([n_channels * f for f in gr_factor], [2] * (n_scales - 1), stem)
        self.blocks, self.classifier = nn.ModuleList(), nn.ModuleList()
        width = n_channels
        for block in range(n_blocks):
            modules: list[nn.Module] = [first] if block == 0 else []
            for layer in range(sum(n_layers[:block]) + 1, sum(n_layers[:block + 1]) + 1):
                n_in, n_out = _scales(layer, total, n_scales, prune)
                modules.append(MSDLayer(width, growth_rate, gr_factor, bn_factor, n_in, n_out, bottleneck=bottleneck))
                width += growth_rate
                if (n_in > n_out) if prune == "max" else layer in (total // 3, 2 * total // 3):
                    reduced = math.floor(reduction * width)
                    if reduced < 1:
                        raise ValueError(f"reduction {reduction} leaves no channel of {width} at layer {layer}")
                    modules.append(Transition(width, reduced, gr_factor[n_scales - n_out:]))
                    width = reduced
            self.blocks.append(nn.Sequential(*modules))
            self.classifier.append(Classifier(width * gr_factor[-1], num_classes, image_size, stem))

    @staticmethod
    def _check_map_size(n_scales: int, image_size: int, stem: str) -> None:
        side = finest = finest_side(image_size, stem)
        for _ in range(n_scales - 1):
            side = halved(side)
        needed = PAPER_MAPS.get((stem, image_size))
        if needed is None:
            check_map(side, image_size, stem, f"{n_scales} scales", "fewer entries of gr_factor and bn_factor")
        elif side != needed:
            raise ValueError(f"{n_scales} scales end in a {side}x{side} map; classifiers for {image_size}-pixel images read "
                             f"{needed}x{needed}, which takes {1 + (finest // needed).bit_length() - 1} scales, each with an "
                             "entry of gr_factor and bn_factor")

    def block(self, n: int) -> list[nn.Module]:
        """The modules that step n runs in front of its classifier."""
        return [self.blocks[n]]

    def start(self, x: Tensor) -> State:
        return [x]

    def advance(self, n: int, state: State) -> tuple[Tensor, State]:
        scales = self.blocks[n](state[0] if n == 0 else state)
        coarsest = scales[-1]
        if self.rescale_gradients:
            coarsest, scales[-1] = rescale_at_exit(coarsest, n, self.n_exits)
        return coarsest, scales


def _scales(layer: int, total: int, n_scales: int, prune: str) -> tuple[int, int]:
    """Scales that layer `layer` (from 1, of `total`) reads and writes."""
    if prune == "min":
        return min(n_scales, total - layer + 2), min(n_scales, total - layer + 1)
    interval = math.ceil(total / n_scales)
    return n_scales - max(0, layer - 2) // interval, n_scales - (layer - 1) // interval
