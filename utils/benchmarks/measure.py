"""Repeated timings and how they are reported."""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from utils.cli import whole


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


def time_calls(function: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, ...]:
    """Seconds of each of `repeats` calls, after one call that is not timed; on a GPU, until its work is done."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    function()
    seconds = []
    for _ in range(repeats):
        finish()
        start = time.perf_counter()
        function()
        finish()
        seconds.append(time.perf_counter() - start)
    return tuple(seconds)
