"""Reference vectors computed in float64 with the released implementation, and the recipe of their weights and inputs."""
from __future__ import annotations

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


def load(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text())


def fill(model: nn.Module) -> nn.Module:
    """Convert to float64 and fill every state_dict entry from a generator seeded by its name alone."""
    model.double()
    for name, tensor in model.state_dict().items():
        rng = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
        shape = tuple(tensor.shape)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_mean"):
            value = 0.1 * rng.standard_normal(shape)
        elif name.endswith("running_var"):
            value = 1 + 0.2 * rng.random_sample(shape)
        elif name.endswith("bias"):
            value = 0.1 * rng.standard_normal(shape)
        elif len(shape) == 4:
            value = rng.standard_normal(shape) * np.sqrt(2 / (shape[2] * shape[3] * shape[0]))
        elif len(shape) == 2:
            value = rng.standard_normal(shape) * 0.05
        else:
            value = 1 + 0.1 * rng.standard_normal(shape)
        tensor.copy_(torch.as_tensor(value))
    return model


def images(batch: int, side: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(7).standard_normal((batch, 3, side, side)))


def targets(batch: int, num_classes: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(8).randint(0, num_classes, batch))


def sum_l2(tensors) -> SimpleNamespace:
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    return SimpleNamespace(sum=flat.sum().item(), l2=flat.norm().item())


def assert_logits(got: Tensor, want: dict, tolerance: float = 1e-9) -> None:
    """Compare one stored logit tensor; deviations are relative to the tensor's norm."""
    scale = want["l2"]
    stats = sum_l2([got])
    assert abs(stats.sum - want["sum"]) <= tolerance * scale * got.numel() ** 0.5
    assert abs(stats.l2 - want["l2"]) <= tolerance * scale
    deviation = (got[:, :8] - torch.tensor(want["first8"], dtype=torch.float64)).abs().max().item()
    assert deviation <= tolerance * scale
