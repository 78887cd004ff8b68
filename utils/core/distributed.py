"""The process group of a run started by torchrun; every helper is a no-op in a single process."""
from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from utils.core.errors import UserError, wait_for_other_errors

# A rank that waits this long for another one gives up; the launcher then ends the job.
TIMEOUT = timedelta(minutes=10)
# Seconds that the others wait for the first process to prepare the data, and from one look to the next.
PATIENCE_S, POLL_S = 24 * 3600, 0.1

# What torchrun puts into the environment of every process, for them to find each other.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

logger = logging.getLogger("boostnet")
T = TypeVar("T")

# Through which the processes of the group tell each other that one has gone first, and how often one has.
_store: dist.Store | None = None
_turns = 0


@contextmanager
def process_group(device: torch.device, backend: str | None = None) -> Iterator[None]:
    """Join the processes that torchrun started, while the block runs; without torchrun's environment there is one process.

    Args:
        device: of this process.
        backend: "nccl" or "gloo"; by default the one that fits the device.
    Raises:
        UserError: for NCCL without GPUs, or where the environment is not torchrun's or leads nowhere.
    """
    if not _was_launched():
        yield
        return
    cuda = device.type == "cuda"
    if backend == "nccl" and not cuda:
        raise UserError("--dist_backend nccl needs GPUs; leave it out to have the one that fits the device")
    try:
        store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
    except (ValueError, dist.DistError) as error:
        place = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES)
        raise UserError(f"the processes of this run cannot find each other with {place}: {str(error).splitlines()[0]}") from error
    # torchrun keeps one store over its restarts, and the addresses of dead processes with it. A machine alone can tell its
    # starts apart by their number; several machines count them differently (docs/imagenet.md, "Two machines").
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if world == local_world_size() else "0"
    global _store
    _store = dist.PrefixStore(f"start{start}", store)
    dist.init_process_group(backend or ("nccl" if cuda else "gloo"), store=_store, rank=rank, world_size=world, timeout=TIMEOUT,
                            device_id=device if cuda else None)
    try:
        yield
    except RuntimeError:   # most likely another process has left, and this is only how it shows here
        # The launcher then ends this one, in which there is no step left to finish and to save.
        before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        wait_for_other_errors()
        signal.signal(signal.SIGTERM, before)
        raise
    # Not after an error: the other processes may never come to this line, and some backends wait for them here.
    dist.destroy_process_group()


