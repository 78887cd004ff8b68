"""Programs, which are run with `python -m utils.NAME`, and the packages that they and the scripts are made of. Stops at once on a
system that the project does not run on.
"""
import sys

__version__ = "0.2"   # in every checkpoint and results file

try:
    import fcntl  # noqa: F401
    from signal import SIGUSR1, pthread_sigmask  # noqa: F401
except ImportError:
    program = sys.argv[0].replace("\\", "/").rpartition("/")[2]
    print(f"{program}: error: this project runs on Linux and macOS, not on {sys.platform}; on Windows use WSL", file=sys.stderr)
    raise SystemExit(2) from None
