"""Jobs of several processes, as torchrun starts them."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINUTE = 60


def launch(world: int, *arguments: object, options: str = "", output: Path) -> subprocess.Popen:
    """Start torchrun, in a process group of its own, with all that is printed going to a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", *options.split(),
               *map(str, arguments)]
    with open(output, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(job: subprocess.Popen, output: Path) -> None:
    """Wait for a job to end well."""
    try:
        assert job.wait(5 * MINUTE) == 0, output.read_text()
    finally:
        end(job)


def end(job: subprocess.Popen) -> None:
    """End what may be left of a job: torchrun gives every process it starts a group of its own."""
    for pid in [*children(job), job.pid] if job.poll() is None else []:
        os.killpg(pid, signal.SIGKILL)
    job.wait()


def children(job: subprocess.Popen) -> list[int]:
    return [int(pid) for path in Path(f"/proc/{job.pid}/task").glob("*/children") for pid in path.read_text().split()]


def kill_rank(job: subprocess.Popen, rank: int) -> None:
    [victim] = [pid for pid in children(job)
                if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    os.kill(victim, signal.SIGKILL)


def wait_until(happened: Callable[[], bool], job: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + 3 * MINUTE
    while not happened():
        assert job.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)
