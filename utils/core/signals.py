"""Signals that ask a run to stop: noted when they come, answered by the training loop between two steps."""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

from utils.core import distributed
from utils.core.errors import STOPPED, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
T = TypeVar("T")
_waiting_for_images = False


class StopSignals:
    """Takes note of SIGTERM, SIGINT, SIGUSR1 and SIGHUP inside its `with` block; a second SIGINT raises KeyboardInterrupt.

    SIGHUP (a connection that was lost) stays ignored where it is, as by nohup.

    Attributes:
        received: name of the first signal that came, None before.
        begun: whether there is a training loop to answer. Before that a signal ends the program, with nothing to save.
    """

    def __init__(self, begun: bool = True) -> None:
        self.received: str | None = None
        self.begun = begun
        self._interrupted = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():   # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS
                              if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.begun:
            with suppress(OSError):
                os.write(2, f"\n{signal.Signals(number).name}: stopped before the first step, nothing to save\n".encode())
            raise SystemExit(STOPPED)
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.received = self.received or signal.Signals(number).name
        if _waiting_for_images and distributed.world_size() == 1:   # several processes have to agree, between two steps
            raise Stopped(f"{self.received}: stopped while waiting for images")
        # print() must not be called here: the signal may have come in the middle of another print().
        with suppress(OSError):   # the terminal may be gone
            os.write(2, f"\n{self.received}: finishing this step, then saving (Ctrl-C twice leaves at once)\n".encode())


def interruptible(images: Iterable[T]) -> Iterator[T]:
    """The same batches; inside `StopSignals`, a signal that comes while the next one is awaited raises Stopped.

    The next step, after which a signal is answered otherwise, may be far: a file system may not answer for minutes.
    """
    global _waiting_for_images
    images = iter(images)
    while True:
        _waiting_for_images = True
        try:
            batch = next(images)
        except StopIteration:
            return
        finally:
            _waiting_for_images = False
        yield batch


def leave_signals_to_parent(worker: int = 0, *, first_sigterm: bool = True) -> None:
    """For processes that prepare images: what a scheduler or Ctrl-C sends to the whole job, the parent answers.

    Only the first SIGTERM is ignored, and none without `first_sigterm`. It is also how a parent ends a process that hangs;
    PyTorch's loader tries more than once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    once = (lambda number, frame: signal.signal(number, signal.SIG_DFL)) if first_sigterm else signal.SIG_DFL
    signal.signal(signal.SIGTERM, once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait until the block is over. Processes started in it are safe from them until `leave_signals_to_parent`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
