"""The watchdog's protocol: whom it accepts, and what it sends to whom."""

import contextlib
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rank_processes import SECONDS, wait_until

from sparse_zero.ranks import watchdog as watchdog_module
from sparse_zero.ranks.connection import Connection
from sparse_zero.ranks.watchdog import Address, Watchdog


@contextlib.contextmanager
def joined(watchdog: Watchdog, rank: int, world_size: int = 1, parts: int = 1) -> "Iterator[Peer]":
    """A connection of a rank that has sent `hello`, in some parts.

    Yields: its end of the connection.
    """
    with connected(watchdog) as peer:
        peer.answer()
        hello = {"rank": rank, "world_size": world_size, "host": "n1", "pid": 1, "log": None}
        line = peer.line(type="hello", **hello)
        for start in range(0, len(line), -(-len(line) // parts)):
            peer.socket.sendall(line[start : start + -(-len(line) // parts)])
            time.sleep(0.01)
        assert peer.read() == {"type": "welcome"}
        yield peer


class Peer:
    """The other end of a connection to a watchdog, written again from the description of the protocol."""

    def __init__(self, connection: socket.socket, token: str) -> None:
        self.socket, self._token = connection, token
        self.received = connection.makefile("rb")
        self.challenge = json.loads(self.received.readline())["challenge"]
        self._counts = {"rank": 0, "watchdog": 0}

    def answer(self, nonce: str = "00ff") -> bytes:
        self._key = hmac.new(self._token.encode(), f"{self.challenge} {nonce}".encode(), hashlib.sha256).digest()
        line = json.dumps({"nonce": nonce}).encode() + b"\n"
        self.socket.sendall(line)
        return line

    def line(self, **message: object) -> bytes:
        body = json.dumps(message).encode()
        return self._authenticator("rank", body) + b" " + body + b"\n"

    def send(self, **message: object) -> None:
        self.socket.sendall(self.line(**message))

    def read(self) -> dict[str, Any]:
        authenticator, body = self.received.readline().rstrip(b"\n").split(b" ", 1)
        assert authenticator == self._authenticator("watchdog", body)
        return json.loads(body)

    def is_closed(self) -> bool:
        """Whether the watchdog has closed the connection without a message."""
        with contextlib.suppress(ConnectionResetError):
            return self.received.read(1) == b""
        return True

    def _authenticator(self, side: str, body: bytes) -> bytes:
        text = f"{side} {self._counts[side]} ".encode() + body
        self._counts[side] += 1
        return hmac.new(self._key, text, hashlib.sha256).hexdigest().encode()


@contextlib.contextmanager
def connected(watchdog: Watchdog, token: str | None = None) -> Iterator[Peer]:
    with socket.create_connection(watchdog.address[:2], timeout=SECONDS) as connection:
        peer = Peer(connection, watchdog.address.token if token is None else token)
        with peer.received:  # it would keep the connection open
            yield peer


def test_a_death_is_sent_to_all_remaining_ranks_and_to_rank_0_last(open_watchdog, outcomes, monkeypatch) -> None:
    """Rank 0 may run the watchdog: the outcome ends its process, and nothing is sent after that."""
    watchdog = open_watchdog()
    sent = []
    send = Connection.send

    def record(connection: Connection, message: dict) -> None:
        sent.append((message["type"], connection.info.rank))
        send(connection, message)

    monkeypatch.setattr(Connection, "send", record)
    with contextlib.ExitStack() as ranks:
        received = [ranks.enter_context(joined(watchdog, rank, world_size=3)) for rank in range(2)]
        with joined(watchdog, 2, world_size=3) as last:
            for rank in (*received, last):
                assert rank.read()["type"] == "all-joined"
        outcome = {"type": "outcome", "status": 1}
        assert [rank.read() for rank in received] == [outcome] * 2
    assert [rank for kind, rank in sent if kind == "outcome"] == [1, 0]
    assert [outcome.ranks for outcome in outcomes] == [(2,)]


def test_close_works_if_the_thread_has_already_ended(open_watchdog) -> None:
    """The thread ends as soon as it sees the flag, which may be before the wake-up message."""
    watchdog = open_watchdog()
    wake = watchdog._wake

    class Late:
        """Sends the wake-up message again when the thread has closed everything."""

        def send(self, data: bytes) -> int:
            wake.send(data)
            watchdog._thread.join(timeout=SECONDS)
            return wake.send(data)

        def close(self) -> None:
            wake.close()

    watchdog._wake = Late()
    watchdog.close()
    assert not watchdog._thread.is_alive()


ATTACKS = {
    "another protocol": b"GET / HTTP/1.1\r\n\r\n",
    "bytes": b"\x00\xff\xfe\n",
    "an empty line": b"\n",
    "a list": b"[1]\n",
    "deep nesting": b"[" * 50_000 + b"\n",
    "a long line": b"x" * 10_000,
    "no nonce": b'{"type": "bye", "status": 0, "message": "go"}\n',
    "no authenticator": b'{"nonce": "1"}\n{"type": "bye", "status": 0, "message": "go"}\n',
    "a wrong authenticator": b'{"nonce": "1"}\n' + b"0" * 64 + b' {"type": "bye", "status": 0, "message": "go"}\n',
    "no ASCII": b'{"nonce": "\xc3\xa4"}\n\xc3\xa4 {"type": "hello"}\n',
    "the secret of version 0.1": b'{"type": "hello", "token": "00", "rank": 1, "world_size": 1, "host": "h", '
    b'"pid": 1, "log": null}\n',
}


def check_that_the_run_goes_on(watchdog: Watchdog, outcomes: list) -> None:
    with joined(watchdog, 0) as rank:
        assert rank.read()["type"] == "all-joined"
        assert watchdog.has_connected_ranks
        assert (watchdog.wait_for_outcome(), outcomes) == (None, [])
    wait_until(watchdog.wait_for_outcome)
    # Rank 0 joined, and closed its connection without a message.
    assert [each.ranks for each in outcomes] == [(0,)]


@pytest.mark.parametrize("attack", ATTACKS)
def test_connections_that_are_no_ranks_are_closed_and_have_no_effect(open_watchdog, outcomes, attack) -> None:
    watchdog = open_watchdog()
    with connected(watchdog) as stranger:
        stranger.socket.sendall(ATTACKS[attack])
        assert stranger.is_closed()
    with socket.create_connection(watchdog.address[:2], timeout=SECONDS) as quiet:
        quiet.sendall(b'{"type": "hel')
    check_that_the_run_goes_on(watchdog, outcomes)


@pytest.mark.parametrize("kind", ["hello", "bye", "failure"])
def test_who_does_not_know_the_secret_can_do_nothing(open_watchdog, outcomes, kind) -> None:
    watchdog = open_watchdog()
    message = {"rank": 0, "world_size": 1, "host": "h", "pid": 1, "log": None, "message": "go", "status": 0}
    with connected(watchdog, token="f" * 32) as stranger:
        stranger.answer()
        stranger.send(type=kind, **message)
        assert stranger.is_closed()
    assert watchdog.ranks == {}
    check_that_the_run_goes_on(watchdog, outcomes)


@pytest.mark.parametrize("to", ["another connection", "the same connection"])
def test_a_message_that_was_recorded_is_not_accepted_again(open_watchdog, outcomes, to) -> None:
    watchdog = open_watchdog()
    with connected(watchdog) as rank:
        nonce = rank.answer()
        hello = rank.line(type="hello", rank=0, world_size=2, host="n1", pid=1, log=None)
        rank.socket.sendall(hello)
        assert rank.read() == {"type": "welcome"}
        if to == "the same connection":
            rank.socket.sendall(hello)
            assert rank.is_closed()
            wait_until(watchdog.wait_for_outcome)
            assert [each.ranks for each in outcomes] == [(0,)], "an interrupted connection is a lost rank"
            return
        with connected(watchdog) as stranger:
            stranger.socket.sendall(nonce + hello)
            assert stranger.is_closed()
        # What the watchdog itself has said is no message of a rank either.
        with connected(watchdog) as stranger:
            stranger.socket.sendall(json.dumps({"nonce": stranger.challenge}).encode() + b"\n" + hello)
            assert stranger.is_closed()
        assert list(watchdog.ranks) == [0]
        assert (watchdog.wait_for_outcome(), outcomes) == (None, [])


@pytest.mark.parametrize(("limit", "value"), [("_MAX_STRANGERS", 20), ("_STRANGER_SECONDS", 0.5)])
def test_strangers_do_not_use_up_the_open_files(open_watchdog, outcomes, monkeypatch, limit, value) -> None:
    monkeypatch.setattr(watchdog_module, limit, value)
    watchdog = open_watchdog()
    with contextlib.ExitStack() as opened:
        first = opened.enter_context(joined(watchdog, 0, world_size=2))
        silent = [opened.enter_context(connected(watchdog)) for _ in range(20)]
        time.sleep(0.6)
        second = opened.enter_context(joined(watchdog, 1, world_size=2))
        assert [first.read()["type"], second.read()["type"]] == ["all-joined"] * 2
        assert silent[0].is_closed()
        assert (watchdog.wait_for_outcome(), outcomes) == (None, [])
        assert len(watchdog._connections) <= 2 + 20


@pytest.mark.parametrize("kind", ["bye", "failure"])
@pytest.mark.parametrize("status", [0, -1, 256, 2])
def test_no_message_of_a_rank_ends_the_others_with_status_0(open_watchdog, outcomes, kind, status) -> None:
    watchdog = open_watchdog()
    with joined(watchdog, 0, world_size=2) as first, joined(watchdog, 1, world_size=2) as second:
        assert [first.read()["type"], second.read()["type"]] == ["all-joined"] * 2
        second.send(type=kind, kind="exception", message="all is well", traceback="", status=status)
        assert first.read() == {"type": "outcome", "status": status if status == 2 else 1}
    assert [each.status for each in outcomes] == [status if status == 2 else 1]


def test_a_rank_that_leaves_before_all_have_joined_is_a_failure(open_watchdog, outcomes) -> None:
    watchdog = open_watchdog()
    with joined(watchdog, 0, world_size=2) as rank:
        rank.send(type="bye", status=0, message="")
        wait_until(watchdog.wait_for_outcome)
    assert [(each.status, each.message) for each in outcomes] == [(1, "rank 0 on n1 left before all ranks had joined")]


def test_control_characters_of_a_rank_do_not_reach_the_terminal(open_watchdog, outcomes) -> None:
    watchdog = open_watchdog()
    with connected(watchdog) as rank:
        rank.answer()
        rank.send(type="hello", rank=0, world_size=1, host="n1\x1b]0;x\x07\nn2", pid=1, log="a\x9b31m\u202eb")
        assert rank.read() == {"type": "welcome"}
        rank.send(type="failure", kind="exception", message="\x1b[2Jgone\r", traceback="one\n\ttwo\x00", status=1)
        wait_until(watchdog.wait_for_outcome)
    [outcome] = outcomes
    assert outcome.message == (r"rank 0 on n1\x1b]0;x\x07\nn2 failed: \x1b[2Jgone\r; its log is a\x9b31m\u202eb")
    assert outcome.traceback == "one\n\ttwo" + r"\x00"


def test_a_message_may_arrive_in_parts(open_watchdog) -> None:
    watchdog = open_watchdog()
    with joined(watchdog, 0, parts=7) as rank:
        assert rank.read()["type"] == "all-joined"
        line = rank.line(type="bye", status=0, message="")
        rank.socket.sendall(line[:80])
        time.sleep(0.05)
        rank.socket.sendall(line[80:])
        wait_until(lambda: not watchdog.has_connected_ranks)
    assert watchdog.wait_for_outcome() is None


def test_an_address_is_written_and_read_back(open_watchdog) -> None:
    address = open_watchdog(host="127.0.0.1").address
    assert Address.parse(str(address)) == address
    assert len(address.token) == 32


def test_a_local_watchdog_is_not_reachable_from_other_hosts(open_watchdog) -> None:
    assert open_watchdog(host="127.0.0.1")._listener.getsockname()[0] == "127.0.0.1"
    assert open_watchdog(host="n1")._listener.getsockname()[0] == "0.0.0.0"


def test_a_closed_watchdog_leaves_no_thread(open_watchdog) -> None:
    watchdog = open_watchdog()
    watchdog.close()
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
