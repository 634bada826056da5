"""Knows which ranks of a run are there, and tells all of them when one is not. Imports no torch.

torch's collectives notice a lost host after their timeout, half an hour by default, and a rank that was killed makes
all others fail with exceptions of their own. Here every rank holds a connection to one place: the process that
started the run, or rank 0. The kernel closes the connection of a process that died, and answers for one that is
busy; a host that is gone does not answer at all. So nobody has to send a heartbeat, and nobody is late with one.

Lines of JSON go over it. From a rank: hello, failure, bye. To a rank: roster, stop, outcome.
"""

import contextlib
import errno
import hmac
import json
import resource
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from sparse_zero.ranks.failures import Failure, Member, Outcome, find_cause

SETTLE_SECONDS = 0.4
"""From the first failure to the outcome. A launcher that kills the other ranks may leave no more than a second."""
_MOST_FILES = 1 << 16
_MOST_BYTES = 1 << 20
"""Of one line: a traceback is the longest."""


class Address(NamedTuple):
    """Where a watchdog listens, and the secret that its members know."""

    host: str
    port: int
    token: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}:{self.token}"

    @classmethod
    def parse(cls, text: str) -> "Address":
        host, port, token = text.rsplit(":", 2)
        return cls(host, int(port), token)


def watch_the_line(connection: socket.socket, silence_seconds: float) -> None:
    """Make the kernel notice a peer whose host does not answer for `silence_seconds`."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = 4
    options = {
        "TCP_KEEPIDLE": max(1, round(silence_seconds / 3)),
        "TCP_KEEPINTVL": max(1, round(silence_seconds * 2 / 3 / probes)),
        "TCP_KEEPCNT": probes,
        # For bytes under way, which keepalive does not look after
        "TCP_USER_TIMEOUT": round(silence_seconds * 1000),
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def is_out_of_reach(error: OSError) -> bool:
    """Whether a connection broke because the peer's host does not answer, and not because the peer has ended."""
    return error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)


class _Line:
    """One connection: bytes in, whole messages out."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.member: Member | None = None
        self.has_left = False
        self._received = b""

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns: the messages that are complete; None at the end of the stream. Raises OSError, ValueError."""
        data = self.connection.recv(1 << 16)
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > (_MOST_BYTES if self.member else 4096):
            raise ValueError("not a member's line")
        return [json.loads(line) for line in lines]

    def send(self, message: dict[str, Any]) -> None:
        # An outcome is short, and the kernel takes it at once; a peer that is gone is noticed where it is read from.
        with contextlib.suppress(OSError):
            self.connection.send(json.dumps(message).encode() + b"\n")


