"""Training in the manner of the released program, by this project's default, and by its fast path."""
from __future__ import annotations

import copy
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models import BoostedNet
from utils.benchmarks.early_exit import NETWORKS
from utils.benchmarks.measure import Clock, Measurement, count, peak_memory, training_clock
from utils.core.tables import format_table
from utils.data.augment import CIFAR_STATISTICS
from utils.data.device_images import DeviceImages
from utils.data.sampling import plan_training
from utils.methods import Method
from utils.options.parser import list_of
from utils.training.engine import EpochMeters, train_epoch
from utils.training.fast_forward import training_forward
from utils.training.optim import build_optimizer

EPOCH_IMAGES = 50_000
RELEASED, DEFAULT = "released manner", "default"
FAST = {"cpu": "channels_last,compile,channels_last+compile",
        "cuda": "cuda_graphs,channels_last+cuda_graphs,bf16+channels_last+cuda_graphs,bf16+channels_last+compile+cuda_graphs"}
OPTIONS = {"bf16": {"amp": "bf16"}, "channels_last": {"channels_last": True}, "compile": {"compiled": True},
           "cuda_graphs": {"cuda_graphs": True}}
# Operations by the beginnings of their names, as the profiler spells them.
KINDS = {"convolution": ("aten::mkldnn_convolution", "aten::convolution", "aten::cudnn_convolution", "aten::_conv"),
         "matrix product": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"),
         "batch norm": ("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::_batch_norm"),
         "cat": ("aten::cat",), "ReLU": ("aten::relu", "aten::clamp_min", "aten::threshold_backward"),
         "sums": ("aten::add",), "compiled": ("## Call CompiledFxGraph", "triton_")}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--network", choices=NETWORKS, default="msdnet10")
    parser.add_argument("--batch-size", type=count, default=64)
    parser.add_argument("--steps", type=count, help="timed per repeat (default: 5 on the CPU, 100 on a GPU)")
    parser.add_argument("--workers", type=count, default=min(8, os.cpu_count() or 1),
                        help="processes that transform images in the released manner (default: %(default)s)")
    parser.add_argument("--fast", type=list_of(options, ",", "channels_last,bf16+channels_last"), metavar="X[,X+X]",
                        help=f"fast paths to time, of {', '.join(OPTIONS)} (default: {FAST['cpu']} on the CPU, several on a GPU)")


def options(text: str) -> dict[str, Any]:
    """Keywords of `training_forward` for names joined by +."""
    unknown = [name for name in text.split("+") if name not in OPTIONS]
    if unknown:
        raise ArgumentTypeError(f"unknown {unknown[0]!r}; choose of {', '.join(OPTIONS)}")
    return {key: value for name in text.split("+") for key, value in OPTIONS[name].items()}


class PlainLoop:
    """An epoch as the released program has it, written anew.

    Every convolution runs by itself, worker processes transform image by image, each step waits for its loss and for the
    accuracy of every exit, and a second pass over the training images measures their accuracy.
    """

    def __init__(self, model: BoostedNet, images: np.ndarray, labels: np.ndarray, args: Namespace, device: torch.device) -> None:
        from torch.utils.data import DataLoader, RandomSampler
        self.model, self.device = model, device
        self.clock: Clock = training_clock(device)[0]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        data = TransformedImages(images, labels)
        sampler = RandomSampler(data, replacement=True, num_samples=10**9)   # one pass that does not end
        self.batches = iter(DataLoader(data, args.batch_size, sampler=sampler, num_workers=args.workers,
                                       pin_memory=device.type == "cuda"))
        self.ready = 2 * args.workers   # batches that the workers have prepared when none is requested

    def train(self, steps: int) -> tuple[float, float]:
        """Seconds of a step and of waiting for its batch."""
        self.model.train()
        return self._timed(steps, self._step)

    def judge(self, steps: int) -> tuple[float, float]:
        """The same for batches of the second pass."""
        self.model.eval()
        with torch.no_grad():
            return self._timed(steps, self._accuracy)

    def _timed(self, steps: int, work: Callable[[Tensor, Tensor], None]) -> tuple[float, float]:
        waiting, working = [], []
        for _ in range(steps):
            start = self.clock()
            images, labels = (part.to(self.device) for part in next(self.batches))
            _finish(self.device)
            arrived = self.clock()
            work(images, labels)
            waiting.append(arrived - start)
            working.append(self.clock() - arrived)
        # Those that were ready would make the workers look faster than they are.
        waiting = waiting[self.ready:] or waiting
        return sum(working) / steps, sum(waiting) / len(waiting)

    def _step(self, images: Tensor, labels: Tensor) -> None:
        predictions = self.model(images)
        loss = sum(F.cross_entropy(p, labels) for p in predictions)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()
        self._count(predictions, labels)

    def _accuracy(self, images: Tensor, labels: Tensor) -> None:
        self._count(self.model(images), labels)

    @staticmethod
    def _count(predictions: Sequence[Tensor], labels: Tensor) -> None:
        for p in predictions:
            (p.argmax(dim=1) == labels).float().mean().item()


