"""SIGTERM and SIGUSR1: the run saves a checkpoint and exits with status STOPPED.

Slurm sends SIGTERM when it preempts a job. With --signal=USR1@120 it sends SIGUSR1 two minutes before the time limit.
This module does not import torch: a rank installs the handlers before its long imports.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

STOPPED = 75
"""The exit status of a run that stopped on request and can resume from its checkpoint (EX_TEMPFAIL in sysexits.h)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_SAME_REQUEST_SECONDS = 1.5
"""Signals within this time count as one: a scheduler may signal the ranks and the launcher, which forwards it."""


class Stopped(Exception):
    """The ranks have agreed to stop, and their state is saved."""

    def __init__(self, step: int, checkpoint: str | None) -> None:
        super().__init__(f"stopped at step {step}")
        self.step, self.checkpoint = step, checkpoint


class StopRequest:
    """A request to stop, from a signal or from the watchdog.

    Outside `deferred` there is nothing to save, and a request ends the process at once, with status STOPPED. Within
    `deferred` the first request only sets `is_raised`, which the training loop checks. A second signal always ends the
    process.
    """

    def __init__(self) -> None:
        self.is_raised = False
        self.before_exit: Callable[[int, str], None] = lambda status, message: None
        """Called with the exit status and the reason before a request ends the process at once."""
        self._deferred = False
        self._process = os.getpid()
        self._raised_at = 0.0

    def install_handlers(self) -> "StopRequest":
        """Install the signal handlers and return self. Call it in the main thread."""
        for signum in _SIGNALS:
            signal.signal(signum, self._receive)
        return self

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block, the first request sets `is_raised` instead of ending the process."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def request(self) -> None:
        """Request a stop, as a signal does. May be called from any thread; further calls have no effect."""
        if not self.is_raised:
            self._raise()

    def _receive(self, signum: int, frame: object) -> None:
        if os.getpid() != self._process:
            # A forked child process of this rank, which has nothing to save
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
        self.before_exit(status, "received a stop request")
        os._exit(status)
