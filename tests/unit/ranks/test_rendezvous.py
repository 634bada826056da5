"""What a rank checks and chooses before it joins the process group."""

import json

import pytest

from sparse_zero.errors import UserError
from sparse_zero.ranks import rendezvous
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
