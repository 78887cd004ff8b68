"""What preparing the training images costs: small ones against a training step, large ones against torchvision."""
from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from models import MSDNet
from utils.benchmarks.measure import Measurement, count, time_calls
from utils.core.errors import UserError
from utils.data.augment import CIFAR_STATISTICS, IMAGENET_STATISTICS
from utils.data.decoders import DECODERS
from utils.data.device_images import DeviceImages
from utils.data.folders import Listing, scan
from utils.data.large_images import FolderImages
from utils.data.sampling import plan_training


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--images", metavar="FOLDER", help="class folders of large images; without it only small images")
    parser.add_argument("--passes", type=count, default=10, help="times each large image is read per repeat")
    parser.add_argument("--batch-size", type=count, default=64)
    parser.add_argument("--workers", type=count, default=1, help="decoding processes")


def run(args: Namespace, device: torch.device) -> list[Measurement]:
    """Small images always, large ones with `--images`."""
    return small_images(args, device) + (large_images(args, device) if args.images else [])


def small_images(args: Namespace, device: torch.device) -> list[Measurement]:
    """Seconds to prepare one batch of 32x32 images and seconds of one training step on it (paper's smallest MSDNet)."""
    n_batches = 50
    pixels = np.random.default_rng(0).integers(0, 256, (50_000, 3, 32, 32), dtype=np.uint8)
    images = DeviceImages(pixels, np.arange(50_000) % 100, statistics=CIFAR_STATISTICS, flips=True, device=device)
    plan = plan_training(torch.arange(args.batch_size * n_batches), batch_size=args.batch_size, seed=0, epoch=0)
    model = MSDNet(n_blocks=5, n_channels=16, base=2, step=1, num_classes=100).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch, labels = next(iter(images.read_augmented(plan, seed=0, epoch=0)))

    def read() -> None:
        for _ in images.read_augmented(plan, seed=0, epoch=0):
            pass

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        sum(F.cross_entropy(logits, labels) for logits in model(batch)).backward()
        optimizer.step()

    config = {"batch size": args.batch_size}
    inputs = tuple(s / n_batches for s in time_calls(read, args.repeats, device))
    steps = time_calls(step, args.repeats, device)
    return [Measurement("input of one batch, 32x32", inputs, config=config),
            Measurement("training step, MSDNet 24.5 M MACs", steps, config=config),
            Measurement("input, share of a step", tuple(100 * i / s for i, s in zip(inputs, steps)), unit="%", config=config)]


def large_images(args: Namespace, device: torch.device) -> list[Measurement]:
    """Images per second and core of the whole training input path, from files to normalised batches on the device.

    Counted as images per CPU second of all processes together: wall time on a shared machine says more about its others.
    """
    files = scan(Path(args.images))
    index = torch.arange(len(files.files)).repeat(args.passes)
    pipelines = {"torchvision ImageFolder, ToTensor and Normalize in workers": torchvision_pipeline(files, index, args)}
    for decoder in DECODERS:
        try:
            pipelines[f"ours, {decoder}"] = our_pipeline(files, index, args, decoder, device)
        except UserError:
            continue  # an optional library that is not installed
    samples: dict[str, list[float]] = {name: [] for name in pipelines}
    for repeat in range(args.repeats + 1):
        for name, read in pipelines.items():  # in turn, so that a busy minute touches all of them
            before = cpu_seconds()
            read()
            if repeat:
                samples[name].append(len(index) / (cpu_seconds() - before))
    config = {"batch size": args.batch_size, "workers": args.workers, "large images": len(files.files)}
    return [Measurement(name, tuple(values), unit="images/s/core", config=config) for name, values in samples.items()]


def cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def torchvision_pipeline(files: Listing, index: torch.Tensor, args: Namespace) -> Callable[[], Any]:
    import torchvision.transforms as T
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    transform = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(*IMAGENET_STATISTICS)])
    loader = DataLoader(ImageFolder(files.folder, transform), batch_size=args.batch_size, sampler=index.tolist(),
                        num_workers=args.workers)
    return lambda: [len(labels) for _, labels in loader]


def our_pipeline(files: Listing, index: torch.Tensor, args: Namespace, decoder: str, device: torch.device) -> Callable[[], Any]:
    images = FolderImages(files, statistics=IMAGENET_STATISTICS, image_size=224, device=device, workers=args.workers,
                          decoder=decoder)
    plan = plan_training(index, batch_size=args.batch_size, seed=0, epoch=0)
    return lambda: [len(labels) for _, labels in images.read_augmented(plan, seed=0, epoch=0)]
