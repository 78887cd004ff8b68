"""The one exception a user's mistake raises; entry scripts print it as one line and exit with code 2."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A wrong flag, file or folder: the message says what was found, what was expected and how to put it right."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn UserError and FileNotFoundError into one line on stderr and exit code 2; everything else is a bug and shows."""
    try:
        yield
    except (UserError, FileNotFoundError) as error:
        sys.exit(fail(error))


def fail(error: Exception) -> int:
    """Print an error as one line and return the exit code for a user's mistake."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
