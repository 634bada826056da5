"""Detects the failure of a rank and ends all other ranks. Does not import torch.

torch's collectives detect a lost host only after their timeout, half an hour by default. A killed rank makes all
others fail with exceptions of their own. Here, every rank has a TCP connection to one watchdog, in the process that
started the run or in rank 0. The kernel closes the connection of a process that has died, and answers keepalive probes
for a process that is busy; a lost host does not answer. So the ranks need not send heartbeats, and none can be late.

Messages (see `messages`) from a rank: hello, failure, stopping, lost-launcher, bye. To a rank: welcome, all-joined,
stop, outcome, bye.
"""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from sparse_zero.errors import printable, printable_line
from sparse_zero.ranks.connection import Connection
from sparse_zero.ranks.failures import (
    Failure,
    Kind,
    Outcome,
    RankInfo,
    describe_lost_launcher,
    describe_stuck,
    find_root_cause,
)
from sparse_zero.ranks.messages import random_text
from sparse_zero.ranks.sockets import enable_keepalive, is_unreachable, raise_open_files_limit

SETTLE_SECONDS = 0.4
"""Time from the first failure to the outcome. A launcher may kill the other ranks within a second."""
_STRANGER_SECONDS = 60.0
"""How long a connection may take to introduce itself, if there are others."""
_MAX_STRANGERS = 8192
"""The most connections that have not introduced themselves. There may be as many ranks at once."""


