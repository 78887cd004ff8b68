"""Processes that prepare images: a pool for whole data sets, and memory in which loaders leave their batches."""
from __future__ import annotations

import itertools
import math
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.reduction import DupFd
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from utils.core.cores import usable_cores
from utils.core.errors import WorkerKilled
from utils.core.machine import lacks_semaphores
from utils.core.signals import held_back, leave_signals_to_parent

POOL_SEMAPHORES = 16   # more than a pool of processes takes


def in_parallel(function: Callable[[Any], Any], tasks: list) -> Iterator[Any]:
    """Results of `function(task)` in the order of `tasks`, by one process per core where processes can be forked.

    Forked workers start at once and need nothing imported; elsewhere, for few tasks and without room in /dev/shm for what keeps
    their queues in order, the work is done here.

    Raises:
        WorkerKilled: when one of the processes is ended from outside.
    """
    n_workers = min(usable_cores(), len(tasks))
    if n_workers < 2 or sys.platform != "linux" or lacks_semaphores(POOL_SEMAPHORES):
        yield from map(function, tasks)
        return
    others = active_children()
    pool = ProcessPoolExecutor(n_workers, mp_context=get_context("fork"), initializer=_prepare_worker)
    try:
        with held_back():   # the processes start here, and must know what to do with a signal before they get one
            results = pool.map(function, tasks)
        yield from results
    except BaseException as error:   # a signal, a task that failed, or too few open files to start all processes
        for process in set(active_children()) - set(others):
            process.terminate()   # nobody needs its result, or would end it
        if isinstance(error, BrokenProcessPool):
            raise WorkerKilled("a process that prepares images was killed, most likely because memory ran out; start again with "
                               "more memory, or on fewer cores (taskset)") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    leave_signals_to_parent(first_sigterm=False)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Because nothing else tells a waiting process that its parent was killed."""
    parent_process().join()
    os._exit(1)


class SharedBatches:
    """Memory for some batches of bytes, which worker processes fill and this process reads.

    It has no name in the file system. PyTorch's own way to send tensors takes its memory from /dev/shm, of which a container
    often has no more than 64 MB.

    Args:
        n: batches that there is room for.
        shape: of the largest batch.
    """

    _numbers = itertools.count()
    _open: WeakValueDictionary[int, SharedBatches] = WeakValueDictionary()

    def __init__(self, n: int, shape: Sequence[int]) -> None:
        self.number = next(self._numbers)
        self._open[self.number] = self
        self._map(_nameless_file(), (n, *shape))

    def _map(self, descriptor: int, shape: Sequence[int]) -> None:
        n_bytes = math.prod(shape)
        self._file = os.fdopen(descriptor, "r+b")
        self._file.truncate(n_bytes)
        self.arrays = np.frombuffer(mmap.mmap(descriptor, n_bytes), np.uint8).reshape(shape)

    def __getstate__(self) -> tuple:
        """For a worker that does not begin as a copy of this process."""
        return self.number, DupFd(self._file.fileno()), self.arrays.shape

    def __setstate__(self, state: tuple) -> None:
        self.number, descriptor, shape = state
        self._map(descriptor.detach(), shape)


def _nameless_file() -> int:
    """Descriptor of an empty file, in memory where the system knows such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batches")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class InSharedBatch:
    """What a worker sends in place of the first `n` images of batch `slot`; arrives as their tensor."""

    def __init__(self, batches: SharedBatches, slot: int, n: int) -> None:
        self._place = batches.number, slot, n

    def __reduce__(self) -> tuple:
        return _view, self._place


def _view(number: int, slot: int, n: int) -> Tensor:
    return torch.from_numpy(SharedBatches._open[number].arrays[slot, :n])
