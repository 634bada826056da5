"""Whom a watchdog tells, and in what order."""

import json
import socket
from collections.abc import Iterator

import pytest

from sparse_zero.ranks.failures import Outcome
from sparse_zero.ranks.watchdog import Watchdog, _Line


@pytest.fixture
def announced() -> list[Outcome]:
    return []


@pytest.fixture
def watchdog(announced: list[Outcome]) -> Iterator[Watchdog]:
    watchdog = Watchdog(announced.append, silence_seconds=30)
    yield watchdog
    watchdog.close()


def join(watchdog: Watchdog, rank: int) -> socket.socket:
    connection = socket.create_connection(watchdog.address[:2], timeout=20)
    hello = {"token": watchdog.address.token, "rank": rank, "world_size": 3, "host": "n1", "pid": 1, "log": None}
    connection.sendall(json.dumps({"type": "hello", **hello}).encode() + b"\n")
    return connection


def test_a_death_is_told_to_all_that_are_left_and_to_rank_0_at_last(
    watchdog: Watchdog, announced: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 may run the watchdog: the outcome ends it, and with it the telling."""
    told = []
    send = _Line.send

    def record(line: _Line, message: dict) -> None:
        told.append((message["type"], line.member.rank))
        send(line, message)

    monkeypatch.setattr(_Line, "send", record)
    heard = []
    connections = []
    for rank in range(3):
        connections.append(join(watchdog, rank))
    for connection in connections:
        heard.append(connection.makefile())
        assert json.loads(heard[-1].readline())["type"] == "roster"
    heard[2].close()
    connections[2].close()
    assert [json.loads(lines.readline()) for lines in heard[:2]] == [{"type": "outcome", "status": 1}] * 2
    assert [rank for kind, rank in told if kind == "outcome"] == [1, 0]
    assert [outcome.ranks for outcome in announced] == [(2,)]
    for connection in connections:
        connection.close()


def test_closing_does_not_mind_a_thread_that_has_ended_by_then() -> None:
    """It ends as soon as it sees that it should, which may be before it is woken."""
    watchdog = Watchdog(lambda _: None, silence_seconds=30)
    send = watchdog._wake.send

    class Late:
        """The wake-up call comes when the thread has closed everything."""

        def send(self, data: bytes) -> int:
            send(data)
            watchdog._thread.join(timeout=20)
            return send(data)

        def close(self) -> None:
            wake.close()

    wake, watchdog._wake = watchdog._wake, Late()
    watchdog.close()
    assert not watchdog._thread.is_alive()
