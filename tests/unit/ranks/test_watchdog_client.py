"""Ranks that join a watchdog in the launcher, fail, leave or are killed."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from rank_processes import start_three, wait_until

from sparse_zero.errors import UserError
from sparse_zero.ranks.failures import DIED, KILLED, Outcome, RankInfo
from sparse_zero.ranks.placement import Placement
from sparse_zero.ranks.stop_signals import STOPPED, StopRequest
from sparse_zero.ranks.watchdog import SETTLE_SECONDS, Address
from sparse_zero.ranks.watchdog_client import WATCH_VARIABLE, WatchdogClient, join_launcher_watchdog


def test_a_killed_rank_is_named_and_the_others_exit(open_watchdog, start, outcomes) -> None:
    ranks = start_three(start, open_watchdog())
    ranks[1].process.kill()
    assert [ranks[0].wait(), ranks[2].wait()] == [(1, "")] * 2
    pid = ranks[1].process.pid
    assert [each.message for each in outcomes] == [f"rank 1 on n1 (process {pid}) {DIED}; its log is logs/1"]


def test_only_the_first_of_several_exceptions_is_reported(open_watchdog, start, outcomes) -> None:
    ranks = start_three(start, open_watchdog())
    ranks[2].send("report failure", "ValueError: cause", "Traceback of 2\n")
    ranks[0].send("report failure", "RuntimeError: consequence", "Traceback of 0\n")
    assert [rank.wait() for rank in ranks] == [(1, "")] * 3
    [outcome] = outcomes
    assert outcome.traceback in ("Traceback of 2\n", "Traceback of 0\n")
    assert outcome.ranks == (int(outcome.traceback[-2]),)


def test_a_failure_with_a_long_message_is_reported(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    ranks = start_three(start, watchdog)
    ranks[0].send("report failure", "x" * 2_000_000, "last line\n".rjust(2_000_000, "\U0001f600"))
    assert [rank.wait()[0] for rank in ranks] == [1, 1, 1]
    assert outcomes[0].message.startswith("rank 0 on n1 failed: xxx")
    assert outcomes[0].traceback.endswith("last line\n")


def test_a_user_error_of_all_ranks_ends_all_with_status_2(open_watchdog, start, outcomes) -> None:
    ranks = start_three(start, open_watchdog())
    for rank in ranks:
        rank.send("report failure", "no such column", "", 2)
    assert [rank.wait() for rank in ranks] == [(2, "")] * 3
    assert [(each.message, each.traceback, each.status) for each in outcomes] == [("no such column", "", 2)]


def test_a_rank_that_joins_after_the_outcome_exits(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    first = start(0, watchdog.address)
    assert first.wait_until_joined()
    first.send("report failure", "no such column", "", 2)
    assert first.wait() == (2, "")
    late = start(1, watchdog.address)
    assert late.wait() == (2, "")
    assert len(outcomes) == 1


def test_the_ranks_exit_even_if_the_outcome_cannot_be_printed(open_watchdog, start) -> None:
    def on_outcome(outcome: Outcome) -> None:
        raise BrokenPipeError

    watchdog = open_watchdog(on_outcome)
    ranks = start_three(start, watchdog)
    ranks[1].process.kill()
    assert [ranks[0].wait(), ranks[2].wait()] == [(1, "")] * 2
    assert watchdog.wait_for_outcome().status == 1


def test_a_stop_request_reaches_present_and_later_ranks(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    training = start(0, watchdog.address, deferred=True)
    assert training.wait_until_joined()
    wait_until(lambda: watchdog.ranks)
    watchdog.request_stop()
    training.send("wait for a stop request")
    assert training.process.stdout.readline() == "requested\n"
    assert outcomes == []
    # It has nothing to save yet.
    assert start(1, watchdog.address).wait() == (STOPPED, "")


def test_a_stop_request_ends_all_ranks_if_some_have_nothing_to_save(open_watchdog, start, outcomes) -> None:
    """The others cannot save: their collectives would never return."""
    watchdog = open_watchdog()
    ranks = start_three(start, watchdog)
    training = start(3, watchdog.address, world_size=4, deferred=True)
    assert training.wait_until_joined()
    wait_until(lambda: len(watchdog.ranks) == 4)
    watchdog.request_stop()
    assert [rank.wait() for rank in (*ranks, training)] == [(STOPPED, "")] * 4
    assert [(each.status, each.is_error) for each in outcomes] == [(STOPPED, False)]


def test_a_rank_that_leaves_is_no_failure(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    ranks = start_three(start, watchdog)
    for rank in ranks[:2]:
        rank.send("leave")
        rank.send("exit", 0)
        assert rank.wait() == (0, "")
    assert watchdog.has_connected_ranks
    time.sleep(2 * SETTLE_SECONDS)
    assert ranks[2].process.poll() is None
    ranks[2].send("leave", STOPPED)
    ranks[2].send("exit", STOPPED)
    assert ranks[2].wait() == (STOPPED, "")
    wait_until(lambda: not watchdog.has_connected_ranks)
    assert (watchdog.wait_for_outcome(), outcomes) == (None, [])


def test_a_signal_to_one_rank_ends_all_with_its_status(open_watchdog, start, outcomes) -> None:
    ranks = start_three(start, open_watchdog())
    ranks[1].process.send_signal(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [(STOPPED, "")] * 3
    assert [(each.message, each.is_error) for each in outcomes] == [("rank 1 on n1 received a stop request", False)]


def test_missing_ranks_are_named(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    watchdog.expect(4, 600)
    one = start(2, watchdog.address, world_size=4)
    assert one.wait_until_joined()
    wait_until(lambda: watchdog.ranks)
    watchdog._join_deadline = time.monotonic()
    socket.create_connection(watchdog.address[:2]).close()  # wakes it, so that it checks the deadline
    assert one.wait() == (1, "")
    assert [each.message for each in outcomes] == [
        "ranks 0, 1, 3 did not join within 600 s (launch.rendezvous_seconds); joined: rank 2 on n1"
    ]


def test_no_rank_is_missing_once_all_have_joined(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    watchdog.expect(3, 60)
    assert watchdog._join_deadline is not None
    start_three(start, watchdog)
    wait_until(lambda: watchdog._join_deadline is None)
    watchdog.expect(3, 0)
    time.sleep(0.2)
    assert outcomes == []


def test_end_ends_all_ranks_and_reports_no_outcome(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    ranks = start_three(start, watchdog)
    watchdog.end("killed", 9)
    assert [rank.wait() for rank in ranks] == [(9, "")] * 3
    assert (watchdog.wait_for_outcome().message, outcomes) == ("killed", [])


def test_a_closed_watchdog_is_no_failure(open_watchdog, start) -> None:
    watchdog = open_watchdog()
    ranks = start_three(start, watchdog, deferred=True)
    watchdog.close()
    watchdog.close()
    for rank in ranks:
        rank.send("exit", 7)
        assert rank.wait() == (7, "")


def test_without_a_watchdog_the_rank_prints_its_failure(open_watchdog, start) -> None:
    watchdog = open_watchdog()
    ranks = start_three(start, watchdog)
    watchdog.close()
    ranks[1].send("report failure", "OSError: disk full", "Traceback\n")
    ranks[1].send("exit", 1)
    assert ranks[1].wait() == (1, "sparse-zero: error: rank 1 on n1: OSError: disk full\n")


LAUNCHER = """
import sys, time
from sparse_zero.ranks.watchdog import Watchdog
print(Watchdog(print, silence_seconds=30).address, flush=True)
time.sleep(60)
"""


def test_a_killed_launcher_is_a_stop_request(start) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True)
    address = launcher.stdout.readline().strip()
    training, loading = start(0, address, world_size=2, deferred=True), start(1, address, world_size=2)
    assert [training.wait_until_joined(), loading.wait_until_joined()] == [address] * 2
    launcher.kill()
    launcher.communicate()
    training.send("wait for a stop request")
    assert training.process.stdout.readline() == "requested\n"
    training.send("exit", 5)
    said = f"sparse-zero: error: the command that started this run {KILLED}; the ranks save and stop\n"
    assert [training.wait(), loading.wait()] == [(5, said), (STOPPED, "")]


def test_a_lost_launcher_is_said_once_and_stops_all_ranks(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    ranks = start_three(start, watchdog, deferred=True)
    for rank in ranks[1:]:
        rank.send("report lost launcher", 77)
    for rank in ranks:
        rank.send("wait for a stop request")
        assert rank.process.stdout.readline() == "requested\n"
    assert watchdog.lost_launcher in [f"the launcher of rank {rank} on n1 (process 77) {KILLED}" for rank in (1, 2)]
    assert [(each.message, each.is_error) for each in outcomes] == [
        (f"{watchdog.lost_launcher}; the ranks are asked to save and stop", True)
    ]
    for rank in ranks:
        rank.send("leave", STOPPED)
        rank.send("exit", STOPPED)
        assert rank.wait() == (STOPPED, "")
    assert watchdog.wait_for_outcome() is None
    assert not watchdog.has_finished


def test_a_lost_launcher_of_ranks_without_a_command_is_said_by_rank_0(start) -> None:
    first = start(0, None, world_size=2, owner="rank 0", deferred=True)
    other = start(1, first.wait_until_joined(), world_size=2, host="n2", owner="rank 0", deferred=True)
    assert other.wait_until_joined()
    other.send("report lost launcher", 77)
    for rank in (first, other):
        rank.send("wait for a stop request")
        assert rank.process.stdout.readline() == "requested\n"
    for rank in (other, first):
        rank.send("leave", STOPPED)
        rank.send("exit", STOPPED)
    said = (
        f"sparse-zero: error: the launcher of rank 1 on n2 (process 77) {KILLED}; the ranks are asked to save and stop"
    )
    assert [first.wait(), other.wait()] == [(STOPPED, f"{said}\n"), (STOPPED, "")]


def test_a_run_has_finished_when_all_ranks_have_left_with_status_0(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    ranks = start_three(start, watchdog, deferred=True)
    for rank in ranks:
        assert not watchdog.has_finished
        rank.send("leave", 0)
        rank.send("exit", 0)
        assert rank.wait() == (0, "")
    wait_until(lambda: watchdog.has_finished)
    watchdog.lose_launcher("srun was killed")
    assert (watchdog.lost_launcher, outcomes) == (None, [])


def test_the_rank_that_does_not_answer_is_named(open_watchdog, start, outcomes) -> None:
    watchdog = open_watchdog()
    ranks = start_three(start, watchdog, deferred=True)
    ranks[1].process.send_signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(ranks[1].process.pid).status() == psutil.STATUS_STOPPED)
    try:
        watchdog.request_stop()
        for rank in (ranks[0], ranks[2]):
            rank.send("wait for a stop request")
            assert rank.process.stdout.readline() == "requested\n"
        wait_until(lambda: sum(each.is_stopping for each in watchdog._connections.values()) == 2)
        watchdog.end_stuck(7)
        assert [ranks[0].wait(), ranks[2].wait()] == [(1, "")] * 2
    finally:
        ranks[1].process.kill()
    assert [each.message for each in outcomes] == [
        f"rank 1 on n1 (process {ranks[1].process.pid}) did not answer the request to stop within 7 s "
        "(launch.grace_seconds): all ranks are killed; its log is logs/1"
    ]


def test_ranks_that_do_not_stop_write_their_stacks(open_watchdog, start, outcomes, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    watchdog = open_watchdog()
    ranks = start_three(start, watchdog, deferred=True)
    watchdog.request_stop()
    wait_until(lambda: all(each.is_stopping for each in watchdog._connections.values()))
    watchdog.end_stuck(7)
    assert [rank.wait() for rank in ranks] == [(1, "")] * 3
    assert [each.message for each in outcomes] == [
        "ranks 0, 1, 2 on n1 did not stop within 7 s (launch.grace_seconds): all ranks are killed; the log of each "
        "rank has its Python stacks, as logs/0"
    ]
    for rank in range(3):
        stacks = (tmp_path / "logs" / str(rank)).read_text()
        assert stacks.count("hread 0x") == 2
        assert re.search(r'File "<string>", line \d+ in <module>', stacks), "its main thread reads the next command"


@pytest.mark.parametrize(
    "answers",
    [
        [b"HTTP/1.1 400 Bad Request\r\n"],
        [b"x" * 100_000 + b"\n"],
        [b'{"challenge": "00"}\n', b'{"type": "outcome", "status": 0}\n'],
        [b'{"challenge": "00"}\n', b"0" * 64 + b' {"type": "welcome"}\n'],
        [b'{"challenge": "00"}\n', None],
    ],
)
def test_a_rank_does_not_believe_another_program(answers: list[bytes | None]) -> None:
    """None: what the rank itself has sent."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as received:
            connection.sendall(answers[0])
            if len(answers) > 1:
                said = [received.readline(), received.readline()]
                connection.sendall(answers[1] or said[1])
            with contextlib.suppress(ConnectionResetError):
                received.read()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = Address(*listener.getsockname(), "5ec2e7")
        with pytest.raises(UserError, match=rf"127.0.0.1:{address.port} is not the watchdog of this run"):
            WatchdogClient(address, RankInfo(0, "n1", 1), 1, StopRequest(), 30, connect_seconds=0.5)


