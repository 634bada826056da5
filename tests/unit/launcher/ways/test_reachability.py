"""Hosts that do not answer, and the address at which this one is reached."""

import pytest
from launch_cases import recipe

from launcher.ways import launchers, reachability
from sparse_zero.ranks.network import address_towards, interface_towards

pytestmark = pytest.mark.usefixtures("plain_machine")


def test_hosts_that_do_not_answer_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'case "$0" in n1) exit 0;; n2) echo first >&2; echo "no route" >&2; exit 255;; *) exit 3;; esac'
    monkeypatch.setattr(reachability, "SSH", ["sh", "-c", script])
    assert reachability.unreachable_hosts(["n1", "n2", "n3"]) == {"n2": "no route", "n3": "sh exited with status 3"}
    assert reachability.unreachable_hosts([]) == {}
    monkeypatch.setattr(reachability, "SSH", ["no-such-program"])
    assert reachability.unreachable_hosts(["n1"]) == {"n1": "no-such-program: No such file or directory"}
    monkeypatch.setattr(reachability, "_SECONDS", 0.1)
    monkeypatch.setattr(reachability, "SSH", ["sh", "-c", "exec sleep 30"])
    assert reachability.unreachable_hosts(["n1"]) == {"n1": "no answer within 0.1 s"}


def test_mpirun_asks_no_ssh_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(reachability, "unreachable_hosts", lambda names: asked.append(list(names)) or {})
    monkeypatch.setattr(reachability.socket, "gethostname", lambda: "n1")
    launchers.unreachable(recipe("mpi"), ["n1", "localhost", "n2"])
    launchers.unreachable(recipe("deepspeed"), ["n1", "n2"])
    assert asked == [["n2"], ["n1", "n2"]]


def test_the_address_that_ranks_reach_this_process_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability.socket, "gethostname", lambda: "n1")
    monkeypatch.setattr(launchers, "address_towards", lambda towards: f"address towards {towards}")
    assert launchers.watchdog_address(recipe("deepspeed", hostfile=None), []) == "127.0.0.1"
    assert launchers.watchdog_address(recipe("deepspeed"), ["n1", "n2", "n3"]) == "address towards n2"
    assert launchers.watchdog_address(recipe("deepspeed"), ["n1"]) == "n1"
    assert launchers.watchdog_address(recipe("slurm"), []) == "n1"
    monkeypatch.undo()
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_towards("127.0.0.1") == "lo"
