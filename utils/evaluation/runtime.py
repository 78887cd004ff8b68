"""What runs a trained network with early exit: PyTorch in its form for inference, or ONNX Runtime."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from models import BoostedNet
from utils.core.errors import UserError
from utils.core.log import echo
from utils.evaluation.confidence import MEASURES, Measure
from utils.evaluation.early_exit import EarlyExit, Exits
from utils.evaluation.fast_form import exit_times, prepare_for_inference
from utils.evaluation.onnx_exit import OnnxEarlyExit, OnnxPrograms, use_all_cores
from utils.evaluation.programs import ABOUT, write_folder
from utils.runs.checkpoint import hash_weights


class Runtime(Protocol):
    """A network ready for early exit.

    Attributes:
        network: gives F_n of every exit for images that all stay to the end.
        measure: turns F_n into what is held against the thresholds.
    """

    network: nn.Module
    measure: Measure

    def early_exit(self, thresholds: np.ndarray, calibration: Sequence[float] | None = None) -> Callable[[Tensor], Exits]:
        """A function from images (B, 3, H, W) to class, confidence and exit of each."""

    def exit_times(self, images: Tensor) -> np.ndarray:
        """(n_exits,) seconds of every step on a batch that no image leaves."""


class TorchRuntime:
    """A form of the network for inference, see `prepare_for_inference`."""

    def __init__(self, model: BoostedNet, policy: str = "confidence", form: str | None = None) -> None:
        self.network, self.measure = prepare_for_inference(model, form), MEASURES[policy]

    def early_exit(self, thresholds: np.ndarray, calibration: Sequence[float] | None = None) -> Callable[[Tensor], Exits]:
        return EarlyExit(self.network, thresholds, measure=self.measure, calibration=calibration)

    def exit_times(self, images: Tensor) -> np.ndarray:
        return exit_times(self.network, images)


class OnnxRuntime:
    """Its ONNX programs."""

    def __init__(self, programs: OnnxPrograms, policy: str = "confidence") -> None:
        self.programs, self.policy = programs, policy
        self.network, self.measure = _AllExits(programs), MEASURES[policy]

    def early_exit(self, thresholds: np.ndarray, calibration: Sequence[float] | None = None) -> Callable[[Tensor], Exits]:
        early_exit = OnnxEarlyExit(self.programs, thresholds, measure=self.policy, calibration=calibration)
        return lambda images: Exits(*map(torch.from_numpy, early_exit(images.numpy())))

    def exit_times(self, images: Tensor) -> np.ndarray:
        clock, state = [time.perf_counter()], [images.numpy()]
        for n in range(self.programs.n_exits):
            state = self.programs.step(n, state)
            clock.append(time.perf_counter())
        return np.diff(clock)


class _AllExits(nn.Module):
    """Programs as a network whose images all stay to the end."""

    def __init__(self, programs: OnnxPrograms) -> None:
        super().__init__()
        self.programs, self.n_exits = programs, programs.n_exits
        self.device = nn.Parameter(torch.empty(0), requires_grad=False)   # a network says by its parameters where it is

    def forward(self, images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(scores) for scores in self.programs.scores(images.numpy())]


def open_runtime(name: str, model: BoostedNet, saved: dict[str, Any], folder: Path, policy: str = "confidence") -> Runtime:
    """The runtime of that name for a network.

    Args:
        name: "torch" or "onnx".
        model: reads its exits as they are to be read.
        saved: content of its checkpoint.
        folder: of the checkpoint. ONNX programs are written there once, under a name made of the weights and of how the exits
            are read.
    Raises:
        UserError: where ONNX is asked for and its packages are missing, or the network is on another device than the CPU.
    """
    if name == "torch":
        return TorchRuntime(model, policy)
    if next(model.parameters()).device.type != "cpu":
        raise UserError("--runtime onnx runs on the CPU here; pass --device cpu")
    use_all_cores(torch.get_num_threads())
    programs = folder / f"onnx_{hash_weights(saved['state_dict'])[:16]}_{_reading(model)}"
    if not (programs / ABOUT).is_file():
        echo(f"exporting {model.n_exits} exits to {programs}, once")
        for _ in write_folder(model, saved, [], programs, "onnx"):
            pass
    return OnnxRuntime(OnnxPrograms(programs), policy)


def _reading(model: BoostedNet) -> str:
    """How the exits are read, as part of a folder's name: another one for other temperatures of any exit."""
    temperatures = model.temperatures if len(set(model.temperatures)) > 1 else model.temperatures[:1]
    return "_".join([type(model).__name__.lower(), *(f"{t:.12g}" for t in temperatures)])
