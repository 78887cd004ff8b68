"""A trained network as one program per exit, which runs without this repository's code: torch.export or ONNX.

Program 0 takes the normalised images (B, 3, H, W). Each program returns the exit's predictions F_n (B, num_classes), before
softmax, and then the features that the next one needs; the next one takes exactly what the one before returned. Every program
works for any batch size and holds the weights of its own step only; batch normalisation is part of the convolutions.
"""
from __future__ import annotations

import copy
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from models import BoostedNet
from models.folding import fold_batch_norm
from op_counter import measure_model
from utils.core.errors import UserError
from utils.core.files import atomic_write, write_json
from utils.data.augment import statistics_of
from utils.data.decoders import short_side
from utils.evaluation.onnx_exit import open_session
from utils.options.catalog import is_cropped
from utils.options.network import stem_of
from utils.runs.restore import name_outputs

FORMAT = 2
ABOUT = "model.json"
OPSET = 20
# Largest difference of an output of an ONNX program from PyTorch's, in parts of the largest value of that output.
TOLERANCE = 1e-4
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}


class Step(NamedTuple):
    """One exit as a program.

    Attributes:
        program: torch.export.ExportedProgram.
        inputs, outputs: what goes in and comes out for three random images.
    """

    program: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class _StepModule(nn.Module):
    """Exit n as a function of tensors: what the step before returned goes in, predictions and features come out."""

    def __init__(self, model: BoostedNet, n: int, state_form: pytree.TreeSpec | None) -> None:
        super().__init__()
        self.model, self.n, self.state_form = model, n, state_form

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.n == 0:
            scores, state = None, self.model.backbone.start(*tensors)
        else:
            scores, state = tensors[0], pytree.tree_unflatten(tensors[1:], self.state_form)
        logits, state = self.model.backbone.step(self.n, state)
        scores = self.model.add(self.n, logits, scores)
        if self.n == self.model.n_exits - 1:
            return (scores,)
        return scores, *pytree.tree_leaves(state)


class _Reading(TorchDispatchMode):
    """Notes which weights of a network are read while the block runs, so that a program holds no weights of other exits."""

    def __init__(self) -> None:
        super().__init__()
        self._read: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), keywords=None):
        self._read.update(map(id, pytree.tree_leaves((args, keywords))))
        return function(*args, **(keywords or {}))

    def part_of(self, model: nn.Module) -> nn.Module:
        """A copy without the weights that were not read."""
        part = copy.deepcopy(model)
        for name, weight in model.named_parameters(remove_duplicate=False):
            if id(weight) not in self._read:
                owner, _, attribute = name.rpartition(".")
                setattr(part.get_submodule(owner), attribute, nn.Parameter(torch.empty(0), requires_grad=False))
        return part


def export_steps(model: BoostedNet, image_size: int) -> Iterator[Step]:
    """The programs of all exits, one after the other.

    Raises:
        UserError: for a network whose code torch.export cannot follow.
    """
    ready = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    batch = torch.export.Dim("batch", min=1)
    images = torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    ready.backbone = fold_batch_norm(ready.backbone, images).requires_grad_(False)
    inputs, state, scores = (images,), None, None
    for n in range(ready.n_exits):
        form = pytree.tree_structure(state)
        with torch.no_grad(), _Reading() as reading:
            logits, state = ready.backbone.step(n, state if n else ready.backbone.start(images))
            scores = ready.add(n, logits, scores)
        module = _StepModule(reading.part_of(ready), n, form)
        try:
            program = torch.export.export(module, inputs, dynamic_shapes=(tuple({0: batch} for _ in inputs),))
        except Exception as error:   # it has a dozen kinds
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"torch.export cannot follow the code of exit {n + 1} ({reason.strip()}); what depends on values of "
                            "the images, or on their number, cannot be exported") from error
        # Inputs of the next program may not share memory.
        onward = () if n == ready.n_exits - 1 else pytree.tree_leaves(state)
        outputs = tuple(tensor.clone() for tensor in (scores, *onward))
        yield Step(program, inputs, outputs)
        inputs = outputs


def write_programs(model: BoostedNet, image_size: int, folder: Path, form: str) -> Iterator[tuple[Path, float | None]]:
    """Write one file per exit to `folder`, checked against PyTorch where it is ONNX.

    Args:
        form: "torch" or "onnx".
    Yields:
        Each file, and of an ONNX program its largest difference from PyTorch, in parts of an output's largest value.
    Raises:
        UserError: when a package is missing that `form` needs, or an ONNX program gives other values than PyTorch.
    """
    if form == "onnx":
        require_onnx()
    for n, step in enumerate(export_steps(model, image_size)):
        path, difference = folder / f"step{n}{SUFFIXES[form]}", None
        content = _torch_file(step) if form == "torch" else _onnx_file(step)
        if form == "onnx":
            difference = _difference(content, step)
            if not difference <= TOLERANCE:
                raise UserError(f"the ONNX program of exit {n + 1} differs from PyTorch by {difference:.1e} of its largest "
                                f"output, more than {TOLERANCE:g}; other versions of onnx, onnxscript and onnxruntime may help")
        with atomic_write(path) as file:
            file.write(content)
        yield path, difference


