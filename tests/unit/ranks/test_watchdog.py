"""The watchdog's protocol: whom it accepts, and what it sends to whom."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rank_processes import SECONDS, wait_until

from sparse_zero.ranks.watchdog import Address, Watchdog, _Connection


@contextlib.contextmanager
def joined(watchdog: Watchdog, rank: int, world_size: int = 1, parts: int = 1) -> Iterator[tuple[socket.socket, Any]]:
    """A connection of a rank that has sent `hello`, in some parts, and a file to read the watchdog's messages from."""
    hello = {
        "token": watchdog.address.token,
        "rank": rank,
        "world_size": world_size,
        "host": "n1",
        "pid": 1,
        "log": None,
    }
    line = json.dumps({"type": "hello", **hello}).encode() + b"\n"
    with (
        socket.create_connection(watchdog.address[:2], timeout=SECONDS) as connection,
        connection.makefile() as received,
    ):
        for start in range(0, len(line), size := -(-len(line) // parts)):
            connection.sendall(line[start : start + size])
            time.sleep(0.01)
        yield connection, received


def test_a_death_is_sent_to_all_remaining_ranks_and_to_rank_0_last(open_watchdog, outcomes, monkeypatch) -> None:
    """Rank 0 may run the watchdog: the outcome ends its process, and nothing is sent after that."""
    watchdog = open_watchdog()
    sent = []
    send = _Connection.send

    def record(connection: _Connection, message: dict) -> None:
        sent.append((message["type"], connection.info.rank))
        send(connection, message)

    monkeypatch.setattr(_Connection, "send", record)
    with contextlib.ExitStack() as ranks:
        received = [ranks.enter_context(joined(watchdog, rank, world_size=3)) for rank in range(2)]
        with joined(watchdog, 2, world_size=3) as last:
            for _, lines in (*received, last):
                assert json.loads(lines.readline())["type"] == "all-joined"
        outcome = {"type": "outcome", "status": 1}
        assert [json.loads(lines.readline()) for _, lines in received] == [outcome] * 2
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


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\xff\xfe\n",
        b"\n",
        b"[1]\n",
        b"[" * 50_000 + b"\n",
        b"x" * 10_000,
        b'{"type": "bye", "status": 0, "message": "go"}\n',
        b'{"type": "hello"}\n',
        b'{"type": "hello", "token": 3}\n',
        b'{"type": "hello", "token": "\xc3\xa4"}\n',
        b'{"type": "hello", "token": "00", "rank": 1, "world_size": 1, "host": "h", "pid": 1, "log": null}\n'
        b'{"type": "failure", "kind": "exception", "message": "m", "traceback": "t", "status": 1}\n',
    ],
)
def test_connections_that_are_no_ranks_are_closed_and_have_no_effect(open_watchdog, outcomes, sent) -> None:
    watchdog = open_watchdog()
    with socket.create_connection(watchdog.address[:2], timeout=SECONDS) as stranger:
        stranger.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    with socket.create_connection(watchdog.address[:2], timeout=SECONDS) as quiet:
        quiet.sendall(b'{"type": "hel')
    with joined(watchdog, 0) as (_, received):
        assert json.loads(received.readline())["type"] == "all-joined"
    wait_until(watchdog.wait_for_outcome)
    # Rank 0 joined, and closed its connection without a message.
    assert [each.ranks for each in outcomes] == [(0,)]


def test_a_message_may_arrive_in_parts(open_watchdog) -> None:
    watchdog = open_watchdog()
    with joined(watchdog, 0, parts=7) as (connection, received):
        assert json.loads(received.readline())["type"] == "all-joined"
        connection.sendall(b'{"type": "bye", "sta')
        time.sleep(0.05)
        connection.sendall(b'tus": 0, "message": ""}\n')
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
