"""The exceptions that end a program with one line instead of a traceback, and the exit codes that go with them."""
from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Exit codes: a user's mistake, a failure while running, Ctrl-C, and a run that a signal stopped in good order (EX_TEMPFAIL).
MISTAKE, FAILURE, INTERRUPTED, STOPPED = 2, 1, 130, 75


# What the system says of paths that are no good.
MISTAKEN_PATHS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}

# Seconds that a process waits with its error for the error of another one.
GRACE_S = 5


class UserError(ValueError):
    """A wrong flag, file or folder: the message says what was found, what was expected and how to put it right."""


class TrainingDiverged(RuntimeError):
    """A loss or a weight is no longer a finite number."""


class WorkerKilled(RuntimeError):
    """A process that prepares images was ended from outside."""


class Stopped(BaseException):
    """A signal came while the run waited for images. Like KeyboardInterrupt no Exception: nothing may take it for a bad file."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what users and machines do wrong into one line on stderr and an exit code; everything else is a bug and shows."""
    if hasattr(sys.stdout, "reconfigure"):   # the name of a file may hold what the terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (UserError, FileNotFoundError) as error:
        sys.exit(fail(error))
    except OSError as error:   # a path that cannot be is a mistake; a full disk or too many open files are not
        sys.exit(fail(error, MISTAKE if error.errno in MISTAKEN_PATHS else FAILURE))
    except (TrainingDiverged, WorkerKilled, MemoryError) as error:
        sys.exit(fail(error if str(error) else "out of memory", FAILURE))
    except RuntimeError as error:
        if "DataLoader worker" in str(error):   # its advice about shared memory does not apply here
            reason = str(error).splitlines()[0].partition(". ")[0]
            sys.exit(fail(f"a process that loads images was killed, most likely because memory ran out ({reason}); start again "
                          "with more memory or fewer --workers", FAILURE))
        if not is_out_of_memory(error):
            raise
        sys.exit(fail(str(error).splitlines()[0], FAILURE))
    except KeyboardInterrupt:
        sys.exit(fail("interrupted", INTERRUPTED))
    except Stopped as stop:
        sys.exit(fail(str(stop), STOPPED))


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch, which has several ways to say so, found no memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in ("out of memory", "can't allocate memory"))


def wait_for_other_errors() -> None:
    """In one of several processes: wait, for an error that most likely is another one's as well, or its consequence.

    When that one has said so and left, torchrun ends this process; the user then reads it once, not once per process.
    """
    if "RANK" in os.environ:
        time.sleep(GRACE_S)


def wait_unless_first() -> None:
    """`wait_for_other_errors` in all processes but the first."""
    if os.environ.get("RANK") != "0":
        wait_for_other_errors()


def fail(error: Exception | str, code: int = MISTAKE) -> int:
    """Print an error as one line and return the exit code."""
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    wait_unless_first()
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
