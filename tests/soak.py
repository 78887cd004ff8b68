"""A long run that is killed again and again and has to end with the bits of one that was left alone. Not part of the test suite.

    python tests/soak.py                  # an hour
    python tests/soak.py --minutes 15 --seed 1

A third of the time one process trains undisturbed, while its memory and open files are watched. Then the same run is repeated
under signals at random moments, most of them SIGKILL, some of its checkpoints are damaged between the lives of the process,
and it is resumed until it is done.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tiny import command, differences, make_images, outcome  # noqa: E402

from utils.core.errors import INTERRUPTED, STOPPED  # noqa: E402
from utils.runs import checkpoint  # noqa: E402

SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
SETUP = "--method boost --optimizer sgd --loss_equal --batch-size 8 --lr_f 0.01".split()


def start(images: Path, folder: Path, epochs: int) -> subprocess.Popen:
    line = command(images, folder, *SETUP, "--epochs", str(epochs), "--resume")
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen([sys.executable, "train_cifar100.py", *line], cwd=ROOT, stdout=log, stderr=log)


def epoch_seconds(images: Path, folder: Path) -> float:
    """Time of an epoch with everything that belongs to it, from the times at which the log has it."""
    assert start(images, folder, epochs=12).wait() == 0
    seconds = [entry["seconds"] for entry in json.loads((folder / "results.json").read_text())["epochs"][2:]]
    return 1.3 * sum(seconds) / len(seconds)   # with validation and saving


def watch(process: subprocess.Popen) -> list[tuple[float, int]]:
    """(megabytes, open files) of a process every two seconds until it ends."""
    samples = []
    while process.poll() is None:
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            samples.append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{process.pid}/fd"))))
        except OSError:   # it has just ended
            pass
        time.sleep(2)
    return samples


def disturb(images: Path, folder: Path, epochs: int, draw: random.Random, longest_s: float) -> Counter:
    """Bring a run to its end through signals and damaged files; how often each of them happened."""
    events: Counter = Counter()
    latest, damaged = folder / checkpoint.LATEST, b""
    while True:
        process = start(images, folder, epochs)
        try:
            code = process.wait(draw.uniform(0, longest_s))
        except subprocess.TimeoutExpired:
            number = draw.choice(SIGNALS)
            process.send_signal(number)
            code = process.wait()
            # While Python still loads modules, the signals do what they do to any program.
            assert code in (0, STOPPED, INTERRUPTED, -number), f"{number.name} gave exit code {code}"
            events[number.name] += 1
        else:
            assert code == 0, f"exit code {code}"
        # Only a process that was ended while it started may not yet have set the damaged file aside.
        still_damaged = code != 0 and bool(damaged) and latest.exists() and latest.read_bytes() == damaged
        for name in (checkpoint.LATEST, checkpoint.PREVIOUS, checkpoint.BEST):
            if (folder / name).exists() and not (name == checkpoint.LATEST and still_damaged):
                checkpoint.load(folder / name)
        if code == 0:
            return events
        if draw.random() < 0.1 and (folder / checkpoint.PREVIOUS).exists() and latest.exists() and not still_damaged:
            whole = latest.read_bytes()
            damaged = whole[:draw.randrange(1, len(whole))]
            latest.unlink()   # the previous one may be another name of the same file
            latest.write_bytes(damaged)
            events["damaged checkpoint"] += 1


def soak(minutes: float, seed: int, longest_s: float, workplace: Path) -> bool:
    began = time.monotonic()
    images = make_images(workplace / "images", classes=3, train=200, test=20)
    epochs = max(2, round(minutes * 60 / 3 / epoch_seconds(images, workplace / "speed")))
    print(f"{epochs} epochs of 74 steps", flush=True)
    undisturbed = start(images, workplace / "undisturbed", epochs)
    samples = watch(undisturbed)
    assert undisturbed.returncode == 0
    events = disturb(images, workplace / "disturbed", epochs, random.Random(seed), longest_s)
    differing = list(differences(outcome(workplace / "disturbed"), outcome(workplace / "undisturbed")))
    tenth = max(1, len(samples) // 10)
    # The middle of the samples: a file that is just being written is open now and then.
    (megabytes, files), (megabytes_late, files_late) = (
        map(median, zip(*part)) for part in (samples[tenth:2 * tenth], samples[-tenth:]))
    happened = ", ".join(f"{n} {name}" for name, n in events.most_common())
    print(f"{(time.monotonic() - began) / 60:.0f} minutes, {epochs} epochs, {happened}\n"
          f"differences to the undisturbed run: {len(differing)} {differing[:5] if differing else ''}\n"
          f"memory {megabytes:.0f} MB early, {megabytes_late:.0f} MB late; open files {files:.0f} early, {files_late:.0f} late")
    return not differing and files_late <= files and megabytes_late < 1.05 * megabytes + 5


def main() -> int:
    parser = argparse.ArgumentParser(description="Train under random kills and compare with an undisturbed run.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the signals' times and kinds")
    parser.add_argument("--longest", type=float, default=30, metavar="SECONDS", help="longest life of a process under signals")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as workplace:
        good = soak(args.minutes, args.seed, args.longest, Path(workplace))
    print("passed" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
