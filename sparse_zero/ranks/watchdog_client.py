"""A rank's place in the watchdog: it says that it is there, what it fails of, and when it leaves."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import Any, Literal

from sparse_zero.errors import UserError
from sparse_zero.ranks.failures import DIED, Member, Outcome, say_silent
from sparse_zero.ranks.placement import Placement
from sparse_zero.ranks.stop_signals import StopRequest
from sparse_zero.ranks.watchdog import Address, Watchdog, is_out_of_reach, watch_the_line

WATCH_VARIABLE = "SPARSE_ZERO_WATCH"
"""The environment variable by which `sparse-zero train` tells its ranks where it keeps their watchdog."""
_OUTCOME_SECONDS = 10.0
"""How long a rank that failed waits to hear what the cause was."""
_MOST_CHARACTERS = 20_000
"""Of a message or a traceback; the watchdog drops a rank that sends too long a line."""


class WatchdogClient:
    """One rank's connection to the watchdog, read by a thread that ends the process when the outcome comes."""

    def __init__(
        self,
        address: Address,
        me: Member,
        world_size: int,
        stop: StopRequest,
        silence_seconds: float,
        patience_seconds: float = 60,
        watcher: Literal["launcher", "rank 0"] = "launcher",
        console: int = 2,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Connect.

        Args: stop: where a request to stop goes; watcher: who runs the watchdog; console: the descriptor for what the
        user must read; watchdog: where this rank runs it.

        Raises UserError: nobody is there within `patience_seconds`.
        """
        self._me, self._stop, self._watcher, self._console = me, stop, watcher, console
        self._silence_seconds = silence_seconds
        self._watchdog = watchdog
        self._watchers_host, self._speaker = "its host", me.rank
        self._has_left = False
        self._has_ended = threading.Event()
        self._lock = threading.RLock()  # a signal may come in the middle of a message
        self._connection = _connect(address, patience_seconds)
        watch_the_line(self._connection, silence_seconds)
        self._send(
            type="hello",
            token=address.token,
            rank=me.rank,
            world_size=world_size,
            host=me.host,
            pid=me.pid,
            log=me.log,
        )
        stop.before_exit = self.leave
        threading.Thread(target=self._listen, name="watchdog-client", daemon=True).start()

    def report(self, message: str, traceback: str = "", status: int = 1) -> None:
        """Say that this rank cannot go on, and wait for the outcome, which ends the process.

        Returns only where no outcome comes, and tells the user then. Without a traceback it is an error of the user's.
        """
        kind = "failure" if traceback else "refusal"
        words = {"message": message[:_MOST_CHARACTERS], "traceback": traceback[-_MOST_CHARACTERS:]}
        self._send(type="failure", kind=kind, status=status, **words)
        self._has_ended.wait(_OUTCOME_SECONDS)
        self._say(f"rank {self._me.rank} on {self._me.host}: {message}")

    def leave(self, status: int = 0, message: str = "") -> None:
        """Part from the others. Args: message: why, where the others have not agreed to it; they will end too."""
        self._has_left = True
        if self._watchdog is not None:
            # It ends with this process, and the others would take that for this rank's death.
            if message:
                self._watchdog.end(message, status)
            self._watchdog.close()
        self._send(type="bye", status=status, message=message)

    def _send(self, **message: object) -> None:
        with contextlib.suppress(OSError), self._lock:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        try:
            with self._connection.makefile("r", encoding="utf-8") as lines:
                for line in lines:
                    message = json.loads(line)
                    if message["type"] == "outcome":
                        self._end(message["status"])
                    elif message["type"] == "stop":
                        self._stop.ask()
                    elif message["type"] == "roster":
                        self._watchers_host, self._speaker = message["host"], message["speaker"]
                    elif message["type"] == "bye":
                        return
            self._lose(is_silent=False)
        except OSError as error:
            self._lose(is_silent=is_out_of_reach(error))
        finally:
            self._has_ended.set()

    def _lose(self, is_silent: bool) -> None:
        """The process that runs the watchdog is gone."""
        if self._has_left:
            return
        if self._watcher == "launcher":
            if not is_silent:
                # Whoever killed it wants this run to end; it need not lose its work.
                self._stop.ask()
                return
            if self._me.rank == 0:
                self._say(f"the host that started this run has not answered for {self._silence_seconds:g} s")
        elif self._me.rank == self._speaker:
            self._say(f"rank 0 on {self._watchers_host} {say_silent(self._silence_seconds) if is_silent else DIED}")
        self._end(1)

    def _say(self, message: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._console, f"sparse-zero: error: {message}\n".encode())

    def _end(self, status: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                stream.flush()
        os._exit(status)


def _connect(address: Address, patience_seconds: float) -> socket.socket:
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            connection = socket.create_connection(address[:2], timeout=5)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{socket.gethostname()} cannot reach {address.host}:{address.port}, where the ranks are watched "
                    f"from ({error.strerror or error}): let ranks connect to any port of that host"
                ) from None
            time.sleep(0.2)
        else:
            connection.settimeout(None)
            return connection


def join_launcher(placement: Placement, me: Member, stop: StopRequest, **settings: Any) -> WatchdogClient | None:
    """Join the watchdog of the `sparse-zero train` that started this rank; None where nothing of the kind did.

    Args: settings: of WatchdogClient.
    """
    address = os.environ.get(WATCH_VARIABLE)
    if not address:
        return None
    return WatchdogClient(Address.parse(address), me, placement.world_size, stop, watcher="launcher", **settings)


def announce(outcome: Outcome) -> None:
    """Print an outcome for the user: the traceback that it began with, and the line that says what and where."""
    # A terminal's last line may be a progress bar.
    start = "\n" if sys.stderr.isatty() else ""
    sys.stderr.write(
        f"{start}{outcome.traceback}sparse-zero: {'error: ' if outcome.is_error else ''}{outcome.message}\n"
    )
    sys.stderr.flush()
