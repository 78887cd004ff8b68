"""From a trained network to a copy of it that answers fast."""
from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import Backbone, BoostedNet
from models.folding import fold_batch_norm
from models.inference import growing_form, has_growing_form
from utils.core.errors import UserError
from utils.options.catalog import is_cropped
from utils.options.network import NetworkSpec, stem_of
from utils.runs import checkpoint
from utils.runs.restore import require_same_hold_out, restore, warn_of_changed_file

FORMS = ("growing", "folded", "compiled")


def load_model(path: str | Path, *, backbone: nn.Module | None = None,
               arch: str | None = None) -> tuple[BoostedNet, dict[str, Any]]:
    """The network of a checkpoint of this project, in eval mode, and the content of the file.

    Args:
        backbone: to put the weights into, in place of the network that the file names. A network of one's own takes this or
            `arch`, because a checkpoint never runs code by itself.
        arch: --arch FILE.py:FUNCTION as an `OwnNetwork`; another name has to be the one in the file.
    Raises:
        UserError: when the file does not say what network it holds, or its weights do not fit the one that is given.
    """
    saved = checkpoint.load(path)
    spec = NetworkSpec.from_checkpoint(saved, path)
    warn_of_changed_file(arch, spec, path)
    return restore(spec.made_by(arch, path), saved, path, backbone).eval(), saved


def load_teacher(path: str | Path, data, arch: str | None = None) -> BoostedNet:
    """The network of a checkpoint, to learn from on `data`.

    Args:
        arch: of the network that learns; where it is a person's own, the teacher may be of the same file and function.
    Raises:
        UserError: when it is of other classes or images read otherwise, or may have seen the images that are held out.
    """
    saved = checkpoint.load(path)
    spec = NetworkSpec.from_checkpoint(saved, path)
    warn_of_changed_file(arch, spec, path)
    model = restore(replace(spec, arch=arch) if spec.arch == arch else spec, saved, path).eval()
    if saved["class_names"] != data.class_names:
        raise UserError(f"{path} was trained on other classes than those of this data set")
    architecture = saved["architecture"]
    side = architecture["image_size"]
    if side != data.image_size:
        raise UserError(f"{path} is for images of {side} pixels, these have {data.image_size}")
    if is_cropped(saved["dataset"], side, stem_of(architecture)) != data.cropped:
        raise UserError(f"{path} is for images that are {'not ' if data.cropped else ''}cropped, unlike these; train it with the "
                        "same --stem")
    require_same_hold_out(saved, data, str(path))
    return model


def default_form(model: BoostedNet) -> str:
    on_cpu = next(model.parameters()).device.type == "cpu"
    return "growing" if on_cpu and has_growing_form(model.backbone) else "folded"


def prepare_for_inference(model: BoostedNet, form: str | None = None, *, images: Tensor | None = None) -> BoostedNet:
    """A copy of a trained network for inference only; the network itself is left as it is.

    In every form batch normalisation is part of the convolutions whose output it alone reads (`models.folding`), which moves
    logits by rounding (about 1e-6 of their size).

    Args:
        form: "growing", for MSDNet and RANet only and their fastest on CPUs, keeps the features of a scale in one buffer instead
            of concatenating them (`models.inference`); "folded" is the network's own code in the channels_last layout; "compiled"
            is "folded" with every step through torch.compile, for any batch size, compiled at first use. Default: growing on
            the CPU where there is such a form, folded otherwise.
        images: a few images (B, 3, H, W) to try the network on; needed where its backbone has no `image_size`.
    Raises:
        ValueError: for a form that there is not, and where images are needed.
    """
    form = form or default_form(model)
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; choose one of {', '.join(FORMS)}")
    if form == "growing" and not has_growing_form(model.backbone):
        raise UserError(f"{type(model.backbone).__name__} has no growing form, only MSDNet and RANet have; choose folded or "
                        "compiled")
    ready = copy.deepcopy(model).eval().requires_grad_(False)
    plain = ready.backbone
    ready.backbone = fold_batch_norm(plain, random_images(model) if images is None else images)
    if form == "growing" and ready.backbone is not plain:
        ready.backbone = growing_form(ready.backbone)
    else:
        ready.backbone = ChannelsLast(ready.backbone, compiled=form == "compiled")
    ready.backbone.eval().requires_grad_(False)
    return ready


def random_images(model: BoostedNet, n: int = 2) -> Tensor:
    """Noise (n, 3, H, W) of the size, type and device of a network's images.

    Raises:
        ValueError: when its backbone does not say how large they are.
    """
    side = getattr(model.backbone, "image_size", None)
    if side is None:
        raise ValueError(f"{type(model.backbone).__name__} has no image_size; pass a few of its images (B, 3, H, W) as images=")
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))


@torch.inference_mode()
def exit_times(model: BoostedNet, x: Tensor) -> np.ndarray:
    """(n_exits,) seconds of every step of a network in eval mode on a batch that no image leaves."""
    def now() -> float:
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        return time.perf_counter()

    clock, scores = [now()], None
    state = model.backbone.start(x)
    for n in range(model.n_exits):
        logits, state = model.backbone.step(n, state)
        scores = model.add(n, logits, scores)
        clock.append(now())
    return np.diff(clock)


class ChannelsLast(Backbone):
    """A backbone in the channels_last layout, its steps compiled on request."""

    def __init__(self, backbone: nn.Module, *, compiled: bool) -> None:
        super().__init__()
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self._steps = [_Step(backbone, n) for n in range(backbone.n_exits)]
        if compiled:
            # All steps are the same function to torch.compile, and each has to be compiled for one and for several rows.
            dynamo = torch._dynamo.config
            dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * backbone.n_exits)
            self._steps = [torch.compile(step, dynamic=True) for step in self._steps]

    @property
    def n_exits(self) -> int:
        return self.backbone.n_exits

    def start(self, x: Tensor):
        return self.backbone.start(x.contiguous(memory_format=torch.channels_last))

    def step(self, n: int, state) -> tuple[Tensor, object]:
        return self._steps[n](state)


class _Step:
    """One step of a backbone as a function of the state."""

    def __init__(self, backbone: nn.Module, n: int) -> None:
        self.backbone, self.n = backbone, n

    def __call__(self, state):
        return self.backbone.step(self.n, state)
