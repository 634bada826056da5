"""A rank's connection to the watchdog: it joins, reports failures, and exits when the watchdog ends the run."""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from typing import Any, Literal

from sparse_zero.errors import UserError, printable
from sparse_zero.ranks.failures import DIED, KILLED, Outcome, RankInfo, describe_lost_launcher, unreachable_message
from sparse_zero.ranks.messages import Messages, random_text
from sparse_zero.ranks.placement import Placement
from sparse_zero.ranks.sockets import enable_keepalive, is_unreachable
from sparse_zero.ranks.stop_signals import StopRequest
from sparse_zero.ranks.watchdog import Address, Watchdog

WATCH_VARIABLE = "SPARSE_ZERO_WATCH"
"""The environment variable in which `sparse-zero train` gives its ranks the address of the watchdog."""
_OUTCOME_SECONDS = 10.0
"""How long a failed rank waits for the outcome."""
_MAX_CHARACTERS = 20_000
"""Limit for a message and for a traceback. The watchdog disconnects a rank that sends a longer line than it allows."""


class WatchdogClient:
    """The connection of one rank to the watchdog. Its thread exits the process when the watchdog sends the outcome."""

    def __init__(
        self,
        address: Address,
        info: RankInfo,
        world_size: int,
        stop: StopRequest,
        silence_seconds: float,
        connect_seconds: float = 60,
        owner: Literal["launcher", "rank 0"] = "launcher",
        console: int = 2,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Connect to the watchdog.

        Args:
            address: where the watchdog listens.
            info: this rank, as it introduces itself.
            world_size: the number of ranks.
            stop: receives the watchdog's request to stop.
            silence_seconds: time without an answer after which the watchdog's host counts as lost.
            connect_seconds: how long to try to connect.
            owner: the process that runs the watchdog.
            console: file descriptor for messages to the user.
            watchdog: the watchdog itself, if this rank runs it.

        Raises:
            UserError: no connection within `connect_seconds`, or the other end does not know the secret of the run.
        """
        self._info, self._stop, self._owner, self._console = info, stop, owner, console
        self._silence_seconds = silence_seconds
        self._watchdog = watchdog
        self._rank_0_host, self._fallback_reporter = "its host", info.rank
        self._has_left = False
        self._has_ended = threading.Event()
        self._lock = threading.RLock()  # a signal may arrive while a message is sent
        self._connection = _connect(address, connect_seconds)
        enable_keepalive(self._connection, silence_seconds)
        self._lines = self._connection.makefile("rb")
        self._messages: Messages | None = None
        stop.before_exit = self.leave
        self._introduce(address, world_size, connect_seconds)
        threading.Thread(target=self._listen, name="watchdog-client", daemon=True).start()

    def report_failure(self, message: str, traceback: str = "", status: int = 1) -> None:
        """Report that this rank has failed, and wait for the outcome, which exits the process.

        If no outcome arrives, print the message and return.

        Args:
            message: one line.
            traceback: the traceback of an exception; empty for an error that the user can correct.
            status: the exit status of the run.
        """
        kind = "exception" if traceback else "user_error"
        words = {"message": message[:_MAX_CHARACTERS], "traceback": traceback[-_MAX_CHARACTERS:]}
        self._send(type="failure", kind=kind, status=status, **words)
        self._has_ended.wait(_OUTCOME_SECONDS)
        self._print_error(f"rank {self._info.rank} on {self._info.host}: {message}")

    def report_lost_launcher(self, process: int) -> None:
        """Tell the watchdog that this rank's launcher has ended, and request a stop.

        Args:
            process: the launcher's process id.
        """
        if self._has_left:
            return
        if self._watchdog is not None:
            # The message could come too late: outside training a stop request ends this process at once.
            self._watchdog.lose_launcher(describe_lost_launcher(self._info, process))
        self._send(type="lost-launcher", process=process)
        self._stop.request()

    def leave(self, status: int = 0, message: str = "") -> None:
        """Announce that this rank exits.

        Args:
            status: its exit status.
            message: why it exits, if the other ranks do not exit by themselves. They are ended with the same status.
        """
        self._has_left = True
        if self._watchdog is not None:
            # It ends with this process, which the other ranks would take for the death of this rank.
            if message:
                self._watchdog.end(message, status)
            self._watchdog.close()
        self._send(type="bye", status=status, message=message)

    def _introduce(self, address: Address, world_size: int, seconds: float) -> None:
        """Join, and make sure that the other end is the watchdog of this run."""
        info = {"rank": self._info.rank, "host": self._info.host, "pid": self._info.pid, "log": self._info.log}
        self._connection.settimeout(seconds)
        try:
            challenge, nonce = str(json.loads(self._lines.readline(4096))["challenge"]), random_text()
            self._messages = Messages(address.token, challenge, nonce, "rank")
            self._connection.sendall(json.dumps({"nonce": nonce}).encode() + b"\n")
            self._send(type="hello", world_size=world_size, **info)
            self._messages.read(self._lines.readline(4096))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{self._info.host}: the program at {address.host}:{address.port} is not the watchdog of this run: it "
                "has ended, or another program uses its port; start the run again"
            ) from None
        self._connection.settimeout(None)

    def _send(self, **message: object) -> None:
        if self._messages is None:
            return
        with contextlib.suppress(OSError), self._lock:
            self._connection.sendall(self._messages.write(message))

    def _listen(self) -> None:
        try:
            with self._lines:
                for line in self._lines:
                    message = self._messages.read(line)
                    if message["type"] == "outcome":
                        if message.get("with_stacks"):
                            self._write_stacks()
                        self._exit(message["status"] or 1)
                    elif message["type"] == "stop":
                        self._send(type="stopping")
                        self._stop.request()
                    elif message["type"] == "all-joined":
                        self._rank_0_host = message["rank_0_host"]
                        self._fallback_reporter = message["fallback_reporter"]
                    elif message["type"] == "bye":
                        return
            self._handle_lost_watchdog(unreachable=False)
        except OSError as error:
            self._handle_lost_watchdog(unreachable=is_unreachable(error))
        except ValueError:
            # Not a message of the watchdog: someone interferes with the connection.
            self._handle_lost_watchdog(unreachable=False)
        finally:
            self._has_ended.set()

    def _handle_lost_watchdog(self, unreachable: bool) -> None:
        """React to the end of the process that runs the watchdog."""
        if self._has_left:
            return
        if self._owner == "launcher":
            if not unreachable:
                # A killed launcher means that the run should end, but its work need not be lost.
                if self._info.rank == 0:
                    self._print_error(f"the command that started this run {KILLED}; the ranks save and stop")
                self._stop.request()
                return
            if self._info.rank == 0:
                self._print_error(f"the host that started this run {unreachable_message(self._silence_seconds)}")
        elif self._info.rank == self._fallback_reporter:
            reason = unreachable_message(self._silence_seconds) if unreachable else DIED
            self._print_error(f"rank 0 on {self._rank_0_host} {reason}")
        self._exit(1)

    def _write_stacks(self) -> None:
        """Write the Python stacks of all threads to this rank's log."""
        if self._info.log is not None:
            with contextlib.suppress(OSError), open(self._info.log, "a") as log:
                faulthandler.dump_traceback(log)

    def _print_error(self, message: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._console, f"sparse-zero: error: {printable(message)}\n".encode())

    def _exit(self, status: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                stream.flush()
        os._exit(status)


def _connect(address: Address, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection(address[:2], timeout=5)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{socket.gethostname()} cannot connect to the watchdog at {address.host}:{address.port} "
                    f"({error.strerror or error}); allow connections from all ranks to any port of that host"
                ) from None
            time.sleep(0.2)
        else:
            connection.settimeout(None)
            return connection


def join_launcher_watchdog(
    placement: Placement, info: RankInfo, stop: StopRequest, **settings: Any
) -> WatchdogClient | None:
    """Connect to the watchdog of the `sparse-zero train` process that started this rank.

    Args:
        settings: further arguments of WatchdogClient.

    Returns:
        The connection; None if this rank was not started by `sparse-zero train`.
    """
    # The rank's own children, such as a program that uploads metrics, need not know it.
    address = os.environ.pop(WATCH_VARIABLE, None)
    if not address:
        return None
    return WatchdogClient(Address.parse(address), info, placement.world_size, stop, owner="launcher", **settings)


def print_outcome(outcome: Outcome) -> None:
    """Print an outcome to stderr for the user: the traceback, if any, then the message."""
    # The last line on a terminal may be a progress bar.
    start = "\n" if sys.stderr.isatty() else ""
    sys.stderr.write(
        f"{start}{outcome.traceback}sparse-zero: {'error: ' if outcome.is_error else ''}{outcome.message}\n"
    )
    sys.stderr.flush()
