"""Batch normalisation as part of the convolutions in front of it, in any network, for inference."""
from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# Largest change of a logit by rounding, in parts of the largest one.
TOLERANCE = 1e-4

logger = logging.getLogger("boostnet")


@torch.no_grad()
def fold_batch_norm(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy of a network in eval mode in which each batch normalisation that alone reads a convolution's output is part of it.

    Which ones these are shows in one forward pass, not in their names or their order in the network. Others stay as they are. The
    copy is compared with the network; should it answer otherwise, there is a warning, and the network itself is returned.

    Args:
        network: images (B, 3, H, W) to a list of logits.
        images: a few of them.
    """
    pairs, expected = _pairs(network, images)
    copied: dict[int, nn.Module] = {}
    folded = copy.deepcopy(network, copied)
    merged = {}
    for conv, norm in pairs:
        target = copied[id(conv)]
        target.weight, target.bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
                                                          norm.weight, norm.bias)
        merged[copied[id(norm)]] = nn.Identity()
    for parent in list(folded.modules()):
        for name, child in parent.named_children():
            if child in merged:
                setattr(parent, name, merged[child])
    for logits, wanted in zip(folded(images), expected, strict=True):
        change = (logits - wanted).abs().max() / wanted.abs().max()
        if change > TOLERANCE:   # not where there are NaNs in both
            logger.warning("batch normalisation of %s is not merged into its convolutions, because that changes a logit by %.1e "
                           "of the largest", type(network).__name__, change)
            return network
    return folded


def _pairs(network: nn.Module, images: Tensor) -> tuple[list[tuple[nn.Conv2d, nn.Module]], list[Tensor]]:
    """Convolutions with the normalisation that alone reads their output, and the network's logits."""
    with _Readers(network) as readers:
        logits = list(network(images))
    return readers.only_readers(logits), logits


class _Readers(TorchDispatchMode):
    """Follows the outputs of a network's convolutions while the block runs: which normalisations and what else reads them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._made: dict[int, tuple[Tensor, nn.Conv2d]] = {}   # by identity of the output, which is kept so that it stays unique
        self._read_by: dict[nn.Conv2d, list[nn.Module | None]] = {}   # for each reading, the normalisation that was running
        self._running: nn.Module | None = None
        self._calls: dict[nn.Module, int] = {}
        self._hooks = []
        for module in network.modules():
            if type(module) is nn.Conv2d and not _has_hooks(module):   # a subclass may make something else of its weights
                self._hooks.append(module.register_forward_hook(self._note_output))
            elif type(module) in NORMS and module.running_mean is not None and not _has_hooks(module):
                self._hooks += [module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end)]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, function, types, args=(), keywords=None):
        self._note_reading((args, keywords))
        return function(*args, **(keywords or {}))

    def only_readers(self, returned: list[Tensor]) -> list[tuple[nn.Conv2d, nn.Module]]:
        """Convolutions with their normalisation, where nothing else reads the output, which is not `returned` either."""
        self._note_reading(returned)
        return [(conv, readers[0]) for conv, readers in self._read_by.items()
                if len(readers) == 1 and readers[0] is not None and self._calls[conv] == self._calls[readers[0]] == 1]

    def _note_reading(self, arguments: object) -> None:
        for value in tree_leaves(arguments):
            if id(value) in self._made:
                self._read_by[self._made[id(value)][1]].append(self._running)

    def _note_output(self, conv: nn.Conv2d, inputs: object, output: Tensor) -> None:
        self._made[id(output)] = output, conv
        self._read_by.setdefault(conv, [])
        self._calls[conv] = self._calls.get(conv, 0) + 1

    def _begin(self, norm: nn.Module, inputs: object) -> None:
        self._running = norm
        self._calls[norm] = self._calls.get(norm, 0) + 1

    def _end(self, norm: nn.Module, inputs: object, output: Tensor) -> None:
        self._running = None


def _has_hooks(module: nn.Module) -> bool:
    """Whether more happens in a call of the module than its own forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
