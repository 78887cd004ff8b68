"""Steps of every method in float64: `torchrun ... tests/steps.py FOLDER` takes them in several processes, and each leaves what it
came to in FOLDER/<rank>.pth.
"""
from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from args import parse_args
from utils.core import distributed
from utils.data.sampling import part_sizes
from utils.methods import Method, build_method
from utils.options.catalog import METHODS
from utils.options.network import NetworkSpec
from utils.runs.restore import build_model
from utils.training.fast_forward import training_forward
from utils.training.optim import build_optimizer

WORLD = 2
# Images of the batches of a case, one after the other: equal parts, unequal ones, a part of one image, equal ones again.
SIZES = (8, 7, 3, 6)
NETWORKS = {
    "msdnet": "--arch msdnet_ge --nBlocks 3 --base 1 --step 1",
    # Its last layers drop a scale at a depth where the finer scales of the layer before feed nothing any more.
    "unread": "--arch msdnet --nBlocks 3 --base 2 --step 1",
    "ranet": "--arch ranet_ge --nBlocks 1 --block-step 1 --step 1 --grFactor 4-2-1 --bnFactor 4-2-1",
}
WEIGHTING = "--meta_net_hidden_size 8 --meta_lr 0.01"
# Network and flags of the method.
CASES = {
    "boost": ("unread", "--method boost"),
    "joint": ("ranet", "--method joint"),
    "equalised": ("unread", "--method boost --loss_equal"),
    "boost_distill": ("msdnet", "--method boost_distill --loss_equal"),
    "l2w": ("unread", f"--method l2w {WEIGHTING}"),
    "l2w every other": ("msdnet", f"--method l2w {WEIGHTING} --meta_interval 2 --meta_net_input_type both"),
    "boost_l2w": ("ranet", f"--method boost_l2w {WEIGHTING} --constraint_dimension row"),
    "conventional": ("msdnet", "--method block_losses --groups 3"),
    "no overlap": ("unread", "--method block_losses --groups 1-2"),
    "overlap": ("msdnet", "--method block_losses --overlap 2"),
    "overlap with final": ("msdnet", "--method block_losses --overlap 1 --include_final"),
    "local error": ("ranet", "--method block_losses --overlap 1"),
    "self-distilled": ("msdnet", "--method block_losses --overlap 2 --distill_weight 0.35"),
    "taught": ("msdnet", "--method block_losses --overlap 1 --distill_weight 0.35 --teacher file"),
    "imta": ("msdnet", "--method imta --checkpoint file"),
}


def build(case: str, device: torch.device = torch.device("cpu")) -> Method:   # noqa: B008
    """The method of a case and its network as they train, the same in every process; `device` is for `distributed.wrap` alone."""
    network, flags = CASES[case]
    args = parse_args(f"--result_dir d --dataset folder --nChannels 4 --weight-decay 1e-3 {NETWORKS[network]} {flags}".split())
    args.num_classes = 5
    torch.manual_seed(0)
    model, teacher = (build_model(NetworkSpec.from_args(args)).double() for _ in range(2))
    network = training_forward(model.train(), batch_size=8)
    optimizer = build_optimizer(model.backbone, name="sgd", lr=0.1, momentum=0.9, weight_decay=args.weight_decay)
    method = build_method(args, model, optimizer, network=network, teacher=teacher if args.teacher else None)
    method.network = distributed.wrap(network, device, averages=METHODS[args.method].one_call)
    return method


def batch(n: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) and labels (n,)."""
    draw = torch.Generator().manual_seed(n)
    return torch.randn(n, 3, 32, 32, generator=draw, dtype=torch.float64), torch.randint(5, (n,), generator=draw)


def parts(n: int, world: int = WORLD) -> list[tuple[Tensor, Tensor, float]]:
    """What each process gets of a batch of n images: images, labels, share."""
    x, y = batch(n)
    sizes = part_sizes(n, world)
    return [(*part, size * world / n) for *part, size in zip(x.split(sizes), y.split(sizes), sizes)]


def state(method: Method) -> dict[str, Any]:
    """A copy of all that steps change."""
    return copy.deepcopy({"network": method.model.backbone.state_dict(), "optimizer": method.optimizer.state_dict(),
                          "method": method.state_dict()})


def mean_gradients() -> list[Tensor | None]:
    """Of four parameters: one has a gradient everywhere, one in the second process only, one nowhere, and one is frozen."""
    parameters = [nn.Parameter(torch.zeros(2, 2)) for _ in range(4)]
    parameters[3].requires_grad_(False)
    rank = distributed.rank()
    parameters[0].grad = torch.arange(4.0).view(2, 2).T * (rank + 1)
    if rank == 1:
        parameters[1].grad = torch.full((2, 2), 3.0)
    distributed.average_gradients(parameters)
    return [parameter.grad for parameter in parameters]


def main(folder: Path) -> None:
    with distributed.process_group(torch.device("cpu")):
        found: dict[str, Any] = {"mean": mean_gradients()}
        for case in CASES:
            method = build(case)
            for i, n in enumerate(SIZES):
                method.step(*parts(n)[distributed.rank()])
                found[f"{case} {i}"] = state(method)
            method = build(case)
            method.step(*batch(6))   # the same in both processes
            found[f"{case} same"] = state(method)
        torch.save(found, folder / f"{distributed.rank()}.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
