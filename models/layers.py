"""Building blocks that MSDNet and RANet share.

Attribute names (`net`, `m`, `linear`, `layers`) are part of the checkpoint format: files of the released projects of this
family load by name, so they stay as they are.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.options.catalog import LEAST_SIDE, STEMS, stem_for

# Side of the map that a classifier reads in the paper's networks, by first layer and side of the images.
PAPER_MAPS = {("small", 32): 8, ("large", 224): 7}
LEAST_MAP = 3   # that can be halved twice


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant. Nothing is saved for the backward pass but the factor."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x unchanged; its gradient is multiplied by `factor`."""
    return _ScaleGradient.apply(x, factor) if x.requires_grad else x


def rescale_at_exit(x: Tensor, exit_index: int, n_exits: int) -> tuple[Tensor, Tensor]:
    """Split the map that a classifier reads into (for the classifier, for the next block), gradients rescaled.

    With i the exit counted from 0 and N exits, the map receives (g_classifier + (N-i-1) g_next) / (N-i) instead of the
    plain sum, so that its expected size does not grow with the number of exits behind it (gradient rescaling, BoostNet
    arXiv:2211.16726, eq. 7; "gradient equilibrium", arXiv:1908.06294).
    """
    remaining = n_exits - exit_index
    return scale_gradient(x, 1 / remaining), scale_gradient(x, (remaining - 1) / remaining)


def resize_like(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear interpolation of maps x (B, C, H, W) to `size` (H', W'), which is free where they have it."""
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def concatenate(x: Tensor, *others: Tensor) -> Tensor:
    """Maps (B, C, H, W) side by side along the channels, in the memory layout of x, which has more than one channel."""
    if x.stride(1) == 1:
        # The strides of maps of one channel do not tell the layout, batch normalisation returns them as channels-first ones,
        # and a single map of such strides would bring the result, and with it all that follows, into that layout.
        others = tuple(y.squeeze(1).unsqueeze(-1).permute(0, 3, 1, 2) if y.size(1) == 1 else y for y in others)
    return torch.cat([x, *others], dim=1)


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Convolution without bias, batch normalisation, ReLU; "same" padding at stride 1."""
    return [nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class ConvBNReLU(nn.Module):
    """One convolution with its normalisation and activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(*conv_bn_relu(in_channels, out_channels, kernel, stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Bottleneck(nn.Module):
    """3x3 convolution behind an optional 1x1 one that narrows its input to min(in_channels, bn_factor * out_channels)."""

    def __init__(self, in_channels: int, out_channels: int, *, bn_factor: int, stride: int = 1,
                 bottleneck: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if bottleneck:
            inner = min(in_channels, bn_factor * out_channels)
            layers += conv_bn_relu(in_channels, inner, 1)
            in_channels = inner
        self.net = nn.Sequential(*layers, *conv_bn_relu(in_channels, out_channels, 3, stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Stem(nn.Module):
    """First layer of both backbones: the image at every scale, finest first.

    Args:
        widths: channels per scale, finest first.
        strides: stride from scale i-1 to scale i, one less than there are widths.
        kind: "small" (3x3 convolution) or "large" (7x7 convolution with stride 2, then max pooling with stride 2).
    """

    def __init__(self, widths: list[int], strides: list[int], kind: str) -> None:
        super().__init__()
        first: nn.Module = ConvBNReLU(3, widths[0])
        if kind == "large":
            first = nn.Sequential(nn.Conv2d(3, widths[0], 7, stride=2, padding=3), nn.BatchNorm2d(widths[0]),
                                  nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1))
        self.layers = nn.ModuleList([first])
        for in_width, out_width, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            self.layers.append(ConvBNReLU(in_width, out_width, stride=stride))

    def forward(self, x: Tensor) -> list[Tensor]:
        scales = []
        for layer in self.layers:
            x = layer(x)
            scales.append(x)
        return scales


class Classifier(nn.Module):
    """Two 3x3 convolutions with stride 2, average pooling and a linear layer.

    The convolutions have 128 channels behind a small first layer and keep the width of their input behind a large one. They make
    a 2x2 map of the 8x8 or 7x7 one of the paper's networks; for images of other sizes the mean is over the whole map.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int, stem: str) -> None:
        super().__init__()
        width = 128 if stem == "small" else in_channels
        pooling = nn.AvgPool2d(2) if (stem, image_size) in PAPER_MAPS else nn.AdaptiveAvgPool2d(1)
        self.m = nn.Sequential(ConvBNReLU(in_channels, width, stride=2), ConvBNReLU(width, width, stride=2), pooling)
        self.linear = nn.Linear(width, num_classes)

    def pool(self, x: Tensor) -> Tensor:
        """The features (B, width) that the linear layer reads."""
        return self.m(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(x))


def choose_stem(image_size: int, stem: str | None) -> str:
    """The first layer of a network for images of this side; `stem` where it says which.

    Raises:
        ValueError: for images that are too small, or another name than those of `STEMS`.
    """
    if not isinstance(image_size, int) or image_size < LEAST_SIDE:
        raise ValueError(f"image_size is {image_size}; it takes whole numbers of at least {LEAST_SIDE}")
    check_choice("stem", stem or stem_for(image_size), tuple(STEMS))
    return stem or stem_for(image_size)


def finest_side(image_size: int, stem: str) -> int:
    """Side of the finest map that the first layer makes."""
    return halved(halved(image_size)) if stem == "large" else image_size


def halved(side: int) -> int:
    """Side of the map that a layer with stride 2 makes of one of `side`."""
    return (side + 1) // 2


def check_map(side: int, image_size: int, stem: str, place: str, remedy: str) -> None:
    """Raise ValueError for a map of `side` that is too small for a classifier.

    Args:
        place: where the map is, in words, for the message.
        remedy: keywords to change.
    """
    if side < LEAST_MAP:
        others = " or stem small" if stem == "large" else ""
        raise ValueError(f"{place} of {image_size}-pixel images with stem {stem} end in a {side}x{side} map, which classifiers "
                         f"cannot halve twice; give {remedy}, or a larger image_size{others}")


def check_positive(**values: int | list[int]) -> None:
    """Raise ValueError, naming it, for a value (or a list with one) that is not a whole number of at least 1."""
    for name, value in values.items():
        entries = value if isinstance(value, list) else [value]
        if not entries or not all(isinstance(entry, int) and entry >= 1 for entry in entries):
            raise ValueError(f"{name} is {value}; it takes whole numbers of at least 1")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError, naming it, for a value that is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