class TransformedImages(torch.utils.data.Dataset):
    """Images (n, S, S, 3) uint8, cropped, flipped and normalised one at a time by torchvision."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        import torchvision.transforms as T
        self.images, self.labels = images, labels
        self.transform = T.Compose([T.RandomCrop(images.shape[1], padding=4), T.RandomHorizontalFlip(), T.ToTensor(),
                                    T.Normalize(*CIFAR_STATISTICS)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


class OurLoop:
    """An epoch of this project: `train_epoch` on batches from the images on the device."""

    def __init__(self, model: BoostedNet, images: DeviceImages, batch_size: int, fast: dict[str, Any]) -> None:
        self.model = model
        optimizer = build_optimizer(model.backbone, name="sgd", lr=0.1, momentum=0.9, weight_decay=[1e-4])
        self.method = Method(model, optimizer, network=training_forward(model, batch_size=batch_size, **fast))
        self.images, self.batch_size = images, batch_size
        self.clock: Clock = training_clock(images.device)[0]

    def batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        samples = torch.arange(steps * self.batch_size) % len(self.images.labels)
        plan = plan_training(samples, batch_size=self.batch_size, seed=0, epoch=0)
        return ((*batch, 1.0) for batch in self.images.read_augmented(plan, seed=0, epoch=0))

    def train(self, steps: int) -> tuple[float, float]:
        """Seconds of a step and of the input of one."""
        device = self.images.device
        start = self.clock()
        batches = list(self.batches(steps))
        _finish(device)
        made = self.clock()
        meters = EpochMeters(self.model.n_exits, device)
        train_epoch(self.method, batches, meters, after_step=lambda step: False)
        _finish(device)
        return (self.clock() - made) / steps, (made - start) / steps


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(args: Namespace, device: torch.device) -> list[Measurement]:
    """All variants once per repeat, in turn, so that a slow moment of the machine meets all alike."""
    steps = args.steps or (100 if device.type == "cuda" else 5)
    torch.manual_seed(0)
    backbone = NETWORKS[args.network]()
    model = BoostedNet(backbone, [0.5] * backbone.n_exits).to(device)
    pixels = np.random.default_rng(0).integers(0, 256, (10_000, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(len(pixels)) % 100
    ours = DeviceImages(pixels.transpose(0, 3, 1, 2), labels, statistics=CIFAR_STATISTICS, flips=True, device=device)
    variants: dict[str, PlainLoop | OurLoop] = {RELEASED: PlainLoop(copy.deepcopy(model), pixels, labels, args, device)}
    for fast in [{}, *(args.fast or list_of(options, ",", "")(FAST[device.type]))]:
        variants[_name(fast)] = OurLoop(copy.deepcopy(model), ours, args.batch_size, fast)

    first = {}
    for name, loop in variants.items():
        start = loop.clock()
        loop.train(1)
        first[name] = loop.clock() - start
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    judged = []
    for _ in range(args.repeats):
        for name, loop in variants.items():
            taken[name].append(loop.train(steps))
        judged.append(sum(variants[RELEASED].judge(steps)))
    config = {"network": args.network, "batch size": args.batch_size, "workers": args.workers, "steps": steps,
              "clock": training_clock(device)[1]}
    n_batches = -(-EPOCH_IMAGES // args.batch_size)
    results = []
    for name, loop in variants.items():
        step_s = tuple(step for step, _ in taken[name])
        second_pass = judged if name == RELEASED else [0.0] * args.repeats
        epochs = [n_batches * (sum(times) + extra) for times, extra in zip(taken[name], second_pass)]
        details = {"epoch_s": float(np.median(epochs)), "input_s": float(np.median([wait for _, wait in taken[name]])),
                   "second_pass_s": n_batches * float(np.median(second_pass)), "first_s": first[name],
                   "peak_bytes": peak_memory(lambda loop=loop: loop.train(2), device), "time_shares": _shares(loop, device)}
        results.append(Measurement(name, step_s, config=config, details=details))
    return results


def _name(fast: dict[str, Any]) -> str:
    return "+".join(name for name, keywords in OPTIONS.items() if keywords.items() <= fast.items()) or DEFAULT


def _shares(loop: PlainLoop | OurLoop, device: torch.device) -> dict[str, float]:
    """Share of each kind of operation in the time of a step, on the device."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]) as record:
        loop.train(1)
    seconds = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in record.key_averages():
        if event.key.startswith(("enumerate(DataLoader)", "ProfilerStep")):
            continue   # waiting, of which PlainLoop has a figure of its own
        kind = next((kind for kind, starts in KINDS.items() if event.key.startswith(starts)), "other")
        seconds[kind] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    total = sum(seconds.values()) or 1.0
    return {kind: value / total for kind, value in seconds.items()}


def report(lines: Sequence[dict[str, Any]], where: str) -> str:
    """A table of times and one of what they are spent on."""
    config, released = lines[0]["config"], lines[0]
    times = [[line["name"], f"{1e3 * line['median']:.1f}", f"{1e3 * line['input_s']:.1f}",
              f"{config['batch size'] / line['median']:.0f}", f"x{released['median'] / line['median']:.2f}",
              f"{line['second_pass_s']:.0f}", f"{line['epoch_s']:.0f}", f"x{released['epoch_s'] / line['epoch_s']:.2f}",
              f"{300 * line['epoch_s'] / 3600:.1f}", "" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 2**20:.0f}",
              f"{line['first_s']:.0f}"] for line in lines]
    shares = [[line["name"], *(f"{100 * share:.0f}" for share in line["time_shares"].values())] for line in lines]
    title = (f"{config['network']}, batches of {config['batch size']}, {config['workers']} workers, {config['clock']}, median of "
             f"{released['n']} x {config['steps']} steps; {where}\n"
             f"epoch: estimated from the times of a batch, for {EPOCH_IMAGES:,} images, without validation; "
             f"x: speed-up over the {RELEASED}")
    columns = ["", "step ms", "input ms", "images/s", "step", "2nd pass s", "epoch s", "epoch", "300 epochs h", "peak MiB",
               "first step s"]
    return "\n\n".join((
        format_table(columns, times, title=title),
        format_table(["", *(f"{kind} %" for kind in released["time_shares"])], shares, title="where the time of a step goes")))
