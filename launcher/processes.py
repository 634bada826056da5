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
from pathlib import Path
from typing import NamedTuple, TextIO

import psutil

from launcher import local
from sparse_zero.stopping import STOPPED

POLL_SECONDS = 0.1
GRACE_SECONDS = 60.0
"""From the first signal to the last."""
LAUNCHER_SECONDS = 10.0
"""How long a launcher may take to see that its ranks have ended; DeepSpeed's looks once in a second."""


class Ending(NamedTuple):
    """How the ranks ended."""

    status: int
    """The exit status of a rank; 128 + n where signal n ended it, or ended this command; STOPPED where the ranks were
    told to end and saved what they had."""
    stopped: bool
    """Whether this process was told to stop."""


def run(command: local.Command, stdout: TextIO | None = None, grace_seconds: float = GRACE_SECONDS) -> Ending:
    """Run `command` to its end, and end all its processes when this one gets SIGINT, SIGTERM or SIGHUP.

    The first signal reaches each rank once, as SIGTERM; after `grace_seconds`, or at a second signal, whatever is
    left is killed. SIGUSR1, the warning that a scheduler gives, is passed on, and nothing is killed for it.
    Takes every descendant of this process for its own: call it from the command line only.
    """
    _adopt_orphans()
    with _signals() as (received, warnings):
        # In a session of its own it does not see the terminal's Ctrl-C, which ends each Python with a traceback.
        process = subprocess.Popen(command.argv, env=command.environ(), stdout=stdout, start_new_session=True)
        warned: set[psutil.Process] = set()
        while process.poll() is None and not received:
            time.sleep(POLL_SECONDS)
            if warnings:
                _warn(warned)
        orphans = [] if received else _ranks(_descendants())
        _end_descendants(received, grace_seconds)
    status = exit_status(process.wait())
    if status == STOPPED:
        return Ending(status, stopped=True)
    if received:
        return Ending(128 + received[0], stopped=True)
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
    launchers_deadline = 0.0
    while alive := _descendants():
        now = time.monotonic()
        ranks = _ranks(alive)
        if len(received) > 1 or now > deadline:
            for process in alive:
                _send(process, signal.SIGKILL)
        # The launchers are spared while there are ranks: they would cut the ranks' time to save their work. Then they
        # are given time to see with what status the ranks have ended.
        elif ranks or now > launchers_deadline:
            for process in set(ranks or alive) - told:
                _send(process, signal.SIGTERM)
                told.add(process)
        if ranks:
            launchers_deadline = now + LAUNCHER_SECONDS
        time.sleep(POLL_SECONDS)


def _warn(warned: set[psutil.Process]) -> None:
    """Pass SIGUSR1 on to each rank once, as soon as the rank has a handler for it: without one it would die."""
    for process in set(_ranks(_descendants())) - warned:
        if _handles(process, signal.SIGUSR1):
            _send(process, signal.SIGUSR1)
            warned.add(process)


def _handles(process: psutil.Process, signum: int) -> bool:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True  # not Linux, or gone
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signum - 1) & 1)


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
def _signals() -> Iterator[tuple[list[int], list[int]]]:
    """Collects the signals that ask for an end, and the warnings (SIGUSR1) apart, but not those that the caller
    ignores (nohup, a shell's `&`).
    """
    received: list[int] = []
    warnings: list[int] = []
    asked = {signal.SIGINT: received, signal.SIGTERM: received, signal.SIGHUP: received, signal.SIGUSR1: warnings}
    before = {signum: signal.getsignal(signum) for signum in asked}
    for signum, collected in asked.items():
        if before[signum] is not signal.SIG_IGN:
            signal.signal(signum, lambda number, frame, collected=collected: collected.append(number))
    try:
        yield received, warnings
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, on Linux."""
    PR_SET_CHILD_SUBREAPER = 36
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
