"""Runs the command that starts the ranks, and leaves none of them behind.

What stands between this process and the ranks cannot be relied on to end them. DeepSpeed's runner forwards no
signal: it dies, and its ranks train on. torchrun puts every rank in a session of its own, out of reach of a
signal to the process group. Therefore this process adopts what its children leave behind, and looks for ranks
among all its descendants.
"""

import contextlib
import ctypes
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TextIO

import psutil

from launcher import local

POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0
"""From the first signal to the last; torchrun and DeepSpeed's launcher use the same."""


class Ending(NamedTuple):
    """How the ranks ended."""

    status: int
    """The exit status of a rank; 128 + n where signal n ended it, or ended this command."""
    stopped: bool
    """Whether this process was told to stop."""


def run(command: local.Command, stdout: TextIO | None = None, grace_seconds: float = GRACE_SECONDS) -> Ending:
    """Run `command` to its end, and end all its processes when this one gets SIGINT, SIGTERM or SIGHUP.

    The first signal reaches each rank once, as SIGTERM; after `grace_seconds`, or at a second signal, whatever is
    left is killed. Takes every descendant of this process for its own: call it from the command line only.
    """
    _adopt_orphans()
    with _signals() as received:
        # In a session of its own it does not see the terminal's Ctrl-C, which ends each Python with a traceback.
        process = subprocess.Popen(command.argv, env=command.environ(), stdout=stdout, start_new_session=True)
        while process.poll() is None and not received:
            time.sleep(POLL_SECONDS)
        orphans = [] if received else _ranks(_descendants())
        _end_descendants(received, grace_seconds)
    if received:
        return Ending(128 + received[0], stopped=True)
    status = exit_status(process.wait())
    # DeepSpeed's runner reports success when the launcher below it was killed.
    return Ending(1 if orphans and status == 0 else status, stopped=False)


def exit_status(returncode: int) -> int:
    """The shell's status for a launcher's return code: 128 + n where signal n ended the launcher or a rank.

    DeepSpeed's launcher gives a rank's -n to sys.exit, which leaves 256 - n. 255 is what `sys.exit(-1)` makes.
    """
    if returncode < 0:
        return 128 - returncode
    return 128 + 256 - returncode if 192 <= returncode < 255 else returncode


def _end_descendants(received: list[int], grace_seconds: float) -> None:
    deadline = time.monotonic() + grace_seconds
    told: set[psutil.Process] = set()
    while alive := _descendants():
        if len(received) > 1 or time.monotonic() > deadline:
            for process in alive:
                _send(process, signal.SIGKILL)
        else:
            # The launchers are spared while there are ranks: they would cut the ranks' time to save their work.
            for process in set(_ranks(alive) or alive) - told:
                _send(process, signal.SIGTERM)
                told.add(process)
        time.sleep(POLL_SECONDS)


def _ranks(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of `processes` that a launcher started as a rank, without the workers that ranks have forked."""
    ranks = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[1:4] == ["-u", "-m", local.TRAINING_MODULE]:
                ranks[process] = process.ppid()
    pids = {rank.pid for rank in ranks}
    return [rank for rank, parent in ranks.items() if parent not in pids]


def _descendants() -> list[psutil.Process]:
    alive = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def _send(process: psutil.Process, signum: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signum)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that ask for an end, but not those that the caller ignores (nohup, a shell's `&`)."""
    received: list[int] = []
    asked = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {signum: signal.getsignal(signum) for signum in asked}
    for signum in asked:
        if before[signum] is not signal.SIG_IGN:
            signal.signal(signum, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, on Linux."""
    PR_SET_CHILD_SUBREAPER = 36
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
