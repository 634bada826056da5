"""What a rank works out before it meets the others."""

import json

import pytest

from sparse_zero.errors import UserError
from sparse_zero.ranks import rendezvous
from sparse_zero.ranks.placement import Placement
from sparse_zero.ranks.rendezvous import check_alike

SAME = {"torch": "2.13.0", "a recipe of checksum": "ab12"}


class Store(dict):
    """What of torch's store is asked for."""

    def __init__(self, hosts: list[str]) -> None:
        super().__init__({f"came/{rank}": json.dumps([host, SAME]) for rank, host in enumerate(hosts)})

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
def test_the_interface_leads_to_another_host(monkeypatch, rank: int, own: str | None, chosen: str | None) -> None:
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


def test_an_interface_that_was_given_stays(monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    rendezvous._choose_interface(Store([]), Placement(0, 4, 0, 2, "n1", 1))
    assert rendezvous.os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    ("came", "nodes", "complaint"),
    [
        (
            [("n1", SAME), ("n2", {**SAME, "torch": "2.0"})],
            None,
            "rank 1 on n2 has torch 2.0, rank 0 on n1 has 2.13.0",
        ),
        ([("n1", SAME), ("n2", {"torch": "2.13.0"})], None, "rank 1 on n2 has a recipe of checksum None"),
        ([("n1", SAME), ("n1", SAME)], 2, "2 are asked for, the ranks are on 1 (n1)"),
    ],
)
def test_ranks_that_differ_are_named(came, nodes, complaint: str) -> None:
    with pytest.raises(UserError) as error:
        check_alike(came, nodes)
    assert complaint in str(error.value)


def test_ranks_that_are_alike_may_go_on() -> None:
    check_alike([("n1", SAME), ("n2", SAME)], None)
    check_alike([("n1", SAME), ("n2", SAME)], 2)