class Address(NamedTuple):
    """Where a watchdog listens, and the secret that ranks must know."""

    host: str
    port: int
    token: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}:{self.token}"

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The inverse of `str(address)`."""
        host, port, token = text.rsplit(":", 2)
        return cls(host, int(port), token)


def _failure(rank: int, kind: Kind, message: dict[str, Any]) -> Failure:
    """The failure that a rank reports. It ends the other ranks, so its status is never that of a success."""
    status = int(message["status"])
    return Failure(
        rank,
        kind,
        printable(str(message["message"])),
        printable(str(message.get("traceback", ""))),
        status if 0 < status < 256 else 1,
    )


class Watchdog:
    """Accepts the connections of the ranks of one run, in its own thread.

    Args:
        on_outcome: called with the outcome, in the watchdog's thread, before the ranks are told to exit; before that
            also with the reason of a lost launcher, after which the ranks save and stop.
        silence_seconds: time without an answer after which a host counts as lost.
        host: the name or address under which the ranks connect.
        token: the secret of the run; None: a new one.
    """

    def __init__(
        self,
        on_outcome: Callable[[Outcome], None],
        silence_seconds: float,
        host: str = "127.0.0.1",
        token: str | None = None,
    ) -> None:
        self.ranks: dict[int, RankInfo] = {}
        """All ranks that have joined, by number."""
        self.outcome: Outcome | None = None
        self.on_last_join: Callable[[], None] = lambda: None
        """Called when no rank is to join any more: all have joined, or the run ends. May be called several times."""
        self.lost_launcher: str | None = None
        """Why the ranks have to stop: a launcher has ended before them."""
        self._on_outcome, self._silence_seconds = on_outcome, silence_seconds
        self._world_size: int | None = None
        self._join_seconds = 0.0
        self._join_deadline: float | None = None
        self._connections: dict[socket.socket, Connection] = {}
        self._strangers: dict[Connection, None] = {}
        """Those that have not introduced themselves, the oldest first."""
        self._failures: list[Failure] = []
        self._finished: set[int] = set()
        self._outcome_at: float | None = None
        self._is_stopping = False
        self._is_closing = False
        self._lock = threading.RLock()
        raise_open_files_limit()
        # Listen on all interfaces: other hosts may know this host by another name than it has for itself.
        local = host in ("127.0.0.1", "localhost")
        self._listener = socket.create_server(("127.0.0.1" if local else "", 0), backlog=4096)
        self.address = Address(host, self._listener.getsockname()[1], token or random_text())
        self._listener.setblocking(False)
        self._waker, self._wake = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="watchdog", daemon=True)
        self._thread.start()

    def expect(self, world_size: int | None, seconds: float) -> None:
        """Report ranks as missing that do not join within this time, counted from now.

        Args:
            world_size: the number of ranks; None: known only when the first rank joins.
            seconds: the time limit.
        """
        with self._lock:
            self._world_size = self._world_size or world_size
            self._join_seconds = seconds
            if len(self.ranks) != self._world_size:
                self._join_deadline = time.monotonic() + seconds
        self._wake.send(b"x")

    def pids(self, host: str) -> set[int]:
        """Process ids of the ranks on a host that have joined, including those that have left."""
        with self._lock:
            return {rank.pid for rank in self.ranks.values() if rank.host == host}

    @property
    def has_connected_ranks(self) -> bool:
        """Whether a rank has joined and not left yet."""
        with self._lock:
            return any(connection.info and not connection.has_left for connection in self._connections.values())

    def request_stop(self) -> None:
        """Ask all ranks to save a checkpoint and exit, including ranks that join later."""
        with self._lock:
            if not self._is_stopping:
                self._is_stopping = True
                self._broadcast({"type": "stop"})

    def lose_launcher(self, reason: str) -> None:
        """Ask all ranks to save and exit because a launcher has ended before them. Only the first reason counts."""
        with self._lock:
            if self.lost_launcher is None and self.outcome is None and not self.has_finished:
                self.lost_launcher = reason
                message = f"{reason}; the ranks are asked to save and stop"
                with contextlib.suppress(OSError, ValueError):
                    self._on_outcome(Outcome(message, 1, ()))
                self.request_stop()

    @property
    def has_finished(self) -> bool:
        """Whether all ranks have left with status 0: the run has come to its end."""
        with self._lock:
            return self._world_size is not None and len(self._finished) == self._world_size

    def end(self, message: str, status: int = 1) -> None:
        """End all ranks now. `on_outcome` is not called."""
        with self._lock:
            self._set_outcome(Outcome(message, status, ()))

    def end_stuck(self, seconds: float) -> None:
        """End all ranks, which have not stopped, and name them. Args: seconds: how long they had to stop."""
        with self._lock:
            connected = [each for each in self._connections.values() if each.info and not each.has_left]
            if self.outcome is None and connected:
                stuck = sorted(each.info.rank for each in connected)
                silent = sorted(each.info.rank for each in connected if not each.is_stopping)
                outcome = Outcome(describe_stuck(stuck, silent, self.ranks, seconds), 1, tuple(silent or stuck))
                with contextlib.suppress(OSError, ValueError):
                    self._on_outcome(outcome)
                self._set_outcome(outcome, with_stacks=True)

    def wait_for_outcome(self) -> Outcome | None:
        """The outcome. If a failure is being examined, wait for the result; None if there was no failure."""
        while self._outcome_at is not None:
            time.sleep(0.01)
        return self.outcome

    def close(self) -> None:
        """Close all connections. The ranks are told, so that they do not take it for a failure."""
        if self._is_closing:
            return
        self._is_closing = True
        with contextlib.suppress(OSError):  # the thread saw the flag and ended before this message
            self._wake.send(b"x")
        self._thread.join(timeout=5)
        self._wake.close()

    def _serve(self) -> None:
        while not self._is_closing:
            for key, _ in self._selector.select(self._seconds_to_deadline()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._waker:
                    self._waker.recv(64)
                elif key.fileobj in self._connections:
                    self._read(self._connections[key.fileobj])
            self._check_deadlines()
        with self._lock:
            self._broadcast({"type": "bye"})
        self.on_last_join()
        for each in (*self._connections, self._listener, self._waker):
            each.close()
        self._selector.close()

    def _seconds_to_deadline(self) -> float | None:
        deadlines = [each for each in (self._outcome_at, self._join_deadline) if each is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        with self._lock:
            if self._join_deadline is not None and now >= self._join_deadline:
                self._join_deadline = None
                expected = range(self._world_size or 1)
                for rank in [rank for rank in expected if rank not in self.ranks]:
                    self._add_failure(Failure(rank, "missing"))
            if self._outcome_at is not None and now >= self._outcome_at:
                unreachable = any(failure.kind == "unreachable" for failure in self._failures)
                seconds = self._silence_seconds if unreachable else self._join_seconds
                outcome = find_root_cause(self._failures, self.ranks, seconds)
                # The ranks must exit even if this process's output can no longer be written.
                with contextlib.suppress(OSError, ValueError):
                    self._on_outcome(outcome)
                self._set_outcome(outcome)
                self._outcome_at = None

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # No file descriptor is left. The rank stays in the queue; sleep, so that this loop does not spin.
            time.sleep(0.1)
            return
        connection.setblocking(False)
        enable_keepalive(connection, self._silence_seconds)
        with self._lock:
            self._connections[connection] = Connection(connection, self.address.token)
        self._strangers[self._connections[connection]] = None
        self._selector.register(connection, selectors.EVENT_READ)
        while (oldest := next(iter(self._strangers))).accepted_at < time.monotonic() - _STRANGER_SECONDS or (
            len(self._strangers) > _MAX_STRANGERS
        ):
            # Whoever does not know the secret must not use up the open files.
            self._close(oldest)

    def _read(self, connection: Connection) -> None:
        unreachable = False
        try:
            messages = connection.receive()
            with self._lock:
                for message in messages or []:
                    self._handle(connection, message)
        except BlockingIOError:
            return
        except OSError as error:
            messages, unreachable = None, is_unreachable(error)
        except (ValueError, KeyError, TypeError, RecursionError):
            messages = None  # not a rank of this run
        if messages is None:
            self._close(connection)
            with self._lock:
                if connection.info and not connection.has_left and not self._is_closing:
                    self._add_failure(Failure(connection.info.rank, "unreachable" if unreachable else "died"))

    def _close(self, connection: Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._strangers.pop(connection, None)
        with self._lock:
            del self._connections[connection.socket]

    def _handle(self, connection: Connection, message: dict[str, Any]) -> None:
        """Args: message: its sender knows the secret of the run."""
        kind = message["type"]
        if kind == "hello" and connection.info is None:
            log = message["log"]
            connection.info = RankInfo(
                int(message["rank"]),
                printable_line(str(message["host"])),
                int(message["pid"]),
                None if log is None else printable_line(str(log)),
            )
            self._world_size = int(message["world_size"])
            self.ranks[connection.info.rank] = connection.info
            self._strangers.pop(connection, None)
            connection.send({"type": "welcome"})
            if self.outcome is not None:
                connection.send({"type": "outcome", "status": self.outcome.status})
            elif self._is_stopping:
                connection.send({"type": "stop"})
            if len(self.ranks) == self._world_size:
                self._join_deadline = None
                self.on_last_join()
                reporter = self._fallback_reporter()
                self._broadcast(
                    {"type": "all-joined", "rank_0_host": self.ranks[0].host, "fallback_reporter": reporter}
                )
        elif connection.info is None:
            raise ValueError("the sender has not introduced itself")
        elif kind == "failure":
            self._add_failure(_failure(connection.info.rank, message["kind"], message))
        elif kind == "stopping":
            connection.is_stopping = True
        elif kind == "lost-launcher":
            self.lose_launcher(describe_lost_launcher(connection.info, int(message["process"])))
        elif kind == "bye":
            connection.has_left = True
            if message["message"] or len(self.ranks) != self._world_size:
                # No rank has done its work before all have joined.
                message["message"] = message["message"] or "left before all ranks had joined"
                self._add_failure(_failure(connection.info.rank, "stopped", message))
            elif message["status"] == 0:
                self._finished.add(connection.info.rank)

    def _fallback_reporter(self) -> int:
        """The rank that tells the user if the watchdog's process dies: the first one on another host than rank 0, or
        else the first one after rank 0.
        """
        others = sorted(rank for rank in self.ranks if rank != 0)
        elsewhere = [rank for rank in others if self.ranks[rank].host != self.ranks[0].host]
        return next(iter(elsewhere or others), 0)

    def _add_failure(self, failure: Failure) -> None:
        if self.outcome is None:
            self._failures.append(failure)
            if self._outcome_at is None:
                self._outcome_at = time.monotonic() + SETTLE_SECONDS

    def _set_outcome(self, outcome: Outcome, with_stacks: bool = False) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self.on_last_join()
            stacks = {"with_stacks": True} if with_stacks else {}
            self._broadcast({"type": "outcome", "status": outcome.status, **stacks})

    def _broadcast(self, message: dict[str, Any]) -> None:
        connected = [each for each in self._connections.values() if each.info and not each.has_left]
        # Rank 0 comes last: if it runs the watchdog, an outcome ends this process.
        for connection in sorted(connected, key=lambda each: each.info.rank, reverse=True):
            connection.send(message)
