"""What a training step and an evaluation cost as batches, exits, images and samples grow."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from adaptive_inference import budget_curve
from models import BoostedNet, MSDNet
from op_counter import measure_model
from utils.benchmarks.measure import Measurement, count, peak_memory, time_calls, training_clock
from utils.benchmarks.sweep import synthetic_scores
from utils.core.tables import format_table
from utils.data.augment import CIFAR_STATISTICS
from utils.data.device_images import DeviceImages
from utils.data.sampling import Plan, plan_evaluation
from utils.evaluation.predict import predict
from utils.methods import Method
from utils.options.parser import list_of
from utils.training.engine import EpochMeters, train_epoch
from utils.training.fast_forward import training_forward
from utils.training.optim import build_optimizer


class Work(NamedTuple):
    """Something to time.

    Attributes:
        series: rows of one series are compared with its first.
        setting: what grows.
        units: how much work it is, in `unit`; near-linear cost means the same time and memory for each.
        call: does it once.
    """

    series: str
    setting: str
    units: float
    unit: str
    call: Callable[[], Any]


def add_arguments(parser: ArgumentParser) -> None:
    numbers = list_of(count, ",", "16,32,64")
    parser.add_argument("--batch-sizes", type=numbers, default="8,16,32,64,128", metavar="N[,N]")
    parser.add_argument("--exits", type=numbers, default="2,4,6,8,10", metavar="N[,N]", help="of an MSDNet, batches of 16")
    parser.add_argument("--large-batch", type=count, default=4, help="images of 224 pixels per step (default: %(default)s)")
    parser.add_argument("--samples", type=numbers, default="250,500,1000,2000", metavar="N[,N]", help="evaluated")


def run(args: Namespace, device: torch.device) -> list[Measurement]:
    clock, clock_name = training_clock(device)
    return [Measurement(f"{work.series}, {work.setting}", time_calls(work.call, args.repeats, device, clock),
                        config={"series": work.series, "setting": work.setting, "clock": clock_name},
                        details={"units": work.units, "unit of work": work.unit, "peak_bytes": peak_memory(work.call, device)})
            for series in (_batch_sizes, _exits, _image_sizes, _samples) for work in series(args, device)]


def _batch_sizes(args: Namespace, device: torch.device) -> list[Work]:
    network = _msdnet(5, device)
    return [Work("batch size", f"{n}", n, "image", _step(network, n, 32, device)) for n in args.batch_sizes]


def _exits(args: Namespace, device: torch.device) -> list[Work]:
    works = []
    for n in args.exits:
        network = _msdnet(n, device)
        works.append(Work("exits", f"{n}", 16 * _million_macs(network, 32), "10^6 MACs", _step(network, 16, 32, device)))
    return works


def _image_sizes(args: Namespace, device: torch.device) -> list[Work]:
    """The same depth for both; images of 224 pixels have a fourth scale and a first layer that makes maps a quarter as wide."""
    large = MSDNet(n_blocks=5, n_channels=16, base=2, step=1, gr_factor=[1, 2, 4, 4], bn_factor=[1, 2, 4, 4], image_size=224)
    networks = {32: (_msdnet(5, device), 49 * args.large_batch), 224: (_boosted(large, device), args.large_batch)}
    return [Work("image size", f"{side}, {n} images", n * _million_macs(network, side), "10^6 MACs",
                 _step(network, n, side, device)) for side, (network, n) in networks.items()]


def _samples(args: Namespace, device: torch.device) -> list[Work]:
    network, rng, works = _msdnet(5, device), np.random.default_rng(0), []
    pixels = rng.integers(0, 256, (max(args.samples), 3, 32, 32), dtype=np.uint8)
    images = DeviceImages(pixels, np.zeros(len(pixels), np.int64), statistics=CIFAR_STATISTICS, flips=True, device=device)
    for n in args.samples:
        works.append(Work("predict", f"{n} samples", n, "sample", lambda n=n: predict(network, _Samples(images, n))))
    macs = np.asarray(measure_model(network, 32, 32)[0], np.float64)
    for n in (25 * n for n in args.samples):
        scores = [*synthetic_scores(rng, 5, n), *synthetic_scores(rng, 5, n)]
        works.append(Work("thresholds of 40 budgets", f"{n} samples", n, "sample",
                          lambda scores=scores: budget_curve(*scores, macs)))
    return works


class _Samples:
    """The first n images, as `predict` reads them."""

    def __init__(self, images: DeviceImages, n: int) -> None:
        self.images, self.plan = images, plan_evaluation(torch.arange(n), batch_size=250)

    @property
    def index(self) -> torch.Tensor:
        return self.plan.index

    def __iter__(self):
        plan: Plan = self.plan
        return ((*batch, 1.0) for batch in self.images.read(plan))


def _msdnet(n_exits: int, device: torch.device) -> BoostedNet:
    return _boosted(MSDNet(n_blocks=n_exits, n_channels=16, base=2, step=1), device)


def _boosted(backbone: MSDNet, device: torch.device) -> BoostedNet:
    return BoostedNet(backbone, [0.5] * backbone.n_exits).to(device)


def _million_macs(network: BoostedNet, side: int) -> float:
    return measure_model(network, side, side)[0][-1] / 1e6


def _step(network: BoostedNet, batch_size: int, side: int, device: torch.device) -> Callable[[], None]:
    """One training step on a batch of noise."""
    batch = (torch.randn(batch_size, 3, side, side, device=device), torch.arange(batch_size, device=device) % 100, 1.0)
    optimizer = build_optimizer(network.backbone, name="sgd", lr=0.01, momentum=0.9, weight_decay=[1e-4])
    method = Method(network, optimizer, network=training_forward(network, batch_size=batch_size))
    meters = EpochMeters(network.n_exits, device)

    def step() -> None:
        train_epoch(method, [batch], meters, after_step=lambda n: False)
        optimizer.zero_grad()   # or the next measurement of memory would begin with the gradients there

    return step


def report(lines: Sequence[dict[str, Any]], where: str) -> str:
    rows, first = [], {}
    for line in lines:
        series = line["config"]["series"]
        start = first.setdefault(series, line)
        time_each, start_each = line["median"] / line["units"], start["median"] / start["units"]
        memory = ["", ""]
        if line["peak_bytes"] is not None:
            memory[0] = f"{line['peak_bytes'] / 2**20:.0f}"
            if start["peak_bytes"] > 2**22:   # less is not the work's but the allocator's
                memory[1] = f"{line['peak_bytes'] / line['units'] / (start['peak_bytes'] / start['units']):.2f}"
        rows.append([series if line is start else "", line["config"]["setting"], f"{1e3 * line['median']:.1f}", memory[0],
                     line["unit of work"], f"{time_each / start_each:.2f}", memory[1]])
    return format_table(["", "", "ms", "peak MiB", "unit", "time per unit", "memory per unit"], rows,
                        title=f"Cost as work grows: a training step, or an evaluation; {lines[0]['config']['clock']}, medians of "
                              f"{lines[0]['n']}; {where}\n"
                              "per unit: relative to the first row of the series; 1.00 throughout would be linear")
