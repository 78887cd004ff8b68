"""The machine a run is on: which device computes, and what the figures of a run depend on besides its flags."""
from __future__ import annotations

import multiprocessing
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from utils.core import distributed
from utils.core.errors import UserError


def versions(device: torch.device) -> dict[str, Any]:
    """What the figures of a run depend on besides its flags."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "platform": platform.platform(),
            "device": device_name(device),
            "threads": torch.get_num_threads(), "commit": _commit()}


def device_name(device: torch.device) -> str:
    """Model of the GPU or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """Model of the processor as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def require_open_files(workers: int) -> None:
    """Make sure that this process may have the files open that it needs with so many workers.

    Where too few may be, a data loader waits for ever for workers that it could not start.

    Raises:
        UserError: when the system's limit is too low and cannot be raised from here.
    """
    needed = 64 + 8 * workers   # about 40 without, and the pipes of each worker
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = [limit == resource.RLIM_INFINITY or limit >= needed for limit in (soft, hard)]
    if enough[0]:
        return
    if not enough[1]:
        raise UserError(f"this process may have {hard} files open at once and needs {needed} with {workers} workers; raise the "
                        f"limit with `ulimit -n {needed}`, or pass lower --workers and --val_workers")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def lacks_semaphores(needed: int) -> str | None:
    """Why the system does not give so many semaphores; None where it does.

    Queues between processes take a few each, and Linux keeps each on a page of /dev/shm.
    """
    try:
        held = [multiprocessing.Semaphore() for _ in range(needed)]
        del held
    except OSError as error:
        return error.strerror
    return None


def require_semaphores(workers: int) -> None:
    """Make sure that a data loader can start so many workers.

    Raises:
        UserError: when there is no room for what they need in /dev/shm, where everything else of theirs stays out of it.
    """
    if reason := lacks_semaphores(16 + 4 * workers):
        raise UserError(f"{workers} workers cannot be started: no room for their semaphores in /dev/shm ({reason}); mount it "
                        "writable, with 1 MB or more (docker run --shm-size 64m), or pass --workers 0 --val_workers 0")


def resident_bytes(field: str) -> int:
    """Memory of this process that Linux has in /proc/self/status: VmRSS is resident now, VmHWM was the most at one time.

    Raises:
        OSError: on a system without that file.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most memory that this process has had at one time, as results.json has it: resident, and PyTorch's tensors on the GPU
    (0 without one).
    """
    try:   # what getrusage says begins with the memory of the process that started this one
        resident = resident_bytes("VmHWM")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resident = peak if sys.platform == "darwin" else 1024 * peak
    return {"peak_rss_bytes": resident,
            "peak_cuda_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0}


def choose_device(name: str, gpu: str, threads: int | None = None) -> torch.device:
    """Device of this process: "auto" takes CUDA where there is one; the process' local rank picks from the list `gpu`.

    A GPU becomes the current device of CUDA. `threads` bounds the CPU threads of this process.

    Raises:
        UserError: when CUDA is asked for and missing, or the list names a device that is not there.
    """
    if threads:
        torch.set_num_threads(threads)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; pass --device cpu")
    listed = [int(index) for index in gpu.split(",")]
    processes = distributed.local_world_size()
    if len(listed) < processes:
        raise UserError(f"--gpu {gpu} is too few for {processes} processes on this machine; name one device each, such as "
                        f"--gpu {','.join(map(str, range(processes)))}")
    index = listed[distributed.local_rank()]
    if index >= torch.cuda.device_count():
        raise UserError(f"--gpu {gpu}: there is no device {index}; torch sees {torch.cuda.device_count()}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)   # what names no device, such as a captured graph or a figure of memory, means this one
    return device
