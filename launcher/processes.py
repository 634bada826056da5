"""Runs the command that starts the ranks, and leaves none of them behind.

What stands between this process and the ranks cannot be relied on to end them. DeepSpeed's runner forwards no
signal: it dies, and its ranks train on. torchrun puts every rank in a session of its own, out of reach of a
signal to the process group. Therefore this process adopts what its children leave behind, and looks for ranks
among all its descendants.
"""

import contextlib
import ctypes
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import psutil

import launcher.ways.command
from launcher.ways.command import Command
from sparse_zero.errors import UserError
from sparse_zero.ranks.stop_signals import STOPPED
from sparse_zero.ranks.watchdog import Watchdog

POLL_SECONDS = 0.1
GRACE_SECONDS = 60.0
"""From the first signal to the last."""
OUTCOME_SECONDS = 15.0
"""How long ranks may take to end that have been told to end at once."""
LAUNCHER_SECONDS = 10.0
"""How long a launcher may take to see that its ranks have ended; DeepSpeed's looks once in a second."""


class Ending(NamedTuple):
    """How the ranks ended."""

    status: int
    """The exit status of a rank; 128 + n where signal n ended it, or ended this command; STOPPED where the ranks were
    told to end and saved what they had."""
    stopped: bool
    """Whether the run was told to stop."""
    is_explained: bool = False
    """Whether the user has been told why."""


def run(
    command: Command, watchdog: Watchdog, stdout: TextIO | None = None, grace_seconds: float = GRACE_SECONDS
) -> Ending:
    """Run `command` to its end, and end all its processes when this one gets SIGINT, SIGTERM or SIGHUP.

    The ranks of all hosts hear of the first signal through `watchdog`, or as SIGTERM where they have not joined it
    yet; after `grace_seconds`, or at a second signal, whatever is left is killed. SIGUSR1, a scheduler's warning, is
    passed on likewise, and nothing is killed for it. When the watchdog has an outcome, the ranks end by
    themselves, and the launcher that does not see it is killed.

    Takes every descendant of this process for its own: call it from the command line only.
    """
    _adopt_orphans()
    with _signals() as (received, warnings):
        # In a session of its own it does not see the terminal's Ctrl-C, which ends each Python with a traceback.
        process = _start(command, stdout)
        warned: set[psutil.Process] = set()
        while process.poll() is None and not received and watchdog.outcome is None:
            time.sleep(POLL_SECONDS)
            if warnings:
                watchdog.ask_to_stop()
                _warn(warned, watchdog)
        if received:
            watchdog.ask_to_stop()
        orphans = [] if received or watchdog.outcome else _ranks(_descendants())
        patience = OUTCOME_SECONDS if watchdog.outcome else grace_seconds
        _end_descendants(received, watchdog, patience)
    status = exit_status(process.wait())
    outcome = watchdog.conclude()
    if status == STOPPED:
        return Ending(status, stopped=True)
    if received:
        return Ending(128 + received[0], stopped=True)
    if outcome is not None:
        # A launcher may have a status of its own for a rank that a signal has ended.
        return Ending(status if status > 128 else outcome.status, stopped=not outcome.is_error, is_explained=True)
    # DeepSpeed's runner reports success when the launcher below it was killed.
    return Ending(1 if orphans and status == 0 else status, stopped=False)


def _start(command: Command, stdout: TextIO | None) -> subprocess.Popen:
    try:
        return subprocess.Popen(command.argv, env=command.environ(), stdout=stdout, start_new_session=True)
    except OSError as error:
        raise UserError(f"{command.argv[0]}: {error.strerror}") from None


def exit_status(returncode: int) -> int:
    """The shell's status for a launcher's return code: 128 + n where signal n ended the launcher or a rank.

    DeepSpeed's launcher gives a rank's -n to sys.exit, which leaves 256 - n. 255 is what `sys.exit(-1)` makes.
    """
    if returncode < 0:
        return 128 - returncode
    return 128 + 256 - returncode if 192 <= returncode < 255 else returncode


def _end_descendants(received: list[int], watchdog: Watchdog, patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    told: set[psutil.Process] = set()
    # One that has not seen the failure yet is about to; one that has started no rank yet need not.
    launchers_deadline = time.monotonic() + LAUNCHER_SECONDS if watchdog.outcome else 0.0
    while alive := _descendants():
        now = time.monotonic()
        ranks = _ranks(alive)
        if len(received) > 1 or now > deadline:
            watchdog.end("killed")
            for process in alive:
                _send(process, signal.SIGKILL)
        # The launchers are spared while there are ranks: they would cut the ranks' time to save their work. Then they
        # are given time to see with what status the ranks have ended.
        elif ranks:
            for process in set(_strangers(ranks, watchdog)) - told:
                _send(process, signal.SIGTERM)
                told.add(process)
        elif not watchdog.is_anybody_there and now > launchers_deadline:
            for process in set(alive) - told:
                # A launcher that waits for a lost host would try to clean up there.
                _send(process, signal.SIGKILL if watchdog.outcome else signal.SIGTERM)
                told.add(process)
        if ranks or watchdog.is_anybody_there:
            launchers_deadline = now + LAUNCHER_SECONDS
        time.sleep(POLL_SECONDS)


def _warn(warned: set[psutil.Process], watchdog: Watchdog) -> None:
    """Pass SIGUSR1 on to each rank once, as soon as the rank has a handler for it: without one it would die."""
    for process in set(_strangers(_ranks(_descendants()), watchdog)) - warned:
        if _handles(process, signal.SIGUSR1):
            _send(process, signal.SIGUSR1)
            warned.add(process)


def _strangers(ranks: Iterable[psutil.Process], watchdog: Watchdog) -> list[psutil.Process]:
    """Those of `ranks` that have not come to the watchdog, where they would have heard what is asked of them."""
    members = watchdog.pids(socket.gethostname())
    return [rank for rank in ranks if rank.pid not in members]


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
            if process.cmdline()[1:4] == ["-u", "-m", launcher.ways.command.TRAINING_MODULE]:
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
