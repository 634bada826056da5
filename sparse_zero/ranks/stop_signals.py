"""SIGTERM and SIGUSR1: a run that is told to stop saves what it has and says so with its exit status.

Slurm sends SIGTERM when it preempts a job, and with --signal=USR1@120 a warning two minutes before the time limit.
Imports no torch: the handlers stand before a rank starts to import.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

STOPPED = 75
"""The exit status of a run that was told to stop and can go on from its checkpoint; sysexits.h: try again later."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_SAME_REQUEST_SECONDS = 1.5
"""A scheduler may signal the launcher and its ranks at once, and the launcher passes on what it got."""


class Stopped(Exception):
    """The ranks have agreed to stop, and what they had is saved."""

    def __init__(self, step: int, checkpoint: str | None) -> None:
        super().__init__(f"stopped at step {step}")
        self.step, self.checkpoint = step, checkpoint


class StopRequest:
    """What the signals have asked of this rank.

    Until `deferred`, there is nothing to save, and a signal ends the process at once, with status STOPPED. Within
    `deferred` the first is remembered, and whoever trains asks `is_raised`. A second one always ends the process.
    """

    def __init__(self) -> None:
        self.is_raised = False
        self.before_exit: Callable[[int, str], None] = lambda status, message: None
        """Called with the exit status and the reason before a signal ends the process at once."""
        self._deferred = False
        self._process = os.getpid()
        self._raised_at = 0.0

    def listen(self) -> "StopRequest":
        """Install the handlers. Call it in the main thread."""
        for signum in _SIGNALS:
            signal.signal(signum, self._receive)
        return self

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def ask(self) -> None:
        """What a signal does, from any thread; but asking twice is no more than asking once."""
        if not self.is_raised:
            self._raise()

    def _receive(self, signum: int, frame: object) -> None:
        if os.getpid() != self._process:
            # A forked helper of this rank, which has nothing to save
            os._exit(128 + signum)
        if not self.is_raised:
            self._raise()
        elif time.monotonic() - self._raised_at > _SAME_REQUEST_SECONDS:
            self._exit(128 + signum)

    def _raise(self) -> None:
        self.is_raised, self._raised_at = True, time.monotonic()
        if not self._deferred:
            self._exit(STOPPED)

    def _exit(self, status: int) -> None:
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            sys.stdout.flush()
        self.before_exit(status, "was told to stop")
        os._exit(status)
