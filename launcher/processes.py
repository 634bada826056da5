"""Runs the command that starts the ranks, and ensures that no rank outlives it.

The launchers do not reliably end their ranks. DeepSpeed's runner forwards no signal: it dies, and its ranks continue
to train. torchrun starts every rank in a separate session, where a signal to the process group does not reach it.
Therefore this process adopts the orphans of its children, and looks for ranks among all its descendants.
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
"""From the first signal to SIGKILL."""
OUTCOME_SECONDS = 15.0
"""How long the ranks may take to end after the watchdog has told them to end at once."""
LOST_SECONDS = 1.5
"""How long after the end of a launcher its ranks count as ending with it. Also the time in which a rank tells more."""
STACKS_SECONDS = 1.0
"""How long ranks may take to write their stacks to their logs before they are killed."""
LAUNCHER_SECONDS = 10.0
"""How long a launcher may take to notice that its ranks have ended. DeepSpeed's launcher polls once a second."""


class RunExit(NamedTuple):
    """How the ranks of a run exited."""

    status: int
    """The exit status of a rank; 128 + n if signal n ended the rank or this command; STOPPED if the ranks were told to
    stop and saved a checkpoint."""
    stopped: bool
    """Whether the run was told to stop."""
    is_explained: bool = False
    """Whether the reason has already been printed."""


def run(
    command: Command, watchdog: Watchdog, stdout: TextIO | None = None, grace_seconds: float = GRACE_SECONDS
) -> RunExit:
    """Run `command` until it ends, and end all its processes when this process gets SIGINT, SIGTERM or SIGHUP.

    The first signal reaches the ranks of all hosts through `watchdog`; ranks that have not joined it yet get SIGTERM.
    After `grace_seconds`, or at a second signal, all processes that are left are killed. SIGUSR1, a scheduler's
    warning, is passed on in the same way, but nothing is killed. If the watchdog reports a failure, the ranks end by
    themselves, and a launcher that does not notice is killed. If a launcher ends before its ranks, here or on another
    host, the ranks are asked to save and stop, as by a signal; this is a failure, unless they all finish.

    Call this function from the command line only: it treats every descendant of this process as part of the run.

    Args:
        command: starts the ranks.
        watchdog: of this run.
        stdout: for the output of the ranks; None: this process's own.
        grace_seconds: how long the ranks may take to save a checkpoint and exit.

    Raises UserError: the command cannot be started, or a file that it reads cannot be written.
    """
    _adopt_orphans()
    # Its files are removed whatever signal arrives from here on.
    with _signals() as (received, warnings), command.written_files():
        # A new session keeps the terminal's Ctrl-C from every Python, each of which would print a traceback.
        process = _start(command, stdout)
        warned: set[psutil.Process] = set()
        while process.poll() is None and not (received or watchdog.outcome or watchdog.lost_launcher):
            time.sleep(POLL_SECONDS)
            if warnings:
                watchdog.request_stop()
                _warn(warned, watchdog)
        if process.poll() is not None and not received:
            time.sleep(POLL_SECONDS)  # A scheduler's signal to all processes of a job may reach this one last.
        if received:
            watchdog.request_stop()
        elif process.poll() is not None:
            _check_launcher(process, watchdog)
        patience = OUTCOME_SECONDS if watchdog.outcome else grace_seconds
        _end_descendants(received, watchdog, patience)
    status = exit_status(process.wait())
    outcome = watchdog.wait_for_outcome()
    if watchdog.has_finished:
        return RunExit(0, stopped=False)
    if watchdog.lost_launcher and not received:
        return RunExit(status if status > 128 else 1, stopped=False, is_explained=True)
    if status == STOPPED:
        return RunExit(status, stopped=True)
    if received:
        return RunExit(128 + received[0], stopped=True)
    if outcome is not None:
        # If a signal ended a rank, the launcher's status may name the signal; the outcome does not.
        return RunExit(status if status > 128 else outcome.status, stopped=not outcome.is_error, is_explained=True)
    return RunExit(status, stopped=False)


def _check_launcher(process: subprocess.Popen, watchdog: Watchdog) -> None:
    """Tell `watchdog` if the launcher, which has ended, was killed or has left ranks behind."""
    program, *words = process.args
    module = words[1] if words[:1] == ["-m"] else Path(program).name
    name = f"{module} (process {process.pid})"
    if process.returncode < 0:
        watchdog.lose_launcher(f"{name} {killed_by(-process.returncode)}")
        return
    # A rank whose own launcher was killed reports it. DeepSpeed's runner then exits with 0.
    deadline = time.monotonic() + LOST_SECONDS
    while _ranks(_descendants()) or watchdog.has_connected_ranks:
        if watchdog.wait_for_outcome() or watchdog.lost_launcher:
            return
        if time.monotonic() > deadline:
            watchdog.lose_launcher(f"{name} exited with status {process.returncode} before its ranks")
            return
        time.sleep(POLL_SECONDS)