def _was_launched() -> bool:
    """Whether this is one of several processes, by torchrun's environment.

    Raises:
        UserError: when there is only a part of that environment.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        _warn_of_copies("start one task per machine, and in it torchrun --nproc_per_node=GPUS ...")
        return False
    if missing:
        raise UserError(f"{' and '.join(name for name in VARIABLES if name not in missing)} in the environment, but not "
                        f"{' and '.join(missing)}: start several processes with torchrun, or unset them for a single one")
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if rank.isdigit() and world.isdigit() and int(rank) >= int(world):   # one that the others wait for, and it for them
        raise UserError(f"RANK={rank} in the environment, but with WORLD_SIZE={world} the processes are numbered from 0 to "
                        f"{int(world) - 1}")
    return True


def _warn_of_copies(advice: str) -> None:
    copies = os.environ.get("SLURM_NTASKS", "1")
    if copies.isdigit() and int(copies) > 1:
        logger.warning("warning: SLURM_NTASKS is %s, but each of these processes runs for itself; to have them share a run, %s",
                       copies, advice)


def refuse_other_processes(program: str) -> None:
    """Refuse to be one of several processes that torchrun started, in a program that runs in one.

    Args:
        program: what runs in several.
    Raises:
        UserError: when the environment speaks of more processes than one.
    """
    several = f"{program} runs in several processes, with --dataset imagenet or folder"
    world = os.environ.get("WORLD_SIZE", "1")
    if world.isdigit() and int(world) > 1:
        raise UserError(f"WORLD_SIZE={world} in the environment, but this program runs in one process: start it without "
                        f"torchrun, or unset the variable; {several}")
    _warn_of_copies(f"use {several}")


def wrap(model: nn.Module, device: torch.device, *, averages: bool = True) -> nn.Module:
    """What to call for the training forward pass in several processes.

    On CUDA, batch normalisation takes its statistics over all processes; `model` itself is converted.

    Args:
        averages: a backward pass through the call averages the gradients over the processes, for which the call has to be the
            only one of the step. Without it `average_gradients` is left to the caller.
    """
    if world_size() == 1:
        return model
    cuda = device.type == "cuda"
    if cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if not averages:
        return model
    # Layers that no exit reads (in networks of some depths) do no harm when they are looked for. Told instead that the graph
    # never changes, DDP would sort gradients into other buckets after its first step. A sum of three or more is rounded by its
    # place in the bucket, and so a resumed run would not have the bits of one that never stopped.
    return DistributedDataParallel(model, device_ids=[device.index] if cuda else None, find_unused_parameters=True)


def is_averaged(network: nn.Module) -> bool:
    """Whether a backward pass through this network averages the gradients (`wrap`)."""
    return isinstance(network, DistributedDataParallel)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their means over the processes, all of which have to call this with the same parameters.

    A gradient that only some processes have is zero in the others. One that none has stays None, so that the optimiser leaves its
    parameter alone. Frozen parameters are passed over.
    """
    if world_size() == 1:
        return
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    missing = [i for i, parameter in enumerate(parameters) if parameter.grad is None]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    owners = gradients[0].new_ones(len(parameters))   # share of the processes that have the gradient
    for i in missing:
        owners[i] = 0
    together = torch.cat([owners, *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(together)
    owners, *means = together.div_(world_size()).split([len(parameters), *map(torch.numel, parameters)])
    # Only where one is missing here does this wait for the device, as DistributedDataParallel does.
    owned = owners.tolist() if missing else [1.0] * len(parameters)
    for parameter, mean, by_any in zip(parameters, means, owned):
        if by_any:
            parameter.grad = mean.view_as(parameter)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """True in the one process that writes files."""
    return rank() == 0


def first_rank_first(read: Callable[[], T]) -> T:
    """`read()` in the first process before all others, who then find a download or a cache in place.

    They wait longer than for a step: to decode a data set on a slow file system may take hours.

    Raises:
        UserError: when it takes longer than PATIENCE_S.
    """
    global _turns
    if world_size() == 1:
        return read()
    _turns += 1
    done = f"turn{_turns}"
    deadline = time.monotonic() + PATIENCE_S
    while rank() > 0 and not _store.check([done]):   # no wait of the store's, which would keep signals waiting as well
        if time.monotonic() > deadline:
            raise UserError(f"the first process has not prepared the data within {PATIENCE_S // 3600} hours")
        time.sleep(POLL_S)
    try:
        return read()
    finally:
        if rank() == 0:
            _store.set(done, "")


def differences(values: dict[str, Any]) -> dict[str, list[Any]]:
    """Those of the named values that are not the same in all processes, each with the values of all; the same answer for all."""
    if world_size() == 1:
        return {}
    everywhere: list[dict[str, Any]] = [{}] * world_size()
    dist.all_gather_object(everywhere, values)
    of_all = {name: [one.get(name) for one in everywhere] for name in dict.fromkeys(name for one in everywhere for name in one)}
    return {name: found for name, found in of_all.items() if any(value != found[0] for value in found)}


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first one.

    Without SyncBatchNorm every process has statistics of its own, and only the first one's are saved and worth evaluating.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of x over all processes, in every process; x itself is left alone."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def all_gather(x: Tensor) -> Tensor:
    """The x of each process (shape (...)) as one tensor (world_size, ...), in every process."""
    if world_size() == 1:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)


def gather_samples(x: Tensor, index: Tensor) -> Tensor:
    """Columns of all processes put in order, in every process.

    Args:
        x: (rows, n) of this process, on the device that its backend works on.
        index: (n,) int64, the position of each column in the whole.
    Returns:
        (rows, total) of the columns of all processes, by rising position.
    """
    if world_size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([x.shape[1]], device=x.device))
    longest = int(max(count.item() for count in counts))
    parts = []
    for values in (x, index.to(x.device)[None]):
        padded = values.new_zeros(values.shape[0], longest)
        padded[:, :values.shape[1]] = values
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        parts.append(torch.cat([g[:, :count] for g, count in zip(gathered, counts)], dim=1))
    return parts[0][:, parts[1][0].argsort()]


def any_rank(flag: bool | Tensor) -> bool:
    """Whether `flag` is true in any process; all of them get the same answer. To be called by all of them."""
    if world_size() == 1:
        return bool(flag)
    return all_reduce_sum(torch.tensor(int(flag), device=_collective_device())).item() > 0


def _collective_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def was_restarted() -> bool:
    """Whether torchrun has started the processes of this job before."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def job() -> str | None:
    """What torchrun calls this job, through all its restarts; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def local_rank() -> int:
    """Index of this process on its machine, from torchrun's environment."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Number of processes on this machine, from torchrun's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
