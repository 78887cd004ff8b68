"""The machine a run is on: which device computes, and what the figures of a run depend on besides its flags."""
from __future__ import annotations

import platform
import subprocess
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
