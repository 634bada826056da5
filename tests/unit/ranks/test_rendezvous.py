"""What a rank checks and chooses before it joins the process group."""

import dataclasses
import json
import socket
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from sparse_zero.errors import UserError
from sparse_zero.ranks import rendezvous
from sparse_zero.ranks.failures import RankInfo
from sparse_zero.ranks.network import free_port, interfaces
from sparse_zero.ranks.placement import Placement
from sparse_zero.ranks.rendezvous import check_ranks_match, join_rank_zero_watchdog
from sparse_zero.ranks.stop_signals import StopRequest
from sparse_zero.ranks.watchdog import Watchdog

SAME = {"torch": "2.13.0", "a recipe of checksum": "ab12"}


class Store(dict):
    """The part of torch's store that is used."""

    def __init__(self, hosts: list[str]) -> None:
        super().__init__({f"joined/{rank}": json.dumps([host, SAME]) for rank, host in enumerate(hosts)})

    get = dict.__getitem__


@pytest.mark.parametrize(
    ("rank", "own", "chosen"),
    [
        (0, "127.0.1.1", "towards n2"),
        (1, "127.0.1.1", "towards n2"),
        (2, "127.0.1.1", "towards n1"),
        (2, "10.0.0.2", None),
        (2, None, "towards n1"),
    ],
)
def test_the_chosen_interface_leads_to_another_host(
    monkeypatch, rank: int, own: str | None, chosen: str | None
) -> None:
    here = "n1" if rank < 2 else "n2"

    def look_up(name: str) -> str:
        if own is None:
            raise OSError(name)
        return own

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setattr(rendezvous.socket, "gethostbyname", look_up)
    monkeypatch.setattr(rendezvous, "address_towards", lambda host: "127.0.1.1" if host == here else "10.0.0.9")
    monkeypatch.setattr(rendezvous, "interface_towards", lambda host: f"towards {host}")
    rendezvous._choose_interface(Store(["n1", "n1", "n2", "n2"]), Placement(rank, 4, rank % 2, 2, "n1", 1))
    assert (rendezvous.os.environ["GLOO_SOCKET_IFNAME"] or None) == chosen


def test_a_given_interface_is_kept(monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    rendezvous._choose_interface(Store([]), Placement(0, 4, 0, 2, "n1", 1))
    assert rendezvous.os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    ("joined", "nodes", "message"),
    [
        (
            [("n1", SAME), ("n2", {**SAME, "torch": "2.0"})],
            None,
            "rank 1 on n2 has torch 2.0, rank 0 on n1 has 2.13.0",
        ),
        ([("n1", SAME), ("n2", {"torch": "2.13.0"})], None, "rank 1 on n2 has a recipe of checksum None"),
        ([("n1", SAME), ("n1", SAME)], 2, "launch.nodes is 2, but the ranks are on 1 host (n1)"),
    ],
)
def test_ranks_that_differ_are_named(joined, nodes, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_ranks_match(joined, nodes)
    assert message in str(error.value)


def test_ranks_that_match_pass_the_check() -> None:
    check_ranks_match([("n1", SAME), ("n2", SAME)], None)
    check_ranks_match([("n1", SAME), ("n2", SAME)], 2)


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)


@pytest.fixture
def tokens(monkeypatch) -> list[str]:
    """The secrets of the watchdogs that are opened."""
    tokens = []

    class Recorded(Watchdog):
        def __init__(self, *arguments, **settings) -> None:
            super().__init__(*arguments, **settings)
            tokens.append(self.address.token)

    monkeypatch.setattr(rendezvous, "Watchdog", Recorded)
    return tokens


def join(store: dist.Store, rank: int, directory: Path):
    placement = Placement(rank, 2, rank, 2, "127.0.0.1", 1)
    return join_rank_zero_watchdog(
        store, placement, RankInfo(rank, "n1", 1), StopRequest(), print, directory, silence_seconds=30
    )


@pytest.mark.parametrize("given", [None, "a secret of the user's"])
def test_who_reads_the_open_store_does_not_learn_the_secret(store, tokens, tmp_path, monkeypatch, given) -> None:
    def join_with_the_users_environment(rank: int):
        if given:
            monkeypatch.setenv(rendezvous.SECRET_VARIABLE, given)
        return join(store, rank, tmp_path)

    first = join_with_the_users_environment(0)
    stranger = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=5))
    files = list(tmp_path.iterdir())
    second = join_with_the_users_environment(1)
    [token] = tokens
    assert (token == given) == bool(given)
    # Everything that a run of ours has put into it, whatever its name
    stored = [stranger.get("watchdog")]
    assert stranger.num_keys() == store.num_keys() <= len(stored) + 1, "one key is torch's own"
    assert not any(token.encode() in value for value in stored)
    if given:
        assert files == []
    else:
        [file] = files
        assert (file.name in stored[0].decode(), len(token)) == (True, 32)
        assert not file.exists(), "removed when all had joined"
    assert rendezvous.SECRET_VARIABLE not in rendezvous.os.environ
    second.leave()
    first.leave()


def test_a_secret_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*watchdog\.n1\.5, .* on a disk that all hosts share"):
        rendezvous._read_secret(tmp_path, "watchdog.n1.5", seconds=0)


@pytest.mark.parametrize("name", ["../watchdog.n1.5", "/tmp/watchdog.n1.5", "recipe.yaml", "watchdog.\x1b[2J"])
def test_a_stranger_in_the_store_cannot_choose_the_file(tmp_path, name) -> None:
    with pytest.raises(UserError, match="someone else writes to it") as error:
        rendezvous._read_secret(tmp_path, name)
    assert "\x1b" not in str(error.value)


def test_control_characters_in_the_store_are_escaped() -> None:
    assert rendezvous._entry(json.dumps(["n\x1b[1m", {"torch": "2\n"}])) == (r"n\x1b[1m", {"torch": r"2\n"})


def listening(process: psutil.Process) -> set[str]:
    """The addresses at which a process accepts connections."""
    return {each.laddr.ip for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize(("local_world_size", "expected"), [(2, {"127.0.0.1"}), (1, {"::", "0.0.0.0"})])
def test_ranks_of_one_host_meet_on_the_loopback_interface(local_world_size: int, expected: set[str]) -> None:
    before = listening(psutil.Process())
    placement = Placement(0, 2, 0, local_world_size, socket.gethostname(), free_port())
    store = rendezvous.open_store(placement, 5)
    listens = listening(psutil.Process()) - before
    assert listens
    assert listens <= expected
    store.set("joined/0", "here")
    other = rendezvous.open_store(dataclasses.replace(placement, rank=1), 5)
    assert other.get("joined/0") == b"here"


@pytest.mark.parametrize("local_world_size", [2, 1])
def test_a_port_in_use_is_a_user_error(local_world_size: int) -> None:
    with socket.create_server(("", 0)) as other:
        placement = Placement(0, 2, 0, local_world_size, "127.0.0.1", other.getsockname()[1])
        with pytest.raises(UserError, match=r"the rendezvous port \d+ on \S+ is in use by another program"):
            rendezvous.open_store(placement, 5)


def test_gloo_of_ranks_on_one_host_listens_on_the_loopback_interface(monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    rendezvous._use_loopback()
    assert "127.0.0.1" in interfaces()[rendezvous.os.environ["GLOO_SOCKET_IFNAME"]]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    rendezvous._use_loopback()
    assert rendezvous.os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