def test_the_secret_is_not_sent(open_watchdog) -> None:
    """A listener in between sees every byte, and not the secret."""
    watchdog, seen = open_watchdog(), []

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                seen.append(data)
                target.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = watchdog.address._replace(port=listener.getsockname()[1])
        with socket.create_connection(watchdog.address[:2]) as behind:

            def serve() -> None:
                front, _ = listener.accept()
                threading.Thread(target=pass_on, args=(behind, front), daemon=True).start()
                pass_on(front, behind)

            threading.Thread(target=serve, daemon=True).start()
            client = WatchdogClient(address, RankInfo(0, "n1", 1), 1, StopRequest(), 30)
            wait_until(lambda: watchdog.ranks)
            client.leave()
            wait_until(lambda: not watchdog.has_connected_ranks)
    assert b"hello" in b"".join(seen)
    assert watchdog.address.token.encode() not in b"".join(seen)


def test_the_ranks_children_do_not_inherit_the_secret(open_watchdog, monkeypatch) -> None:
    monkeypatch.setenv(WATCH_VARIABLE, str(open_watchdog().address))
    placement = Placement(0, 1, 0, 1, "127.0.0.1", 1)
    client = join_launcher_watchdog(placement, RankInfo(0, "n1", 1), StopRequest(), silence_seconds=30)
    assert WATCH_VARIABLE not in os.environ
    client.leave()


def test_an_unreachable_watchdog_is_a_user_error() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = Address(*nobody.getsockname(), "0")
        with pytest.raises(UserError, match=rf"cannot connect to the watchdog at 127.0.0.1:{address.port}"):
            WatchdogClient(address, RankInfo(0, "n1", 1), 1, StopRequest(), 30, connect_seconds=0)
