"""Ranks that come to a watchdog, fail, leave or are killed, as processes of their own without any training."""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sparse_zero.errors import UserError
from sparse_zero.ranks import watchdog_client as client_module
from sparse_zero.ranks.failures import DIED, Member, Outcome, say_silent
from sparse_zero.ranks.stop_signals import STOPPED, StopRequest
from sparse_zero.ranks.watchdog import SETTLE_SECONDS, Address, Watchdog, _Line
from sparse_zero.ranks.watchdog_client import WatchdogClient

RANK = """
import contextlib, json, os, sys, time
from sparse_zero.ranks.watchdog_client import WatchdogClient, announce
from sparse_zero.ranks.watchdog import SETTLE_SECONDS, Address, Watchdog, _Line
from sparse_zero.ranks.stop_signals import StopRequest
from sparse_zero.ranks.failures import Member

rank, world_size, host, watcher, address, is_deferred = json.loads(sys.argv[1])
stop = StopRequest().listen()
watchdog = None if address else Watchdog(announce, silence_seconds=30)
address = address or str(watchdog.address)
me = Member(rank, host, os.getpid(), f"logs/{rank}")
member = WatchdogClient(Address.parse(address), me, world_size, stop, 30, watcher=watcher, watchdog=watchdog)
with stop.deferred() if is_deferred else contextlib.nullcontext():
    print(address, flush=True)
    for line in sys.stdin:
        verb, *words = json.loads(line)
        if verb == "report":
            member.report(*words)
        elif verb == "leave":
            member.leave(*words)
        elif verb == "wait for a stop":
            deadline = time.monotonic() + 20
            while not stop.is_raised and time.monotonic() < deadline:
                time.sleep(0.01)
            print("asked" if stop.is_raised else "not asked", flush=True)
        elif verb == "wait for the roster":
            while member._watchers_host == "its host":
                time.sleep(0.01)
            print("all are here", flush=True)
        elif verb == "exit":
            sys.exit(*words)
"""
SECONDS = 20


class Process:
    """A rank, which does what it is told."""

    def __init__(
        self,
        rank: int,
        address: Address | str | None,
        world_size: int = 3,
        host: str = "n1",
        watcher: str = "launcher",
        deferred: bool = False,
    ) -> None:
        facts = json.dumps([rank, world_size, host, watcher, str(address or ""), deferred])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", RANK, facts], **pipes)

    def is_here(self) -> str:
        """Returns: the address of the watchdog that it has come to."""
        return self.process.stdout.readline().strip()

    def tell(self, *words: object) -> None:
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        """Returns: its exit status and what it has written for the user."""
        # With its standard input open: at the end of that it would leave by itself.
        return self.process.wait(timeout=SECONDS), self.process.stderr.read()


@pytest.fixture
def outcomes() -> list[Outcome]:
    return []


@pytest.fixture
def open_watchdog(outcomes: list[Outcome]) -> Iterator[Callable[..., Watchdog]]:
    with contextlib.ExitStack() as opened:

        def open_watchdog(announce: Callable[[Outcome], None] = outcomes.append, host: str = "127.0.0.1") -> Watchdog:
            watchdog = Watchdog(announce, silence_seconds=30, host=host)
            opened.callback(watchdog.close)
            return watchdog

        yield open_watchdog


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    started = []

    def start(*arguments: Any, **settings: Any) -> Process:
        started.append(Process(*arguments, **settings))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def three(start: Callable[..., Process], watchdog: Watchdog, **settings: Any) -> list[Process]:
    ranks = [start(rank, watchdog.address, **settings) for rank in range(3)]
    assert [rank.is_here() for rank in ranks] == [str(watchdog.address)] * 3
    until(lambda: len(watchdog.members) == 3)
    return ranks


# The process that started the run runs the watchdog


def test_a_killed_rank_is_named_and_the_others_end(open_watchdog, start, outcomes) -> None:
    ranks = three(start, open_watchdog())
    ranks[1].process.kill()
    assert [ranks[0].end(), ranks[2].end()] == [(1, "")] * 2
    pid = ranks[1].process.pid
    assert [each.message for each in outcomes] == [f"rank 1 on n1 (process {pid}) {DIED}; its log is logs/1"]


def test_an_exception_is_announced_once_and_its_echoes_are_not(open_watchdog, start, outcomes) -> None:
    ranks = three(start, open_watchdog())
    ranks[2].tell("report", "ValueError: cause", "Traceback of 2\n")
    ranks[0].tell("report", "RuntimeError: echo", "Traceback of 0\n")
    assert [rank.end() for rank in ranks] == [(1, "")] * 3
    [outcome] = outcomes
    assert outcome.traceback in ("Traceback of 2\n", "Traceback of 0\n")
    assert outcome.ranks == (int(outcome.traceback[-2]),)


