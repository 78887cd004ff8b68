"""What a run prints and logs."""
from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from utils.core import distributed


def open_log(path: Path | None = None) -> None:
    """Log to the terminal, and append to a file where one is given."""
    log = logging.getLogger("boostnet")
    log.setLevel(logging.INFO)
    log.propagate = False
    close_log()
    terminal = logging.StreamHandler(sys.stdout)
    terminal.handleError = _ignore_broken_pipe
    terminal.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(terminal)
    if path is not None:
        file = logging.FileHandler(path)
        file.handleError = lambda record: None   # a full disk: the next checkpoint says so, and better
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(file)


def echo(*lines: object) -> None:
    """Print, in the first process. A reader that has gone, as in `| head`, ends the output and nothing else."""
    if distributed.is_main():
        try:
            print(*lines, sep="\n", flush=True)
        except BrokenPipeError:
            _discard_output()


def note(line: str | None) -> None:
    """Log a line, if there is one, in the first process; where no log is open, print it."""
    if line and distributed.is_main():
        log = logging.getLogger("boostnet")
        if log.handlers:
            log.info("%s", line)
        else:
            echo(line)


def _ignore_broken_pipe(record: logging.LogRecord) -> None:
    """Go on when stdout is a pipe whose reader has ended, as `tee` does at Ctrl-C."""
    if isinstance(sys.exc_info()[1], BrokenPipeError):   # not for a single line that could not be written
        _discard_output()


def _discard_output() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def close_log() -> None:
    log = logging.getLogger("boostnet")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
