"""Files that are either complete or absent."""
from __future__ import annotations

import json
import os
import reprlib
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from utils.core.errors import UserError

# In the name of a file that is not complete yet, in front of the number of the process that writes it.
TEMPORARY = ".boostnet-tmp."

# Seconds without a byte after which a file that is not complete has lost its writer.
LEFT_OVER_S = 3600


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


def sweep(folder: Path, own: Collection[str] = ()) -> None:
    """Remove what killed processes left half-written in `folder`.

    Args:
        own: names of files that nobody else writes now. Of others, such as an evaluation beside a run, only what has not been
            written to for an hour is taken for left over.
    """
    for temporary in folder.glob(f"*{TEMPORARY}*"):
        name, _, writer = temporary.name.rpartition(TEMPORARY)
        with suppress(FileNotFoundError):   # complete by now
            if writer.isdigit() and (name in own or time.time() - temporary.stat().st_mtime > LEFT_OVER_S):
                temporary.unlink()


def require_writable(folder: Path, flag: str) -> None:
    """Make a folder and try whether files can be made in it.

    Raises:
        UserError: naming the flag to change, when not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror}") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is whole or absent."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path, required: Any = dict, older: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Content of a JSON file.

    Args:
        required: its shape, see `misfit`.
        older: entries that stand in for those that older versions did not write.
    Raises:
        UserError: when it is damaged or of something else.
        OSError: when it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if isinstance(content, dict):
        content = {**older, **content}
    if problem := misfit(content, required):
        raise UserError(f"{path} is damaged or of something else: {problem}")
    return content


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """What in a JSON value is not of a shape; None where it fits.

    A shape is a dict of names and shapes, for an object with at least these entries; [shape], for one or more values; a tuple, of
    which one fits; a type, where float stands for every finite number; or the value itself.
    """
    if isinstance(shape, tuple):
        problems = [misfit(value, one, place) for one in shape]
        return None if None in problems else problems[0]
    if isinstance(shape, dict) and isinstance(value, dict):
        for name, inner in shape.items():
            here = f"{place}.{name}" if place else name
            if problem := misfit(value[name], inner, here) if name in value else f"{here} is missing":
                return problem
        return None
    if isinstance(shape, list) and shape and isinstance(value, list) and value:
        problems = (misfit(entry, shape[0], f"{place}[{i}]") for i, entry in enumerate(value))
        return next(filter(None, problems), None)
    if shape is float:
        fits = type(value) in (int, float) and abs(value) < 1e30   # refuses NaN
    elif isinstance(shape, type):
        fits = type(value) is shape
    else:
        fits = type(value) is type(shape) and value == shape
    return None if fits else f"{place or 'its content'} cannot be {reprlib.repr(value)}"