def test_a_failure_of_any_length_is_no_death(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    ranks = three(start, watchdog)
    ranks[0].tell("report", "x" * 2_000_000, "last line\n".rjust(2_000_000, "\U0001f600"))
    assert [rank.end()[0] for rank in ranks] == [1, 1, 1]
    assert outcomes[0].message.startswith("rank 0 on n1 failed: xxx")
    assert outcomes[0].traceback.endswith("last line\n")


def test_what_all_refuse_ends_all_with_two(open_watchdog, start, outcomes) -> None:
    ranks = three(start, open_watchdog())
    for rank in ranks:
        rank.tell("report", "no such column", "", 2)
    assert [rank.end() for rank in ranks] == [(2, "")] * 3
    assert [(each.message, each.traceback, each.status) for each in outcomes] == [("no such column", "", 2)]


def test_a_rank_that_comes_after_the_outcome_ends_too(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    first = start(0, watchdog.address)
    assert first.is_here()
    first.tell("report", "no such column", "", 2)
    assert first.end() == (2, "")
    late = start(1, watchdog.address)
    assert late.end() == (2, "")
    assert len(outcomes) == 1


def test_an_outcome_that_nobody_can_read_ends_the_ranks_all_the_same(open_watchdog, start) -> None:
    def announce(outcome: Outcome) -> None:
        raise BrokenPipeError

    watchdog = open_watchdog(announce)
    ranks = three(start, watchdog)
    ranks[1].process.kill()
    assert [ranks[0].end(), ranks[2].end()] == [(1, "")] * 2
    assert watchdog.conclude().status == 1


def test_a_stop_reaches_ranks_that_are_there_and_that_come_later(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    training = start(0, watchdog.address, deferred=True)
    assert training.is_here()
    until(lambda: watchdog.members)
    watchdog.ask_to_stop()
    training.tell("wait for a stop")
    assert training.process.stdout.readline() == "asked\n"
    assert outcomes == []
    # It has nothing to save yet.
    assert start(1, watchdog.address).end() == (STOPPED, "")


def test_ranks_with_nothing_to_save_end_at_a_stop(open_watchdog, start, outcomes) -> None:
    """Those that could still save end with them: no collective would come to its end."""
    watchdog = open_watchdog()
    ranks = three(start, watchdog)
    training = start(3, watchdog.address, world_size=4, deferred=True)
    assert training.is_here()
    until(lambda: len(watchdog.members) == 4)
    watchdog.ask_to_stop()
    assert [rank.end() for rank in (*ranks, training)] == [(STOPPED, "")] * 4
    assert [(each.status, each.is_error) for each in outcomes] == [(STOPPED, False)]


def test_ranks_that_leave_are_missed_by_nobody(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    ranks = three(start, watchdog)
    for rank in ranks[:2]:
        rank.tell("leave")
        rank.tell("exit", 0)
        assert rank.end() == (0, "")
    assert watchdog.is_anybody_there
    time.sleep(2 * SETTLE_SECONDS)
    assert ranks[2].process.poll() is None
    ranks[2].tell("leave", STOPPED)
    ranks[2].tell("exit", STOPPED)
    assert ranks[2].end() == (STOPPED, "")
    until(lambda: not watchdog.is_anybody_there)
    assert (watchdog.conclude(), outcomes) == (None, [])


def test_a_rank_that_a_signal_ends_ends_the_others_with_its_status(open_watchdog, start, outcomes) -> None:
    ranks = three(start, open_watchdog())
    ranks[1].process.send_signal(signal.SIGTERM)
    assert [rank.end() for rank in ranks] == [(STOPPED, "")] * 3
    assert [(each.message, each.is_error) for each in outcomes] == [("rank 1 on n1 was told to stop", False)]


def test_ranks_that_do_not_come_are_named(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    watchdog.expect(4, 600)
    one = start(2, watchdog.address, world_size=4)
    assert one.is_here()
    until(lambda: watchdog.members)
    watchdog._arrival_deadline = time.monotonic()
    socket.create_connection(watchdog.address[:2]).close()  # wakes it, so that it looks at the clock
    assert one.end() == (1, "")
    assert [each.message for each in outcomes] == [
        "ranks 0, 1, 3 did not come within 600 s (launch.rendezvous_seconds); there: rank 2 on n1"
    ]


def test_nobody_is_missed_once_all_have_come(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    watchdog.expect(3, 60)
    assert watchdog._arrival_deadline is not None
    three(start, watchdog)
    until(lambda: watchdog._arrival_deadline is None)
    watchdog.expect(3, 0)
    time.sleep(0.2)
    assert outcomes == []


def test_end_ends_all_and_announces_nothing(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    ranks = three(start, watchdog)
    watchdog.end("killed", 9)
    assert [rank.end() for rank in ranks] == [(9, "")] * 3
    assert (watchdog.conclude().message, outcomes) == ("killed", [])


def test_a_watchdog_that_closes_is_no_failure(open_watchdog, start) -> None:
    watchdog = open_watchdog()
    ranks = three(start, watchdog, deferred=True)
    watchdog.close()
    watchdog.close()
    for rank in ranks:
        rank.tell("exit", 7)
        assert rank.end() == (7, "")


def test_what_no_watchdog_hears_any_more_the_rank_says_itself(open_watchdog, start) -> None:
    watchdog = open_watchdog()
    ranks = three(start, watchdog)
    watchdog.close()
    ranks[1].tell("report", "OSError: disk full", "Traceback\n")
    ranks[1].tell("exit", 1)
    assert ranks[1].end() == (1, "sparse-zero: error: rank 1 on n1: OSError: disk full\n")


WATCHER = """
import sys, time
from sparse_zero.ranks.watchdog import Watchdog
print(Watchdog(print, silence_seconds=30).address, flush=True)
time.sleep(60)
"""


def test_a_killed_launcher_is_a_request_to_stop(start) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", WATCHER], stdout=subprocess.PIPE, text=True)
    address = launcher.stdout.readline().strip()
    training, loading = start(0, address, world_size=2, deferred=True), start(1, address, world_size=2)
    assert [training.is_here(), loading.is_here()] == [address] * 2
    launcher.kill()
    launcher.communicate()
    training.tell("wait for a stop")
    assert training.process.stdout.readline() == "asked\n"
    training.tell("exit", 5)
    assert [training.end(), loading.end()] == [(5, ""), (STOPPED, "")]


# Rank 0 runs the watchdog


def around_rank_0(start: Callable[..., Process], hosts: list[str]) -> list[Process]:
    ranks = [start(0, None, len(hosts), hosts[0], watcher="rank 0")]
    address = ranks[0].is_here()
    for rank, host in enumerate(hosts[1:], 1):
        ranks.append(start(rank, address, len(hosts), host, watcher="rank 0"))
        assert ranks[-1].is_here() == address
    for rank in ranks:
        rank.tell("wait for the roster")
        assert rank.process.stdout.readline() == "all are here\n"
    return ranks


@pytest.mark.parametrize(("hosts", "speaker"), [(["n1", "n1", "n2", "n2"], 2), (["n1", "n1", "n1"], 1)])
def test_when_rank_0_is_killed_one_rank_says_so(start, hosts, speaker) -> None:
    ranks = around_rank_0(start, hosts)
    ranks[0].process.kill()
    said = [rank.end() for rank in ranks[1:]]
    assert [status for status, _ in said] == [1] * len(said)
    expected = ["sparse-zero: error: rank 0 on n1 " + DIED + "\n" if rank == speaker else "" for rank in range(4)]
    assert [err for _, err in said] == expected[1 : len(hosts)]


def test_rank_0_says_which_other_was_killed(start) -> None:
    ranks = around_rank_0(start, ["n1", "n2", "n2"])
    ranks[2].process.kill()
    said = f"sparse-zero: error: rank 2 on n2 (process {ranks[2].process.pid}) {DIED}; its log is logs/2\n"
    assert [rank.end() for rank in ranks[:2]] == [(1, said), (1, "")]


def test_rank_0_that_fails_is_no_death(start) -> None:
    ranks = around_rank_0(start, ["n1", "n2", "n2"])
    ranks[0].tell("report", "ValueError: no", "Traceback\n")
    said = "Traceback\nsparse-zero: error: rank 0 on n1 failed: ValueError: no; its log is logs/0\n"
    assert [rank.end() for rank in ranks] == [(1, said), (1, ""), (1, "")]


def test_rank_0_may_leave_before_the_others(start) -> None:
    ranks = around_rank_0(start, ["n1", "n2", "n2"])
    ranks[0].tell("leave")
    ranks[0].tell("exit", 0)
    assert ranks[0].end() == (0, "")
    time.sleep(0.2)
    for rank in ranks[1:]:
        rank.tell("leave")
        rank.tell("exit", 0)
        assert rank.end() == (0, "")


def test_rank_0_that_a_signal_ends_ends_the_others_with_its_status(start) -> None:
    ranks = around_rank_0(start, ["n1", "n2", "n2"])
    ranks[0].process.send_signal(signal.SIGTERM)
    assert [rank.end() for rank in ranks] == [(STOPPED, "")] * 3


# Networks


class Recorder(WatchdogClient):
    """A member that does not end its process."""

    ended: int | None = None

    def _end(self, status: int) -> None:
        self.ended = status


@pytest.mark.parametrize(("watcher", "said"), [("launcher", "the host that started this run has"), ("rank 0", "n7")])
def test_a_watcher_whose_host_is_silent_ends_the_ranks(open_watchdog, capfd, monkeypatch, watcher, said) -> None:
    watchdog, stop = open_watchdog(), StopRequest()
    monkeypatch.setattr(client_module, "is_out_of_reach", lambda error: True)
    member = Recorder(watchdog.address, Member(0, "n7", os.getpid()), 1, stop, 12, watcher=watcher)
    until(lambda: watchdog.members)
    until(lambda: member._watchers_host == "n7")
    monkeypatch.setattr(member, "_connection", None)
    member._lose(is_silent=True)
    err = capfd.readouterr().err
    assert said in err
    assert "has not answered for 12 s" in err
    assert (member.ended, stop.is_raised) == (1, False)


def test_a_silent_host_is_not_called_dead(open_watchdog, start, outcomes, monkeypatch) -> None:
    watchdog = open_watchdog()
    receive = _Line.receive

    def lose(line: _Line) -> Any:
        if line.member and line.member.rank == 1:
            raise OSError(errno.ETIMEDOUT, "timed out")
        return receive(line)

    ranks = three(start, watchdog)
    monkeypatch.setattr(_Line, "receive", lose)
    ranks[1].process.kill()
    assert [ranks[0].end()[0], ranks[2].end()[0]] == [1, 1]
    assert outcomes[0].message == f"n1 (rank 1) {say_silent(30)}; its log is logs/1"


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
        b'{"type": "failure", "kind": "failure", "message": "m", "traceback": "t", "status": 1}\n',
    ],
)
def test_strangers_are_put_out_and_harm_nobody(open_watchdog, outcomes, sent) -> None:
    watchdog = open_watchdog()
    with socket.create_connection(watchdog.address[:2], timeout=SECONDS) as stranger:
        stranger.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    with socket.create_connection(watchdog.address[:2], timeout=SECONDS) as quiet:
        quiet.sendall(b'{"type": "hel')
    with member(watchdog, 0) as (_, heard):
        assert json.loads(heard.readline())["type"] == "roster"
    until(lambda: watchdog.conclude())
    # The one that came last did join, and went without a word.
    assert [each.ranks for each in outcomes] == [(0,)]


def test_a_member_may_write_in_pieces(open_watchdog) -> None:
    watchdog = open_watchdog()
    with member(watchdog, 0, pieces=7) as (connection, heard):
        assert json.loads(heard.readline())["type"] == "roster"
        connection.sendall(b'{"type": "bye", "sta')
        time.sleep(0.05)
        connection.sendall(b'tus": 0, "message": ""}\n')
        until(lambda: not watchdog.is_anybody_there)
    assert watchdog.conclude() is None


@contextlib.contextmanager
def member(watchdog: Watchdog, rank: int, pieces: int = 1) -> Iterator[tuple[socket.socket, Any]]:
    hello = {"token": watchdog.address.token, "rank": rank, "world_size": 1, "host": "n1", "pid": 1, "log": None}
    line = json.dumps({"type": "hello", **hello}).encode() + b"\n"
    with socket.create_connection(watchdog.address[:2], timeout=SECONDS) as connection, connection.makefile() as heard:
        for start in range(0, len(line), size := -(-len(line) // pieces)):
            connection.sendall(line[start : start + size])
            time.sleep(0.01)
        yield connection, heard


def test_an_address_is_written_and_read_back(open_watchdog) -> None:
    address = open_watchdog(host="127.0.0.1").address
    assert Address.parse(str(address)) == address
    assert len(address.token) == 32


def test_a_watchdog_of_this_machine_cannot_be_reached_from_others(open_watchdog) -> None:
    assert open_watchdog(host="127.0.0.1")._listener.getsockname()[0] == "127.0.0.1"
    assert open_watchdog(host="n1")._listener.getsockname()[0] == "0.0.0.0"


def test_a_watchdog_that_is_not_there_is_a_users_error() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = Address(*nobody.getsockname(), "0")
        with pytest.raises(UserError, match=rf"cannot reach 127.0.0.1:{address.port}, where the ranks are watched"):
            WatchdogClient(address, Member(0, "n1", 1), 1, StopRequest(), 30, patience_seconds=0)


def test_a_closed_watchdog_leaves_no_thread(open_watchdog) -> None:
    watchdog = open_watchdog()
    watchdog.close()
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
