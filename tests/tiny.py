"""Data and networks so small that a training run takes a second, and the comparison of two runs to the last bit."""
from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.runs import checkpoint
from utils.runs.result_files import RESULTS
from utils.training import engine

CLOCK = ("seconds", "images_per_s")   # what two equal runs differ in


def make_images(folder: Path, *, classes: int = 3, train: int = 16, test: int = 4, side: int = 32) -> Path:
    """A folder data set of noise over a shade for each class."""
    draw = np.random.default_rng(0)
    for part, n in (("train", train), ("test", test)):
        for label in range(classes):
            (folder / part / f"class{label}").mkdir(parents=True)
            for i in range(n):
                pixels = draw.integers(0, 100, (side, side, 3)) + 50 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / f"class{label}" / f"{i}.png")
    return folder


def command(images: Path, result_dir: Path, *more: str) -> list[str]:
    """Flags of a run with a network of two exits, 40 training images in batches of 8 and 8 held out."""
    flags = ("--use-valid --valid_size 8 --arch msdnet_ge --nBlocks 2 --base 1 --step 1 --nChannels 4 --batch-size 8 --epochs 2 "
             "--lr_milestones 1 --device cpu --threads 1 --print-freq 3")
    if any(word.startswith("ranet") for word in more):   # which has no first block of its own depth
        flags = flags.replace("--base 1 ", "")
    return ["--dataset", "folder", "--data-root", str(images), "--result_dir", str(result_dir), *flags.split(), *more]


def ranet_command(images: Path, result_dir: Path, *more: str) -> list[str]:
    """The same with a RANet of three exits."""
    network = "--arch ranet_ge --nBlocks 1 --block-step 1 --step 1 --scale-list 1-2-3 --grFactor 4-2-1 --bnFactor 4-2-1".split()
    return command(images, result_dir, *network, *more)


def signal_at_step(monkeypatch: Any, step: int, number: int = signal.SIGTERM) -> None:
    """Have this process send itself a signal in the middle of the `step`-th step from now, counted over all epochs."""
    add, steps = engine.EpochMeters.add, iter(range(1, 10**9))

    def add_and_signal(self, *arguments):
        add(self, *arguments)
        if next(steps) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(engine.EpochMeters, "add", add_and_signal)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run has left behind that an equal run leaves as well."""
    latest, best = (checkpoint.load(folder / name) for name in (checkpoint.LATEST, checkpoint.BEST))
    results = json.loads((folder / RESULTS).read_text())
    for name in ("config", "job"):   # with the folder in it, and torchrun's name
        del latest["training"][name]
    return {"latest": latest, "best": best, "results": {name: results[name] for name in ("epochs", "best", "split_hash")},
            "test": {name: results["test"][name] for name in ("top1", "top5")} if "test" in results else None}


def differences(a: Any, b: Any, place: str = "") -> Iterator[str]:
    """Places in two nested structures that are not the same to the last bit."""
    if type(a) is not type(b):
        yield f"{place}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, dict):
        for name in a.keys() | b.keys():
            if name not in CLOCK:
                yield from differences(a.get(name), b.get(name), f"{place}/{name}")
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f"{place}: {len(a)} and {len(b)} entries"
        for i, pair in enumerate(zip(a, b)):
            yield from differences(*pair, f"{place}/{i}")
    elif isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            yield f"{place}: tensors differ"
    elif a != b:
        yield f"{place}: {a!r} and {b!r}"


def one_line_error(capsys: Any, call: Callable[[], Any], code: int = 2) -> str:
    """The one line on stderr with which `call` ends the program."""
    try:
        ended = call()
    except SystemExit as error:
        ended = error.code
    message = capsys.readouterr().err
    assert ended == code, f"exit code {ended}: {message}"
    assert message.count("\n") == 1 and ": error: " in message, message
    return message


@contextmanager
def files_no_larger_than(n_bytes: int) -> Iterator[None]:
    """The system refuses to write beyond this size, as it refuses to write to a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
