"""Run a script as `python SCRIPT ARG...` would, and write down how much memory it took.

    python utils/footprint.py FILE SCRIPT ARG...

However the script ends, short of being killed, FILE then holds {"peak_rss_bytes": ..., "peak_cuda_bytes": ...}; of a run that
goes on with the same FILE after a stop, the larger values. The second is what PyTorch's tensors took of the GPU, 0 without one.
"""
from __future__ import annotations

import json
import os
import resource
import runpy
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    path, script = Path(argv[0]).absolute(), argv[1]
    sys.argv = argv[1:]
    sys.path[0] = str(Path(script).absolute().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        write_largest(path, {"peak_rss_bytes": peak_rss_bytes(), "peak_cuda_bytes": peak_cuda_bytes()})


def peak_rss_bytes() -> int:
    """The most memory this program has had resident at one time."""
    try:   # what getrusage says begins with the memory of the process that started this one
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_cuda_bytes() -> int:
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_initialized() else 0


def write_largest(path: Path, figures: dict[str, int]) -> None:
    """Write figures as JSON, each no smaller than the file says already."""
    try:
        before = {name: int(value) for name, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError):   # none yet, or damaged
        before = {}
    whole = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    whole.write_text(json.dumps({name: max(value, before.get(name, 0)) for name, value in figures.items()}) + "\n")
    whole.replace(path)


if __name__ == "__main__":
    main(sys.argv[1:])