def killed_by(signum: int) -> str:
    """What to say of a process that a signal has ended."""
    names = {known.value: known.name for known in signal.Signals}
    hint = " (possibly by the kernel, out of memory)" if signum == signal.SIGKILL else ""
    return f"was killed by {names.get(signum, f'signal {signum}')}{hint}"


def _start(command: Command, stdout: TextIO | None) -> subprocess.Popen:
    try:
        return subprocess.Popen(command.argv, env=command.environ(), stdout=stdout, start_new_session=True)
    except OSError as error:
        raise UserError(f"{command.argv[0]}: {error.strerror}") from None


def exit_status(returncode: int) -> int:
    """The shell's exit status for a launcher's return code: 128 + n if signal n ended the launcher or a rank.

    DeepSpeed's launcher passes a rank's -n to sys.exit, which exits with 256 - n. 255 is the status of `sys.exit(-1)`.
    """
    if returncode < 0:
        return 128 - returncode
    return 128 + 256 - returncode if 192 <= returncode < 255 else returncode


def _end_descendants(received: list[int], watchdog: Watchdog, patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    kill_at: float | None = None
    signalled: set[psutil.Process] = set()
    # After a failure the launchers get time to notice it. After a signal, one that has no rank yet ends at once.
    has_failed = watchdog.outcome or watchdog.lost_launcher
    launchers_deadline = time.monotonic() + LAUNCHER_SECONDS if has_failed else 0.0
    while (alive := _descendants()) or (watchdog.lost_launcher and watchdog.has_connected_ranks):
        now = time.monotonic()
        ranks = _ranks(alive)
        if now > deadline and kill_at is None:
            watchdog.end_stuck(patience_seconds)
            kill_at = now + STACKS_SECONDS
        if len(received) > 1 or (kill_at is not None and now > kill_at):
            watchdog.end("killed")
            for process in alive:
                _send(process, signal.SIGKILL)
            if not alive:
                break  # ranks of other hosts, whose connections are closed with the watchdog
        # The launchers get no signal while there are ranks: they would kill ranks that are saving. After that they get
        # time to read the exit status of the ranks.
        elif ranks:
            for process in set(_ranks_not_joined(ranks, watchdog)) - signalled:
                _send(process, signal.SIGTERM)
                signalled.add(process)
        elif not watchdog.has_connected_ranks and now > launchers_deadline:
            for process in set(alive) - signalled:
                # At SIGTERM, a launcher that waits for a lost host would try to clean up on that host.
                _send(process, signal.SIGKILL if watchdog.outcome else signal.SIGTERM)
                signalled.add(process)
        if ranks or watchdog.has_connected_ranks:
            launchers_deadline = now + LAUNCHER_SECONDS
        time.sleep(POLL_SECONDS)


def _warn(warned: set[psutil.Process], watchdog: Watchdog) -> None:
    """Pass SIGUSR1 on to each rank once, as soon as the rank has a handler for it. Without a handler it would die."""
    for process in set(_ranks_not_joined(_ranks(_descendants()), watchdog)) - warned:
        if _handles(process, signal.SIGUSR1):
            _send(process, signal.SIGUSR1)
            warned.add(process)


def _ranks_not_joined(ranks: Iterable[psutil.Process], watchdog: Watchdog) -> list[psutil.Process]:
    """The ranks that have not joined the watchdog, and so have not received its messages."""
    members = watchdog.pids(socket.gethostname())
    return [rank for rank in ranks if rank.pid not in members]


def _handles(process: psutil.Process, signum: int) -> bool:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True  # not Linux, or the process has ended
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signum - 1) & 1)


def _ranks(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes that a launcher started as ranks, without the workers that ranks have forked."""
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
    """Collect signals while the block runs. A signal that the caller ignores (nohup, a shell's `&`) stays ignored.

    Yields: two lists that grow: the signals that end the run (SIGINT, SIGTERM, SIGHUP), and the warnings (SIGUSR1).
    """
    received: list[int] = []
    warnings: list[int] = []
    handled = {signal.SIGINT: received, signal.SIGTERM: received, signal.SIGHUP: received, signal.SIGUSR1: warnings}
    before = {signum: signal.getsignal(signum) for signum in handled}
    for signum, collected in handled.items():
        if before[signum] is not signal.SIG_IGN:
            signal.signal(signum, lambda number, frame, collected=collected: collected.append(number))
    try:
        yield received, warnings
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _adopt_orphans() -> None:
    """On Linux, become the parent of descendants whose own parent dies."""
    PR_SET_CHILD_SUBREAPER = 36
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