def _allow_a_connection_for_each_rank() -> None:
    """At 1,024 open files, the usual limit, the thousandth rank would be refused; the hard limit is far above it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


class Watchdog:
    """Listens for the ranks of one run, in a thread of its own.

    Args:
        announce: called once, with the outcome, before the ranks are told; from that thread.
        silence_seconds: after how long without an answer a host counts as lost.
        host: the name that the ranks are given to connect to.
    """

    def __init__(self, announce: Callable[[Outcome], None], silence_seconds: float, host: str = "127.0.0.1") -> None:
        self.members: dict[int, Member] = {}
        self.outcome: Outcome | None = None
        self._announce, self._silence_seconds = announce, silence_seconds
        self._world_size: int | None = None
        self._arrival_seconds = 0.0
        self._arrival_deadline: float | None = None
        self._lines: dict[socket.socket, _Line] = {}
        self._failures: list[Failure] = []
        self._outcome_at: float | None = None
        self._is_stopping = False
        self._is_closing = False
        self._lock = threading.RLock()
        _allow_a_connection_for_each_rank()
        # On every interface: the hosts may reach this one by another name than it has for itself.
        local = host in ("127.0.0.1", "localhost")
        self._listener = socket.create_server(("127.0.0.1" if local else "", 0), backlog=4096)
        self.address = Address(host, self._listener.getsockname()[1], secrets.token_hex(16))
        self._listener.setblocking(False)
        self._waker, self._wake = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="watchdog", daemon=True)
        self._thread.start()

    def expect(self, world_size: int | None, seconds: float) -> None:
        """Give all ranks so long to come, from now. Args: world_size: None: not known before the first one comes."""
        with self._lock:
            self._world_size = self._world_size or world_size
            self._arrival_seconds = seconds
            if len(self.members) != self._world_size:
                self._arrival_deadline = time.monotonic() + seconds
        self._wake.send(b"x")

    def pids(self, host: str) -> set[int]:
        """The processes of this host that are members now, or were."""
        with self._lock:
            return {member.pid for member in self.members.values() if member.host == host}

    @property
    def is_anybody_there(self) -> bool:
        with self._lock:
            return any(line.member and not line.has_left for line in self._lines.values())

    def ask_to_stop(self) -> None:
        """Tell every rank, also those that have yet to come, to save and end."""
        with self._lock:
            if not self._is_stopping:
                self._is_stopping = True
                self._tell({"type": "stop"})

    def end(self, message: str, status: int = 1) -> None:
        """End all ranks now, with an outcome that nobody announces."""
        with self._lock:
            self._pronounce(Outcome(message, status, ()))

    def conclude(self) -> Outcome | None:
        """The outcome, after a moment where one is pending."""
        while self._outcome_at is not None:
            time.sleep(0.01)
        return self.outcome

    def close(self) -> None:
        """Say goodbye, so that no rank takes the end of this process for a failure."""
        if self._is_closing:
            return
        self._is_closing = True
        with contextlib.suppress(OSError):  # the thread has seen it, and ended, before it was woken
            self._wake.send(b"x")
        self._thread.join(timeout=5)
        self._wake.close()

    def _serve(self) -> None:
        while not self._is_closing:
            for key, _ in self._selector.select(self._seconds_to_wait()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._waker:
                    self._waker.recv(64)
                else:
                    self._hear(self._lines[key.fileobj])
            self._look_at_the_clock()
        with self._lock:
            self._tell({"type": "bye"})
        for held in (*self._lines, self._listener, self._waker):
            held.close()
        self._selector.close()

    def _seconds_to_wait(self) -> float | None:
        deadlines = [each for each in (self._outcome_at, self._arrival_deadline) if each is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        with self._lock:
            if self._arrival_deadline is not None and now >= self._arrival_deadline:
                self._arrival_deadline = None
                expected = range(self._world_size or 1)
                for rank in [rank for rank in expected if rank not in self.members]:
                    self._note(Failure(rank, "absence"))
            if self._outcome_at is not None and now >= self._outcome_at:
                silent = any(failure.kind == "silence" for failure in self._failures)
                seconds = self._silence_seconds if silent else self._arrival_seconds
                outcome = find_cause(self._failures, self.members, seconds)
                # The ranks must end also where nobody reads any more what this process says.
                with contextlib.suppress(OSError, ValueError):
                    self._announce(outcome)
                self._pronounce(outcome)
                self._outcome_at = None

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # No descriptor is left: the rank stays in the queue, and this thread must not spin.
            time.sleep(0.1)
            return
        connection.setblocking(False)
        watch_the_line(connection, self._silence_seconds)
        self._lines[connection] = _Line(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, line: _Line) -> None:
        lost = False
        try:
            messages = line.receive()
            with self._lock:
                for message in messages or []:
                    self._take(line, message)
        except BlockingIOError:
            return
        except OSError as error:
            messages, lost = None, is_out_of_reach(error)
        except (ValueError, KeyError, TypeError, RecursionError):
            messages = None  # a stranger
        if messages is None:
            self._selector.unregister(line.connection)
            line.connection.close()
            with self._lock:
                del self._lines[line.connection]
                if line.member and not line.has_left and not self._is_closing:
                    self._note(Failure(line.member.rank, "silence" if lost else "death"))

    def _take(self, line: _Line, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "hello" and hmac.compare_digest(message["token"], self.address.token):
            line.member = Member(int(message["rank"]), message["host"], int(message["pid"]), message["log"])
            self._world_size = int(message["world_size"])
            self.members[line.member.rank] = line.member
            if self.outcome is not None:
                line.send({"type": "outcome", "status": self.outcome.status})
            elif self._is_stopping:
                line.send({"type": "stop"})
            if len(self.members) == self._world_size:
                self._arrival_deadline = None
                self._tell({"type": "roster", "host": self.members[0].host, "speaker": self._speaker()})
        elif line.member is None:
            raise ValueError("not a member")
        elif kind == "failure":
            words = (message["kind"], message["message"], message["traceback"], message["status"])
            self._note(Failure(line.member.rank, *words))
        elif kind == "bye":
            line.has_left = True
            if message["message"]:
                self._note(Failure(line.member.rank, "end", message["message"], status=message["status"]))

    def _speaker(self) -> int:
        """The rank that reports it when the process that runs the watchdog is gone: the first on another host than
        rank 0's, should there be one.
        """
        others = sorted(rank for rank in self.members if rank != 0)
        elsewhere = [rank for rank in others if self.members[rank].host != self.members[0].host]
        return next(iter(elsewhere or others), 0)

    def _note(self, failure: Failure) -> None:
        if self.outcome is None:
            self._failures.append(failure)
            if self._outcome_at is None:
                self._outcome_at = time.monotonic() + SETTLE_SECONDS

    def _pronounce(self, outcome: Outcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._tell({"type": "outcome", "status": outcome.status})

    def _tell(self, message: dict[str, Any]) -> None:
        there = [line for line in self._lines.values() if line.member and not line.has_left]
        # Rank 0 comes last: where it runs the watchdog itself, an outcome ends this process.
        for line in sorted(there, key=lambda line: line.member.rank, reverse=True):
            line.send(message)
