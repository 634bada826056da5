"""Whom a roll call tells, and in what order."""

import json
import socket
from collections.abc import Iterator

import pytest

from sparse_zero import roll_call
from sparse_zero.roll_call import RollCall
from sparse_zero.verdict import Verdict


@pytest.fixture
def announced() -> list[Verdict]:
    return []


@pytest.fixture
def roll(announced: list[Verdict]) -> Iterator[RollCall]:
    roll = RollCall(announced.append, silence_seconds=30)
    yield roll
    roll.close()


def join(roll: RollCall, rank: int) -> socket.socket:
    connection = socket.create_connection(roll.address[:2], timeout=20)
    hello = {"token": roll.address.token, "rank": rank, "world_size": 3, "host": "n1", "pid": 1, "log": None}
    connection.sendall(json.dumps({"type": "hello", **hello}).encode() + b"\n")
    return connection


def test_a_death_is_told_to_all_that_are_left_and_to_rank_0_at_last(
    roll: RollCall, announced: list[Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 may keep the roll: the verdict ends it, and with it the telling."""
    told = []
    send = roll_call._Line.send

    def record(line: roll_call._Line, message: dict) -> None:
        told.append((message["type"], line.member.rank))
        send(line, message)

    monkeypatch.setattr(roll_call._Line, "send", record)
    heard = []
    connections = []
    for rank in range(3):
        connections.append(join(roll, rank))
    for connection in connections:
        heard.append(connection.makefile())
        assert json.loads(heard[-1].readline())["type"] == "roster"
    heard[2].close()
    connections[2].close()
    assert [json.loads(lines.readline()) for lines in heard[:2]] == [{"type": "verdict", "status": 1}] * 2
    assert [rank for kind, rank in told if kind == "verdict"] == [1, 0]
    assert [verdict.ranks for verdict in announced] == [(2,)]
    for connection in connections:
        connection.close()


def test_closing_does_not_mind_a_thread_that_has_ended_by_then() -> None:
    """It ends as soon as it sees that it should, which may be before it is woken."""
    roll = RollCall(lambda _: None, silence_seconds=30)
    send = roll._wake.send

    class Late:
        """The wake-up call comes when the thread has closed everything."""

        def send(self, data: bytes) -> int:
            send(data)
            roll._thread.join(timeout=20)
            return send(data)

        def close(self) -> None:
            wake.close()

    wake, roll._wake = roll._wake, Late()
    roll.close()
    assert not roll._thread.is_alive()
