"""Building blocks that MSDNet and RANet share.

Attribute names (`net`, `m`, `linear`, `layers`) are part of the checkpoint format: files of the released projects of this
family load by name, so they stay as they are.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    if x.shape[2:] == size:
        return x
    resized = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    # The gradient is a slice of that of a concatenation. For slices in channels-last layout PyTorch's backward pass goes
    # through the other layout, on the way in and on the way out.
    return _DenseGradient.apply(resized) if resized.requires_grad else resized


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
    """3x3 convolution behind an optional 1x1 one that narrows its input to min(in_channels, bn_factor * out_channels).

    Attributes:
        joins: the 1x1 convolution may run together with others. False where the gradient may not reach all of them: together
            each gets one, which is zero in place of None for those left out, and optimisers shrink such weights.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bn_factor: int, stride: int = 1,
                 bottleneck: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if bottleneck:
            inner = min(in_channels, bn_factor * out_channels)
            layers += conv_bn_relu(in_channels, inner, 1)
            in_channels = inner
        self.net = nn.Sequential(*layers, *conv_bn_relu(in_channels, out_channels, 3, stride))
        self.joins = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    @property
    def is_joinable(self) -> bool:
        """Whether `run_bottlenecks` may run the 1x1 convolution together with others: if it `joins`, and its normalisation is
        plain BatchNorm2d in training mode."""
        norm = self.net[1]
        return self.joins and type(norm) is nn.BatchNorm2d and norm.training

    def after_first(self, x: Tensor) -> Tensor:
        """What follows the 1x1 convolution with its normalisation and ReLU."""
        for layer in list(self.net)[3:]:
            x = layer(x)
        return x


def run_bottlenecks(bottlenecks: Sequence[Bottleneck], x: Tensor) -> list[Tensor]:
    """Outputs of bottlenecks that read the same map x.

    In training their 1x1 convolutions, with normalisation and ReLU, run as a single wide one: such a convolution costs mostly
    the reading of its input and the writing of its input's gradient. The results are those of each bottleneck by itself to
    rounding. By itself each one runs where one of them is not joinable, so always in evaluation.
    """
    as_product = x.is_cpu and x.is_contiguous()   # of a convolution, oneDNN would first bring the map into a layout of its own
    if not all(b.is_joinable for b in bottlenecks) or (len(bottlenecks) == 1 and not as_product):
        return [b(x) for b in bottlenecks]
    convs, norms = zip(*((b.net[0], b.net[1]) for b in bottlenecks))
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
                             [part for parts in zip(mean.split(widths), var.split(widths), strict=True) for part in parts])
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    parts = [F.relu(part) for part in y.split(widths, dim=1)]   # out of place: a slice is not dense, what follows wants it so
    return [b.after_first(part) for b, part in zip(bottlenecks, parts, strict=True)]


def run_separately(module: nn.Module) -> None:
    """Have `run_bottlenecks` run every bottleneck in `module` by itself from now on."""
    for part in module.modules():
        if isinstance(part, Bottleneck):
            part.joins = False


class Stem(nn.Module):
    """First layer of both backbones: the image at every scale, finest first.

    Args:
        widths: channels per scale, finest first.
        strides: stride from scale i-1 to scale i, one less than there are widths.
        image_size: 32 (3x3 convolution) or 224 (7x7 convolution with stride 2, then max pooling with stride 2).
    """

    def __init__(self, widths: list[int], strides: list[int], image_size: int) -> None:
        super().__init__()
        first: nn.Module = ConvBNReLU(3, widths[0])
        if image_size == 224:
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
    """Two 3x3 convolutions with stride 2, average pooling and a linear layer, on an 8x8 or 7x7 map.

    The convolutions have 128 channels for 32-pixel images and keep the width of their input for 224-pixel ones.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        width = 128 if image_size == 32 else in_channels
        self.m = nn.Sequential(ConvBNReLU(in_channels, width, stride=2), ConvBNReLU(width, width, stride=2), nn.AvgPool2d(2))
        self.linear = nn.Linear(width, num_classes)

    def pool(self, x: Tensor) -> Tensor:
        """The features (B, width) that the linear layer reads."""
        return self.m(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(x))


def all_exits(backbone: nn.Module, x: Tensor) -> list[Tensor]:
    """Raw logits (B, num_classes) of every exit: all steps of a backbone, one after the other."""
    state, logits = backbone.start(x), []
    for n in range(backbone.n_exits):
        exit_logits, state = backbone.step(n, state)
        logits.append(exit_logits)
    return logits


def map_sizes(image_size: int) -> tuple[int, int]:
    """Sides of the first layer's finest map and of the map that a classifier reads.

    Raises:
        ValueError: for an image size the networks are not defined for.
    """
    if image_size not in (32, 224):
        raise ValueError(f"image_size is {image_size}; the networks are defined for 32 and 224")
    return (32, 8) if image_size == 32 else (56, 7)


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