def write_folder(model: BoostedNet, saved: dict[str, Any], points: Sequence[dict[str, Any]], folder: Path, form: str,
                 thresholds: str = "geometric", *, hold_out: dict[str, Any] | None = None,
                 calibration: Sequence[float] | None = None) -> Iterator[tuple[Path, float | None]]:
    """Write all programs and model.json (`describe`); the folder appears when it is complete. Yields as `write_programs`."""
    side = saved["architecture"]["image_size"]
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")   # a name that nobody else's folder has
    partial.mkdir(parents=True)
    try:
        names = []
        for path, difference in write_programs(model, side, partial, form):
            names.append(path.name)
            yield path, difference
        write_json(partial / ABOUT, describe(model, saved, names, points, form, thresholds, hold_out=hold_out,
                                             calibration=calibration))
        if folder.is_dir():   # an empty one, see utils.export
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def describe(model: BoostedNet, saved: dict[str, Any], steps: Sequence[str], points: Sequence[dict[str, Any]], form: str,
             thresholds: str = "geometric", *, hold_out: dict[str, Any] | None = None,
             calibration: Sequence[float] | None = None) -> dict[str, Any]:
    """Content of model.json (format 2): all that is needed to run the programs, and what wrote them.

    Args:
        points: of a curve; their thresholds become `budgets`.
        thresholds: what the points are of: "geometric" (eq. 9), "optimised", or "promise", whose only point has the entries
            max_drop and confidence_level beside the mean MACs of the hold-out.
        calibration: temperatures by which F_n is divided for the confidence alone, where the thresholds are of such.
        hold_out: where the held-out images leave under each of them, from `operating_points.hold_out_exits`.
    """
    side = saved["architecture"]["image_size"]
    read = saved["dataset"], side, stem_of(saved["architecture"])
    mean, std = statistics_of(*read)
    tools = {"torch": ["torch"], "onnx": ["torch", "onnx", "onnxscript", "onnxruntime"]}[form]
    return {"format": FORMAT, "runtime": form, "arch": saved["architecture"]["arch"], "method": saved["method"],
            **({"ema": saved["ema"]} if saved.get("ema") else {}),
            "dataset": saved["dataset"], "steps": list(steps), "image_size": side,
            "short_side": short_side(side, is_cropped(*read)), "mean": mean, "std": std,
            "class_names": name_outputs(saved.get("class_names"), saved["architecture"]["num_classes"]),
            "temperatures": list(model.temperatures),
            "macs": measure_model(model, side, side)[0],
            "thresholds": thresholds, "calibration": calibration and list(calibration),
            "budgets": [{"macs": point["budget"], "thresholds": point["thresholds"], "test_top1": point["test_top1"],
                         **{name: point[name] for name in ("max_drop", "confidence_level") if name in point}}
                        for point in points],
            "hold_out": hold_out,
            "versions": {name: metadata.version(name) for name in tools}, "opset": OPSET if form == "onnx" else None}


def require_onnx() -> None:
    """Raise UserError where a package that ONNX programs need is missing."""
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install -r requirements-onnx.txt")


def _torch_file(step: Step) -> bytes:
    whole = io.BytesIO()   # a full disk would end the process in the middle of torch's own writing
    torch.export.save(step.program, whole)
    return whole.getvalue()


def _onnx_file(step: Step) -> bytes:
    inputs = ["images"] if len(step.inputs) == 1 and step.inputs[0].ndim == 4 else _names(step.inputs)
    outputs = [f"next_{name}" if name in inputs else name for name in _names(step.outputs)]
    # The exporter reports on its own progress and on what it leaves as it is.
    quiet = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in quiet]
    try:
        for logger in quiet:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = torch.onnx.export(step.program, dynamo=True, opset_version=OPSET, verbose=False, input_names=inputs,
                                        output_names=outputs)
    finally:
        for logger, level in zip(quiet, levels):
            logger.setLevel(level)
    proto = written.model_proto
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]   # lines of our source that each operation came from
    return proto.SerializeToString()


def _names(tensors: Sequence[Tensor]) -> list[str]:
    return ["scores", *(f"features{i}" for i in range(len(tensors) - 1))]


def _difference(content: bytes, step: Step) -> float:
    """Largest difference of an output from PyTorch's, in parts of the largest value of that output."""
    session = open_session(content)
    feed = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), step.inputs, strict=True)}
    found = session.run(None, feed)
    return max(float((torch.from_numpy(a) - b).abs().max() / b.abs().max()) for a, b in zip(found, step.outputs, strict=True))
