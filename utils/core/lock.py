"""One run at a time in a result folder."""
from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.core.errors import UserError

NAME = "run.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder` while the block runs; the system frees the lock when the process ends, however it does.

    Raises:
        UserError: when another process has it, naming that process.
    """
    with open(folder / NAME, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                raise UserError(f"{folder} is in use by another run ({file.read().strip() or 'unknown process'}); wait for its "
                                "end, or pass another --result_dir") from error
            logging.getLogger("boostnet").warning("%s: its file system has no locks (%s); make sure that no second run writes "
                                                  "there", folder, error.strerror)
        # A forked data loader would otherwise keep the lock of a process that was killed.
        os.register_at_fork(after_in_child=file.close)
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
        yield
