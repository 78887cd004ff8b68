"""What a GPU that is at hand for ten minutes is used for: checks, speed, and as much training of MSDNet-10 as fits.

    python tests/gpu_session.py FOLDER --data-root DATA            # CIFAR-100; FOLDER gets logs, speed.jsonl, run/ and published/
    python tests/gpu_session.py FOLDER --dry-run                   # every part on the CPU, with stand-in sizes
    python tests/gpu_session.py --plan [IMAGES_PER_S]              # how long each part takes, at several speeds or at one

Every part has a limit, and what it leaves of its time the training gets:

    checks     every method and combination of the flags for speed has the CPU's losses, early exit equals its simulation
    speed      images/s of MSDNet-10 and RANet-8, eager, captured and in bfloat16
    compile    images/s of MSDNet-10 through torch.compile
    training   BoostNet on MSDNet-10 by the fastest way in float32, a cosine that ends at zero, batches of 64
    evaluation every exit on the test set, and 40 budgets; published/ gets half-precision weights, arrays and curves

A part that fails or is cut off does not keep the next one from running; the exit code is 1 if any was. Nothing is installed.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 580                      # of the whole session
LIMITS = {"checks": 90, "speed msdnet10": 60, "speed ranet8": 40, "compile": 90}   # seconds
EVALUATION_S = 50                  # kept for it at the end
START_S, SAVE_S = 30, 1            # of training: before its first step, and beside the steps of an epoch
SAFETY = 0.9                       # share of the time left that the epochs are planned for
BATCH, STEPS = 64, 30              # of the benchmarks
EXACT = ("default", "channels_last", "cuda_graphs", "channels_last+cuda_graphs")   # as the benchmark names them: float32
CHECKED = ["tests/test_gpu.py", "tests/test_data.py", "tests/test_resume.py", "tests/test_training_forward.py"]
PLANNED_FOR = (500, 1000, 2000, 4000, 8000)   # images/s


class Sizes(NamedTuple):
    """What differs between a session and its dry run.

    Attributes:
        checks: arguments of pytest.
        speed: of the benchmark, for every network.
        fast, compiled: ways of training to time (--fast of the benchmark).
        training: flags of the network, the data and the hold-out.
        n_train, n_valid: images.
        most_epochs: no more of them whatever the speed.
        patience: factor on all limits.
    """

    device: str
    checks: list[str]
    speed: list[str]
    fast: str
    compiled: str
    training: list[str]
    n_train: int
    n_valid: int
    most_epochs: int = 300
    patience: int = 1


NETWORK = "--arch msdnet_ge --nBlocks 10 --stepmode even --step 2 --base 4 --nChannels 16".split()
REAL = Sizes("cuda", ["-n", "4", "-m", "gpu", *CHECKED, "-k", "not compiled"], ["--steps", str(STEPS), "--repeats", "1"],
             "channels_last,cuda_graphs,channels_last+cuda_graphs,bf16+channels_last+cuda_graphs",
             "channels_last+compile+cuda_graphs",
             ["--dataset", "cifar100", "--use-valid", *NETWORK, "--batch-size", str(BATCH)], 45_000, 5_000)
STAND_IN = Sizes("cpu", ["-m", "slow", "tests/test_gpu.py", "-k", "msdnet and (joint or growing)"],
                 "--steps 1 --repeats 1 --batch-size 4 --workers 1 --threads 1".split(), "channels_last", "bf16+channels_last",
                 ["--dataset", "folder", "--use-valid", "--valid_size", "8", *"--arch msdnet_ge --nBlocks 2 --base 1 --step 1 "
                  "--nChannels 4 --batch-size 8 --threads 1".split()], 40, 8, most_epochs=2, patience=10)


def epochs_that_fit(seconds: float, images_per_s: float, sizes: Sizes = REAL) -> int:
    """Epochs of training, with the hold-out after each, in this time; at least one."""
    epoch_s = (sizes.n_train + sizes.n_valid / 3) / images_per_s + SAVE_S   # a forward pass is a third of a step
    return min(max(int(SAFETY * (seconds - START_S) / epoch_s), 1), sizes.most_epochs)


def plan(images_per_s: float) -> dict[str, float]:
    """Seconds of each part where the fastest way in float32 trains MSDNet-10 at this speed.

    Eager training is taken to be three times slower, RANet-8 twice, and the start of a program to take 15 s.
    """
    images = STEPS * BATCH
    speed = {name: 15 + factor * images * (3 * 4 + 3) / images_per_s for name, factor in (("msdnet10", 1), ("ranet8", 2))}
    parts = {"checks": LIMITS["checks"], **{f"speed {name}": seconds for name, seconds in speed.items()},
             "compile": LIMITS["compile"]}   # the first and the last cannot be told from images/s
    parts = {name: min(seconds, LIMITS[name]) for name, seconds in parts.items()}
    return {**parts, "training": SECONDS - EVALUATION_S - sum(parts.values()), "evaluation": EVALUATION_S}


def plan_table(speeds: Sequence[float] = PLANNED_FOR) -> str:
    """The plan for several images/s."""
    plans = {speed: plan(speed) for speed in speeds}
    rows = [["images/s", *(f"{speed:g}" for speed in plans)],
            *([f"{name}, s", *(f"{parts[name]:.0f}" for parts in plans.values())] for name in plan(speeds[0]))]
    rows.append(["epochs in training", *(str(epochs_that_fit(parts["training"], speed)) for speed, parts in plans.items())])
    return "\n".join(row[0].ljust(20) + "".join(cell.rjust(7) for cell in row[1:]) for row in rows)


def fastest(lines: Sequence[dict[str, Any]], network: str = "msdnet10") -> tuple[str, float]:
    """Name and images/s of the fastest way in float32 that was measured without torch.compile.

    Raises:
        ValueError: when none was.
    """
    speeds = {line["name"]: line["config"]["batch size"] / line["median"] for line in lines
              if line["config"]["network"] == network and line["name"] in EXACT}
    name = max(speeds, key=speeds.get)
    return name, speeds[name]


def flags_of(name: str) -> list[str]:
    """Flags of training for a way of training as the benchmark names it."""
    return [] if name == "default" else [f"--{part}" for part in name.split("+")]


def benchmark(folder: Path, network: str, fast: str, sizes: Sizes) -> list[str]:
    return ["-m", "utils.benchmark", "train", "--device", sizes.device, "--network", network, *sizes.speed, "--fast", fast,
            "--json", str(folder / "speed.jsonl")]


def training(folder: Path, data_root: str, epochs: int, way: str, sizes: Sizes) -> list[str]:
    return ["train_cifar100.py", "--data-root", data_root, "--result_dir", str(folder / "run"), "--seed", "0", *sizes.training,
            "--epochs", str(epochs), "--lr-type", "cosine", "--device", sizes.device, *flags_of(way)]


def evaluations(folder: Path, data_root: str, sizes: Sizes) -> list[list[str]]:
    common = ["eval_cifar100.py", "--data-root", data_root, "--device", sizes.device, "--publish", str(folder / "published")]
    return [[*common, "--evaluate-from", str(folder / "run" / f"model_{name}.pth"), "--evalmode", mode]
            for name, mode in (("latest", "anytime"), ("best", "dynamic"))]


def part(folder: Path, name: str, command: Sequence[str], limit_s: float) -> bool:
    """Run a Python command for at most this long, keep what it prints in a log of its own; whether it ended well.

    At the limit it gets SIGTERM, at which training saves, and ten seconds later SIGKILL.
    """
    print(f"\n[{name}, at most {limit_s:.0f} s] python {' '.join(command)}", flush=True)
    start = time.monotonic()
    with open(folder / f"{name.replace(' ', '_')}.log", "ab") as log:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            code = process.wait(max(limit_s, 0.1))
        except subprocess.TimeoutExpired:
            code = "cut off"
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:   # also what it has started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = Path(log.name).read_bytes().decode(errors="replace").splitlines()
    print(*lines[-40:], f"[{name}: {code}, {time.monotonic() - start:.0f} s]", sep="\n", flush=True)
    return code == 0


def session(folder: Path, data_root: str, sizes: Sizes, seconds: float) -> bool:
    """All parts in turn; whether all ended well."""
    start, lines = time.monotonic(), folder / "speed.jsonl"
    lines.touch()

    def left() -> float:
        return sizes.patience * seconds - (time.monotonic() - start)

    commands = {"checks": ["-m", "pytest", "-q", "-p", "no:cacheprovider", *sizes.checks],
                **{f"speed {network}": benchmark(folder, network, sizes.fast, sizes) for network in ("msdnet10", "ranet8")},
                "compile": benchmark(folder, "msdnet10", sizes.compiled, sizes)}
    done = [part(folder, name, command, sizes.patience * LIMITS[name]) for name, command in commands.items()]
    try:
        way, speed = fastest([json.loads(line) for line in lines.read_text().splitlines()])
    except ValueError:
        way, speed = "default", PLANNED_FOR[0]
    time_left = left() - EVALUATION_S
    epochs = epochs_that_fit(time_left, speed, sizes)
    print(f"\ntraining by {way}, {speed:.0f} images/s: {epochs} epochs in at most {time_left:.0f} s")
    done.append(part(folder, "training", training(folder, data_root, epochs, way, sizes), time_left))
    done += [part(folder, "evaluation", command, left()) for command in evaluations(folder, data_root, sizes)]
    return all(done)


def stand_in_data(folder: Path) -> str:
    sys.path.insert(0, str(ROOT))
    from tiny import make_images
    return str(make_images(folder))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="new folder for everything that is written")
    parser.add_argument("--data-root", metavar="DIR", help="CIFAR-100, as train_cifar100.py takes it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole session (default: %(default)s)")
    parser.add_argument("--plan", type=float, nargs="?", const=0, metavar="IMAGES_PER_S",
                        help="print how long each part takes at this speed, or at several, and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with stand-in sizes and images")
    args = parser.parse_args(argv)
    if args.plan is not None:
        print(plan_table([args.plan] if args.plan > 0 else PLANNED_FOR))
        return 0
    if not args.folder or not (args.data_root or args.dry_run):
        parser.error("a session needs FOLDER and --data-root")
    if args.folder.exists():
        parser.error(f"{args.folder} is there already; name a new folder")
    args.folder.mkdir(parents=True)
    folder = args.folder.resolve()
    data_root = stand_in_data(folder / "images") if args.dry_run else str(Path(args.data_root).resolve())
    return 0 if session(folder, data_root, STAND_IN if args.dry_run else REAL, args.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
