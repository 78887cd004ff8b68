"""Files that are either complete or absent."""
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

# In the name of a file that is not complete yet, in front of the number of the process that writes it.
TEMPORARY = ".boostnet-tmp."


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file beside `path` that takes its place only when the block ends without an error.

    The data reach the disk before the name does, so a killed process or a full disk leaves the old file as it was.

    Raises:
        OSError: with `path` and the reason, when it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            to_disk(file)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except Exception as error:
        reason = error if isinstance(error, OSError) else error.__context__   # torch.save covers up what the disk said
        if not isinstance(reason, OSError) or not reason.errno:
            raise
        raise OSError(reason.errno, f"cannot be written: {reason.strerror}", str(path)) from error
    finally:
        with suppress(OSError):   # never in place of the error that matters
            temporary.unlink(missing_ok=True)


def to_disk(file: BinaryIO) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Bring a new name to the disk as well; some file systems cannot, and say so with an error."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`."""
    for temporary in folder.glob(f"*{TEMPORARY}*"):
        if temporary.suffix[1:].isdigit():
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is whole or absent."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
