"""The process group of a run started by torchrun; every helper is a no-op in a single process."""
from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """True in the one process that writes files."""
    return rank() == 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of x over all processes, in every process; x itself is left alone."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def local_rank() -> int:
    """Index of this process on its machine, from torchrun's environment."""
    return int(os.environ.get("LOCAL_RANK", 0))
