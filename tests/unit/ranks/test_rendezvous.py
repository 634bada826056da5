"""What a rank checks and chooses before it joins the process group."""

import dataclasses
import json
import socket

import psutil
import pytest

from sparse_zero.errors import UserError
from sparse_zero.ranks import rendezvous
from sparse_zero.ranks.network import free_port, interfaces
from sparse_zero.ranks.placement import Placement
from sparse_zero.ranks.rendezvous import check_ranks_match

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
