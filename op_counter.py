"""Multiply-adds (MACs) and parameters up to every exit, counted as the papers of this family count them."""
from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn


def measure_model(model: nn.Module, height: int, width: int) -> tuple[list[int], list[int]]:
    """Cumulative MACs and parameters at every exit for one image.

    Convolutions and linear layers cost their multiply-adds (a linear layer its bias too), ReLU one per element, pooling the
    kernel area per output element; convolution biases, normalisation, concatenation and interpolation are free. The count
    runs in execution order, so an exit includes the classifiers in front of it.

    Args:
        model: a backbone with `start` and `step`, or a BoostedNet around one. It is left as it is: the count runs on a
            copy without storage.
        height, width: of the image, in pixels.
    Returns:
        (macs, params), two lists of n_exits ints.
    """
    # A copy on the meta device has shapes but no storage: nothing of the model can change, and nothing is computed.
    backbone = copy.deepcopy(getattr(model, "backbone", model)).to("meta").eval()
    totals = {"macs": 0, "params": 0}
    for module in backbone.modules():
        if not any(module.children()):
            module.register_forward_hook(partial(_count, totals))
    macs, params = [], []
    dtype = next(backbone.parameters()).dtype
    with torch.no_grad():
        state = backbone.start(torch.empty(1, 3, height, width, device="meta", dtype=dtype))
        for n in range(backbone.n_exits):
            _, state = backbone.step(n, state)
            macs.append(totals["macs"])
            params.append(totals["params"])
    return macs, params


def _count(totals: dict[str, int], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    totals["macs"] += _macs(module, inputs[0], output)
    totals["params"] += sum(p.numel() for p in module.parameters())


def _macs(module: nn.Module, x: Tensor, output: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        return output.numel() * (module.in_channels // module.groups) * module.kernel_size[0] * module.kernel_size[1]
    if isinstance(module, nn.Linear):
        return (module.in_features + 1) * module.out_features
    if isinstance(module, nn.ReLU):
        return output.numel()
    if isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
        kernel = module.kernel_size
        return output.numel() * (kernel * kernel if isinstance(kernel, int) else kernel[0] * kernel[1])
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return x.numel()   # its windows cover the map
    return 0
