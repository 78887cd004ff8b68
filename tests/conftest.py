"""Which tests can run here. Those that cannot are deselected, and the summary says why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tiny networks gain nothing from threads, and on a busy machine threads that wait for each other are far slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# --deterministic needs it before CUDA's first matrix product, which may be another test's.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

VARIABLE = "BOOSTNET_TEST_DATA"
DESELECTED = pytest.StashKey[Counter]()


def _obstacle(marker: str) -> str | None:
    """Why tests with this marker cannot run here; None when they can."""
    if marker == "realdata" and not os.environ.get(VARIABLE):
        return f"{VARIABLE} is not set; it names a folder with cifar100/ and imagenet_sample/"
    if marker == "gpu":
        import torch

        return None if torch.cuda.is_available() else "torch sees no CUDA device"
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DESELECTED] = Counter()
    folder = os.environ.get(VARIABLE)
    if folder and not Path(folder).is_dir():
        raise pytest.UsageError(f"{VARIABLE} is {folder}, which is no folder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    markers = {marker for marker in ("realdata", "gpu") if any(item.get_closest_marker(marker) for item in items)}
    obstacles = {marker: reason for marker in markers if (reason := _obstacle(marker))}
    blocked = [item for item in items if any(item.get_closest_marker(marker) for marker in obstacles)]
    if blocked:
        config.hook.pytest_deselected(items=blocked)
        items[:] = [item for item in items if item not in blocked]
        config.stash[DESELECTED].update(
            f"{marker}: {reason}" for marker, reason in obstacles.items() for item in blocked
            if item.get_closest_marker(marker))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason, count in config.stash[DESELECTED].items():
        terminalreporter.write_line(f"deselected {count} {'test' if count == 1 else 'tests'} marked {reason}")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with cifar100/{train,test}/<class>/*.png and imagenet_sample/<wnid>/*.JPEG, for tests marked realdata."""
    return Path(os.environ[VARIABLE])


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Take back what --deterministic sets for the whole process."""
    import torch

    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    torch.utils.deterministic.fill_uninitialized_memory = fill
