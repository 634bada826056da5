"""A run whose watchdog is in rank 0, and hosts that do not answer."""

import errno
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from rank_processes import RankProcess, start_three, wait_until

from sparse_zero.ranks import watchdog_client
from sparse_zero.ranks.connection import Connection
from sparse_zero.ranks.failures import DIED, RankInfo, unreachable_message
from sparse_zero.ranks.stop_signals import STOPPED, StopRequest
from sparse_zero.ranks.watchdog_client import WatchdogClient


def start_on(start: Callable[..., RankProcess], hosts: list[str]) -> list[RankProcess]:
    """Start one rank for each entry of `hosts`, the first with the watchdog, and wait until all have joined."""
    ranks = [start(0, None, len(hosts), hosts[0], owner="rank 0")]
    address = ranks[0].wait_until_joined()
    for rank, host in enumerate(hosts[1:], 1):
        ranks.append(start(rank, address, len(hosts), host, owner="rank 0"))
        assert ranks[-1].wait_until_joined() == address
    for rank in ranks:
        rank.send("wait until all have joined")
        assert rank.process.stdout.readline() == "all have joined\n"
    return ranks


@pytest.mark.parametrize(("hosts", "reporter"), [(["n1", "n1", "n2", "n2"], 2), (["n1", "n1", "n1"], 1)])
def test_one_rank_reports_that_rank_0_was_killed(start, hosts, reporter) -> None:
    ranks = start_on(start, hosts)
    ranks[0].process.kill()
    ended = [rank.wait() for rank in ranks[1:]]
    assert [status for status, _ in ended] == [1] * len(ended)
    expected = ["sparse-zero: error: rank 0 on n1 " + DIED + "\n" if rank == reporter else "" for rank in range(4)]
    assert [err for _, err in ended] == expected[1 : len(hosts)]


def test_rank_0_reports_which_other_rank_was_killed(start) -> None:
    ranks = start_on(start, ["n1", "n2", "n2"])
    ranks[2].process.kill()
    err = f"sparse-zero: error: rank 2 on n2 (process {ranks[2].process.pid}) {DIED}; its log is logs/2\n"
    assert [rank.wait() for rank in ranks[:2]] == [(1, err), (1, "")]


def test_a_failure_of_rank_0_is_not_reported_as_its_death(start) -> None:
    ranks = start_on(start, ["n1", "n2", "n2"])
    ranks[0].send("report failure", "ValueError: no", "Traceback\n")
    err = "Traceback\nsparse-zero: error: rank 0 on n1 failed: ValueError: no; its log is logs/0\n"
    assert [rank.wait() for rank in ranks] == [(1, err), (1, ""), (1, "")]


def test_rank_0_may_leave_first(start) -> None:
    ranks = start_on(start, ["n1", "n2", "n2"])
    ranks[0].send("leave")
    ranks[0].send("exit", 0)
    assert ranks[0].wait() == (0, "")
    time.sleep(0.2)
    for rank in ranks[1:]:
        rank.send("leave")
        rank.send("exit", 0)
        assert rank.wait() == (0, "")


def test_a_signal_to_rank_0_ends_all_with_its_status(start) -> None:
    ranks = start_on(start, ["n1", "n2", "n2"])
    ranks[0].process.send_signal(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [(STOPPED, "")] * 3


class RecordingClient(WatchdogClient):
    """Records its exit status and does not exit."""

    exit_status: int | None = None

    def _exit(self, status: int) -> None:
        self.exit_status = status


@pytest.mark.parametrize(("owner", "words"), [("launcher", "the host that started this run has"), ("rank 0", "n7")])
def test_the_ranks_exit_if_the_watchdogs_host_does_not_answer(open_watchdog, capfd, monkeypatch, owner, words) -> None:
    watchdog, stop = open_watchdog(), StopRequest()
    monkeypatch.setattr(watchdog_client, "is_unreachable", lambda error: True)
    client = RecordingClient(watchdog.address, RankInfo(0, "n7", os.getpid()), 1, stop, 12, owner=owner)
    wait_until(lambda: watchdog.ranks)
    wait_until(lambda: client._rank_0_host == "n7")
    monkeypatch.setattr(client, "_connection", None)
    client._handle_lost_watchdog(unreachable=True)
    err = capfd.readouterr().err
    assert words in err
    assert "has not answered for 12 s" in err
    assert (client.exit_status, stop.is_raised) == (1, False)


def test_an_unreachable_host_is_not_reported_as_a_death(open_watchdog, start, outcomes, monkeypatch) -> None:
    watchdog = open_watchdog()
    receive = Connection.receive

    def time_out(connection: Connection) -> Any:
        if connection.info and connection.info.rank == 1:
            raise OSError(errno.ETIMEDOUT, "timed out")
        return receive(connection)

    ranks = start_three(start, watchdog)
    monkeypatch.setattr(Connection, "receive", time_out)
    ranks[1].process.kill()
    assert [ranks[0].wait()[0], ranks[2].wait()[0]] == [1, 1]
    assert outcomes[0].message == f"n1 (rank 1) {unreachable_message(30)}; its log is logs/1"
