"""Block-dependent losses: an exit trains only the last few of the blocks in front of it."""
from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from utils.methods.distillation import Distillation


class _Pass(NamedTuple):
    """What the backward pass needs of one block: leaves that entered it, logits, and tensors that it handed on."""

    inputs: list[Tensor]
    logits: Tensor
    outputs: list[Tensor]


class BlockLosses(Distillation):
    """Block-dependent losses (TNNLS 2023): the loss of exit n stops at the features that enter block `first_blocks[n]`.

    One forward pass, cut between the blocks, serves all exits, and batch-norm statistics are updated once. The backward pass runs
    through a block once for each different place where the losses that reach it will stop: once without overlap, w times with
    an overlap of w blocks.

    A block is what one step of the backbone runs. In RANet the first one includes the whole input pyramid, and a later one reads
    the coarser sub-network's features as constants where its loss stops. Gradient rescaling (`_ge`) keeps its factors, which
    count all exits behind a block, also those whose loss never comes there.

    Args:
        groups: sizes of groups of blocks; the loss of an exit trains the blocks of its own group up to its own. Their sum is
            the number of exits.
        overlap: instead of groups, the number of blocks that a loss trains, its own the last of them; 1 is local error.
        include_final: with overlap, the loss of the last exit trains all blocks.
    Raises:
        ValueError: when groups or overlap do not fit the network.
    """

    def __init__(self, *args: Any, groups: list[int] | None = None, overlap: int | None = None, include_final: bool = False,
                 **options: Any) -> None:
        super().__init__(*args, **options)
        n_exits = self.model.n_exits
        if groups is not None:
            if sum(groups) != n_exits:
                raise ValueError(f"groups of {groups} blocks make {sum(groups)}, the network has {n_exits}")
            self.first_blocks = [sum(groups[:i]) for i, size in enumerate(groups) for _ in range(size)]
        elif overlap is not None and overlap >= 1:
            self.first_blocks = [max(0, n - overlap + 1) for n in range(n_exits)]
        else:
            raise ValueError(f"give groups, or an overlap of at least 1 block; got {groups} and {overlap}")
        if include_final:
            self.first_blocks[-1] = 0
        self._passes: list[_Pass] = []
        self._leaves: list[Tensor] = []   # logits as the loss sees them: its gradient is picked up here and routed

    @classmethod
    def options(cls, args: argparse.Namespace) -> dict[str, Any]:
        return super().options(args) | {"groups": args.groups, "overlap": args.overlap, "include_final": args.include_final}

    def predict(self, images: Tensor) -> list[Tensor]:
        backbone, state = self.model.backbone, self.model.backbone.start(images)
        self._passes = []
        for n in range(backbone.n_exits):
            inputs, form = tree_flatten(state)
            if n > 0:
                inputs = [x.detach().requires_grad_() for x in inputs]
            logits, state = backbone.step(n, tree_unflatten(inputs, form))
            self._passes.append(_Pass(inputs, logits, tree_leaves(state)))
        self._leaves = [block.logits.detach().requires_grad_() for block in self._passes]
        return self._leaves

    def backward(self, total: Tensor) -> None:
        total.backward()
        # Gradients of what the block at hand has handed on, by the block where the losses they come from stop.
        arriving: dict[int, list[Tensor | None]] = {}
        for n in reversed(range(len(self._passes))):
            block, own, leaving = self._passes[n], self.first_blocks[n], {}
            ends = sorted({own, *arriving})
            for end in ends:
                flows = [(out, grad) for out, grad in zip(block.outputs, arriving.get(end, [])) if grad is not None]
                if end == own:
                    flows.append((block.logits, self._leaves[n].grad))
                roots, gradients = zip(*flows)
                torch.autograd.backward(roots, gradients, retain_graph=end != ends[-1])
                if end < n:
                    leaving[end] = [leaf.grad for leaf in block.inputs]
                for leaf in block.inputs:
                    leaf.grad = None
            arriving = leaving
        self._passes, self._leaves = [], []
