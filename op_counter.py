"""Multiply-adds (MACs) and parameters up to every exit, counted as the papers of this family count them."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def measure_model(model: nn.Module, height: int, width: int) -> tuple[list[int], list[int]]:
    """Cumulative MACs and parameters at every exit for one image.

    Convolutions and matrix products cost their multiply-adds (a linear layer its bias too), ReLU one per element, pooling the
    kernel area per output element (for a mean over the whole map that is the map's area); convolution biases, normalisation,
    other activations, concatenation and interpolation are free. The count runs in execution order, so an exit includes the
    classifiers in front of it. Operations are counted wherever they come from, a module or a function; a parameter counts
    where it is first read.

    Args:
        model: a backbone with `start` and `step`, or a BoostedNet around one. It is left as it is: the count runs on a copy.
        height, width: of the image, in pixels.
    Returns:
        (macs, params), two lists of n_exits ints.
    """
    backbone = getattr(model, "backbone", model)
    try:   # on the meta device there are shapes but no storage, and nothing is computed
        return _measure(copy.deepcopy(backbone).to("meta"), height, width)
    except RuntimeError:   # a network that looks at values, or makes tensors on a device of its choice
        return _measure(copy.deepcopy(backbone).cpu(), height, width)


def _measure(backbone: nn.Module, height: int, width: int) -> tuple[list[int], list[int]]:
    like = next(backbone.parameters())
    image = torch.zeros(1, 3, height, width, device=like.device, dtype=like.dtype)
    macs, params = [], []
    with torch.no_grad(), _plain_attention(), _Counter(backbone.eval()) as counter:
        state = backbone.start(image)
        for n in range(backbone.n_exits):
            _, state = backbone.step(n, state)
            macs.append(counter.macs)
            params.append(counter.params)
    return macs, params


class _Counter(TorchDispatchMode):
    """Adds up what the operations cost that run, and the sizes of the network's parameters that they read."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.macs = self.params = 0
        self._unread = {id(parameter): parameter.numel() for parameter in network.parameters()}

    def __torch_dispatch__(self, function, types, args=(), keywords=None):
        output = function(*args, **(keywords or {}))
        self.macs += _macs(function.overloadpacket, args, keywords or {}, output)
        self.params += sum(self._unread.pop(id(tensor), 0) for tensor in tree_leaves((args, keywords)))
        return output


def _macs(operation: Any, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> int:
    if operation in flop_registry:   # convolutions and matrix products, at two operations for a multiply-add
        macs = flop_registry[operation](*args, **keywords, out_val=output) // 2
        return macs + output.numel() if operation == aten.addmm else macs
    if operation in (aten.relu, aten.relu_):
        return output.numel()
    if operation in (aten.avg_pool2d, aten.max_pool2d_with_indices):
        pooled, kernel = output if isinstance(output, Tensor) else output[0], args[1]
        return pooled.numel() * kernel[0] * kernel[-1]
    if operation in (aten.mean, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d):
        return args[0].numel()
    return 0


@contextmanager
def _plain_attention() -> Iterator[None]:
    """While the block runs, attention is the matrix products it is made of, and not one operation of its own."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
