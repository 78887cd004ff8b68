"""Repeated timings and how they are reported."""
from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.core.machine import resident_bytes
from utils.options.parser import whole


@dataclass(frozen=True)
class Measurement:
    """Repeated measurements of one thing.

    Attributes:
        name: what was measured.
        samples: one value per repeat.
        unit: of the values.
        config: the settings they depend on.
        details: further results that belong to it.
    """

    name: str
    samples: tuple[float, ...]
    unit: str = "s"
    config: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        p10, median, p90 = np.percentile(self.samples, [10, 50, 90]).tolist()
        return {"name": self.name, "config": self.config, "value": median, "unit": self.unit,
                "median": median, "p10": p10, "p90": p90, "n": len(self.samples), **self.details}


def count(text: str) -> int:
    """Converter for flags that count something."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


Clock = Callable[[], float]


def training_clock(device: torch.device) -> tuple[Clock, str]:
    """What to time training steps with, and its name.

    With one CPU thread that is the processor's time of this process, which on an idle machine equals wall time and leaves out
    what other work on a busy one takes away; otherwise wall time.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time, "CPU time"
    return time.perf_counter, "wall time"


def time_calls(function: Callable[[], Any], repeats: int, device: torch.device,
               clock: Clock = time.perf_counter) -> tuple[float, ...]:
    """Seconds of each of `repeats` calls, after one call that is not timed; on a GPU, until its work is done."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    function()
    seconds = []
    for _ in range(repeats):
        finish()
        start = clock()
        function()
        finish()
        seconds.append(clock() - start)
    return tuple(seconds)


def peak_memory(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which one call exceeds what is in use before it: of the GPU, on Linux else of this process, None elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)   # what earlier calls left in the allocator's hands would hide a part
        Path("/proc/self/clear_refs").write_text("5")   # resets the peak, see proc(5)
    except (OSError, AttributeError):
        return None
    before = resident_bytes("VmRSS")
    function()
    return resident_bytes("VmHWM") - before
