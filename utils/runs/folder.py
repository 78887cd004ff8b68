"""A run's folder and what is written to it: log, TensorBoard scalars, results.json."""
from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from utils import __version__
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.files import read_json, sweep, write_json
from utils.core.lock import locked
from utils.core.log import close_log, open_log
from utils.core.machine import peak_memory, versions
from utils.runs.checkpoint import BEST, LATEST, NAMES, PREVIOUS, TEST_BEST, load_latest
from utils.runs.result_files import RESULTS

SPLIT = "split.pth"


class Run:
    """Where a run writes; in all processes but the first it writes nothing.

    Args:
        open_writer: makes TensorBoard's writer; None writes no scalars.
    Attributes:
        folder: of the run.
        log: logger to the terminal and, in the first process, to train.log.
        results: content of results.json.
    """

    def __init__(self, folder: Path, *, open_writer: Callable[..., Any] | None, results: dict[str, Any],
                 device: torch.device) -> None:
        self.folder, self.results = folder, results
        self.log = logging.getLogger("boostnet")
        self._open_writer, self._writer, self._device = open_writer, None, device

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        """Write TensorBoard scalars. What goes wrong there ends the scalars, with a warning, and not the run."""
        if self._open_writer is None:
            return
        try:
            self._writer = self._writer or self._open_writer(purge_step=epoch)
            for name, value in values.items():
                self._writer.add_scalar(name, value, epoch)
            self._writer.flush()
        except Exception as error:   # it stands on half a dozen other packages
            self._open_writer = None
            _warn_of_tensorboard(error)

    def save_results(self) -> None:
        """Rewrite results.json."""
        if distributed.is_main():
            for name, peak in peak_memory(self._device).items():
                self.results[name] = max(peak, self.results[name])
            write_json(self.folder / RESULTS, self.results)

    def close(self) -> None:
        if self._writer is not None and self._open_writer is not None:
            self._writer.close()


@contextmanager
def claim(folder: str) -> Iterator[None]:
    """Make the folder of a run, keep other runs out of it while the block runs, tidy it up and open its log.

    Raises:
        UserError: when the folder cannot be written, or belongs to a run that is still going on.
    """
    with ExitStack() as stack:
        if distributed.is_main():
            path = Path(folder)
            try:
                path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(path))
                sweep(path, own=(*NAMES, RESULTS, SPLIT))
                open_log(path / "train.log")
            except OSError as error:
                raise UserError(f"--result_dir {path} cannot be written: {error.strerror}") from error
            stack.callback(close_log)
        yield


def find_run(folder: str, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from in `folder`; None where a new run starts.

    A run whose processes torchrun has started again (--max-restarts) goes on by itself.

    Raises:
        UserError: when the folder holds a run already and `resume` is off, or no good checkpoint of it and it is on.
    """
    path = Path(folder)
    again = distributed.any_rank(distributed.was_restarted())
    saved = load_latest(path) if resume or again else None
    if saved and (resume or saved["training"].get("job") == distributed.job()):
        return saved
    # A hold-out split alone is of a run that ended before it saved anything; the same flags draw it again.
    if distributed.is_main() and (left := _results_in(path)):
        if resume:
            raise UserError(f"{path} holds {left[0]} of a run, but no checkpoint that it could be resumed from; name another "
                            "--result_dir")
        raise UserError(f"{path} already holds a run; pass --resume to continue it, or another --result_dir")
    return None


def _results_in(folder: Path) -> list[str]:
    """Names of what a run has left in `folder`. A file system that fails is an error here, and no empty folder."""
    names = set(os.listdir(folder))
    return [name for name in (RESULTS, LATEST, PREVIOUS, BEST, TEST_BEST) if name in names]


def epochs_begun(saved: dict[str, Any]) -> int:
    """Epochs of a run that its checkpoint has behind it, with the one it stopped in."""
    return saved["epoch"] + (1 if saved["training"]["figures"].get("steps") else 0)


def finished(folder: Path, epochs: int) -> bool:
    """Whether the run in `folder` was tested after `epochs` epochs, so that nothing is left to do; the log says so."""
    try:
        tested = read_json(folder / RESULTS, {"test": {"epoch": int}})["test"]["epoch"]
    except (UserError, OSError):   # whatever is wrong with it, the run will write it again
        return False
    if tested == epochs and distributed.is_main():
        logging.getLogger("boostnet").info("the run in %s is finished: nothing to do", folder)
    return tested == epochs


# Flags that say what a run begins with.
BEGINNING = ("checkpoint", "checkpoint_key", "new_classifier", "start_epoch")


def start_run(args: argparse.Namespace, data, device: torch.device, saved: dict[str, Any] | None) -> Run:
    """Write down what the run in --result_dir is: the flags it began with, its data and its machine.

    Raises:
        UserError: when TensorBoard's folder cannot be made.
    """
    path = Path(args.result_dir)
    scalars = Path(args.tensorboard_dir) if args.tensorboard_dir else path / "log"
    config = plain(vars(args))
    if saved:   # where the run began, a command with --resume does not say again
        config |= {name: saved["training"]["config"][name] for name in BEGINNING
                   if name in saved["training"]["config"]}
    if distributed.is_main():
        try:   # not after the first epoch, when TensorBoard would
            scalars.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--tensorboard_dir {scalars} cannot be written: {error.strerror}") from error
        if data.split is not None:
            data.split.save(path / SPLIT)
    results = {"format": 1, "version": __version__, "config": config, "processes": distributed.world_size(),
               "n_train": data.n_train, "data_hash": data.data_hash, "split_hash": data.split.hash if data.split else None,
               "versions": versions(device), **_peaks_so_far(path)}
    return Run(path, open_writer=_tensorboard(scalars) if distributed.is_main() else None, results=results, device=device)


def _peaks_so_far(folder: Path) -> dict[str, int]:
    """Peak memory of the run before it was stopped; 0 where it begins, or an older version did not measure it."""
    peaks = dict.fromkeys(("peak_rss_bytes", "peak_cuda_bytes"), 0)
    try:
        before = read_json(folder / RESULTS, dict.fromkeys(peaks, int), peaks)
    except (UserError, OSError):   # whatever is wrong with it, the run will write it again
        return peaks
    return {name: before[name] for name in peaks}


def _tensorboard(folder: Path) -> Callable[..., Any] | None:
    """Makes a writer of TensorBoard's files in `folder`; None, with a warning, where TensorBoard is missing or broken."""
    try:   # now and not after the first epoch, since nobody looks at the terminal any more by then
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:
        _warn_of_tensorboard(error)
        return None
    return partial(SummaryWriter, folder)


def _warn_of_tensorboard(error: Exception) -> None:
    logging.getLogger("boostnet").warning(
        "TensorBoard does not work here (%s: %s); the run goes on without it, with all figures in train.log and %s; `pip install "
        "--upgrade tensorboard` puts it right", type(error).__name__, " ".join(str(error).split()), RESULTS)


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Flags as plain types that JSON and `weights_only` checkpoints can hold."""
    return {name: value if isinstance(value, (int, float, bool, list, type(None))) else str(value)
            for name, value in config.items() if name != "explicit"}
