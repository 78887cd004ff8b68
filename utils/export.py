"""Write a trained network as files that run without this repository's code.

    python -m utils.export RUN_DIR OUT_DIR

One torch.export program per exit, `step0.pt2`, `step1.pt2`, ..., each for any batch size, and `model.json` beside them.
Program 0 takes the normalised images (B, 3, H, W); each returns the exit's predictions F_n (B, num_classes), before softmax,
and then the features that the next one needs, and the next one takes exactly what the one before returned. docs/deployment.md
"Deployment" has a loader.
"""
from __future__ import annotations

import copy
import io
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from models import BoostedNet
from models.inference import fold_batch_norm
from op_counter import measure_model
from utils.core.errors import UserError, user_errors
from utils.core.files import atomic_write, write_json
from utils.data.augment import statistics_of
from utils.evaluation import operating_points
from utils.evaluation.fast_form import load_model
from utils.options.parser import OneLineParser
from utils.runs import checkpoint
from utils.runs.restore import name_outputs

FORMAT = 1
ABOUT = "model.json"


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    run, out = Path(args.run), Path(args.out)
    path = run if run.is_file() else run / checkpoint.BEST
    model, saved = load_model(path)
    points = operating_points.stored(path.parent, saved)
    if not points:
        raise UserError(f"{path.parent} has no thresholds of this checkpoint; fit them first: eval_cifar100.py --data-root "
                        f"DATA --evaluate-from {path} --evalmode dynamic")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    side = saved["architecture"]["image_size"]
    names = [f"step{n}.pt2" for n in range(model.n_exits)]
    for n, (name, program) in enumerate(zip(names, export_steps(model, side))):
        whole = io.BytesIO()   # a full disk would end the process in the middle of torch's own writing
        torch.export.save(program, whole)
        with atomic_write(out / name) as file:
            file.write(whole.getbuffer())
        print(f"{out / name}: exit {n + 1} of {model.n_exits}, {(out / name).stat().st_size / 1e6:.2f} MB", flush=True)
    write_json(out / ABOUT, describe(model, saved, names, points))
    print(f"{out / ABOUT}: thresholds of {len(points)} budgets, costs, class names")
    return 0


def build_parser() -> ArgumentParser:
    parser = OneLineParser(prog="python -m utils.export", allow_abbrev=False,
                           description="Write a trained network as torch.export programs, one per exit.")
    parser.add_argument("run", metavar="RUN_DIR", help=f"folder of a run, of which {checkpoint.BEST} is taken; or a checkpoint. "
                        "--evalmode dynamic must have left its thresholds there")
    parser.add_argument("out", metavar="OUT_DIR", help="new folder for the programs")
    return parser


def describe(model: BoostedNet, saved: dict[str, Any], steps: Sequence[str], points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Content of model.json."""
    side = saved["architecture"]["image_size"]
    mean, std = statistics_of(saved["dataset"], side)
    return {"format": FORMAT, "arch": saved["architecture"]["arch"], "method": saved["method"], "dataset": saved["dataset"],
            "steps": list(steps), "image_size": side, "mean": mean, "std": std,
            "class_names": name_outputs(saved["class_names"], saved["architecture"]["num_classes"]),
            "temperatures": list(model.temperatures), "macs": measure_model(model, side, side)[0],
            "budgets": [{"macs": point["budget"], "thresholds": point["thresholds"], "test_top1": point["test_top1"]}
                        for point in points],
            "torch": str(torch.__version__)}


class StepProgram(nn.Module):
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


class _Used:
    """Notes which modules of a network run while the block runs, so that a program holds no weights of other exits."""

    def __init__(self, model: nn.Module) -> None:
        self._ran: set[str] = set()
        self._hooks = [module.register_forward_hook(lambda *_, name=name: self._ran.add(name))
                       for name, module in model.named_modules()]

    def __enter__(self) -> _Used:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def part_of(self, model: nn.Module) -> nn.Module:
        """A copy without the weights of modules that did not run."""
        part = copy.deepcopy(model)
        for name, module in part.named_modules():
            if name not in self._ran:
                for weight, _ in list(module.named_parameters(recurse=False)):
                    setattr(module, weight, nn.Parameter(torch.empty(0), requires_grad=False))
        return part


def export_steps(model: BoostedNet, image_size: int):
    """The programs (torch.export.ExportedProgram), one after the other; batch normalisation is part of the convolutions."""
    ready = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    fold_batch_norm(ready.backbone)
    batch = torch.export.Dim("batch", min=1)
    images = torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    inputs, state, scores = (images,), ready.backbone.start(images), None
    for n in range(ready.n_exits):
        form = pytree.tree_structure(state)
        with torch.no_grad(), _Used(ready) as used:
            logits, state = ready.backbone.step(n, state)
            scores = ready.add(n, logits, scores)
        program = StepProgram(used.part_of(ready), n, form)
        yield torch.export.export(program, inputs, dynamic_shapes=(tuple({0: batch} for _ in inputs),))
        inputs = tuple(tensor.clone() for tensor in (scores, *pytree.tree_leaves(state)))


if __name__ == "__main__":
    sys.exit(main())
