"""The placement of a process, from the environments that launchers set."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_zero.errors import UserError
from sparse_zero.ranks import placement
from sparse_zero.ranks.placement import Placement, expand_counts, first_node, slurm_port

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29501",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MASTER = {"MASTER_ADDR": "n9", "MASTER_PORT": "29502"}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "41",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
    "SLURM_NTASKS": "5",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}
STEP = BATCH_SCRIPT | {
    "SLURM_PROCID": "4",
    "SLURM_NODEID": "2",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}


@pytest.fixture(autouse=True)
def all_names_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.socket, "getaddrinfo", lambda *arguments: [])


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def test_a_process_started_without_a_launcher_has_no_placement() -> None:
    assert Placement.from_environment({"PATH": "/bin"}) is None


def test_torchrun() -> None:
    assert Placement.from_environment(TORCHRUN) == Placement(5, 8, 1, 4, "n1", 29501)


def test_deepspeed_has_another_name_for_the_local_world_size() -> None:
    assert Placement.from_environment(without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"LOCAL_SIZE": "2"}) == Placement(
        5, 8, 1, 2, "n1", 29501
    )


def test_one_rank_needs_no_master_address() -> None:
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert Placement.from_environment(one) == Placement(0, 1, 0, 1, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["WORLD_SIZE"], "not WORLD_SIZE:"),
        (["LOCAL_RANK"], "not LOCAL_RANK:"),
        (["WORLD_SIZE", "LOCAL_RANK"], "not WORLD_SIZE and LOCAL_RANK:"),
        (["MASTER_ADDR"], "not MASTER_ADDR:"),
        (["MASTER_ADDR", "MASTER_PORT"], "not MASTER_ADDR and MASTER_PORT:"),
    ],
)
def test_missing_variables_are_named(missing: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"RANK=5 is set, but {message}"):
        Placement.from_environment(without(TORCHRUN, *missing))


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        (TORCHRUN, "RANK"),
        (TORCHRUN, "WORLD_SIZE"),
        (TORCHRUN, "MASTER_PORT"),
        (OPEN_MPI | MASTER, "OMPI_COMM_WORLD_LOCAL_RANK"),
        (OPEN_MPI | MASTER, "MASTER_PORT"),
        (HYDRA | MASTER, "PMI_SIZE"),
        (STEP, "SLURM_NODEID"),
        (STEP | MASTER, "MASTER_PORT"),
    ],
)
def test_a_variable_that_is_not_an_integer_is_named(environment: dict[str, str], name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} must be an integer, but is four"):
        Placement.from_environment(environment | {name: "four"})


# MPI


@pytest.mark.parametrize("environment", [OPEN_MPI, HYDRA])
def test_mpirun_with_a_given_master_address(environment: dict[str, str]) -> None:
    assert Placement.from_environment(environment | MASTER) == Placement(3, 4, 1, 2, "n9", 29502)


def test_mpirun_with_one_rank_needs_no_master_address() -> None:
    one = OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    found = Placement.from_environment(one)
    assert (found.rank, found.world_size, found.master_addr) == (0, 1, "127.0.0.1")
    assert found.master_port > 0


def test_mpirun_without_mpi4py_gives_both_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"pip install mpi4py, or .* mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500"):
        Placement.from_environment(OPEN_MPI)


@pytest.mark.parametrize("environment", [{}, {"MASTER_ADDR": "ib1"}])
def test_mpi4py_broadcasts_the_host_of_rank_0(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    given = []

    def bcast(master: tuple[str, int], root: int) -> tuple[str, int]:
        given.append((master[0], root))
        return "n1", 4321

    mpi = SimpleNamespace(COMM_WORLD=SimpleNamespace(bcast=bcast), Finalize=lambda: given.append("finalized"))
    mpi4py = SimpleNamespace(rc=SimpleNamespace(finalize=True), MPI=mpi)
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    monkeypatch.setattr(placement.socket, "gethostname", lambda: "here")
    assert Placement.from_environment(OPEN_MPI | environment) == Placement(3, 4, 1, 2, "n1", 4321)
    assert given == [(environment.get("MASTER_ADDR", "here"), 0), "finalized"]
    # A rank that fails after this must not wait for the others in MPI_Finalize.
    assert mpi4py.rc.finalize is False


# Slurm


def test_a_step_on_three_nodes_with_different_numbers_of_tasks() -> None:
    assert Placement.from_environment(STEP) == Placement(4, 5, 0, 1, "gpu07", slurm_port(STEP))
    first = STEP | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    assert Placement.from_environment(first) == Placement(1, 5, 1, 2, "gpu07", slurm_port(STEP))


def test_a_step_that_is_smaller_than_its_job() -> None:
    step = STEP | {
        "SLURM_PROCID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "gpu[08-09]",
    }
    assert Placement.from_environment(step) == Placement(1, 2, 0, 1, "gpu08", slurm_port(STEP))


def test_a_step_on_one_node_uses_the_loopback_address() -> None:
    step = STEP | {"SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_LOCALID": "4"}
    assert Placement.from_environment(step) == Placement(4, 5, 4, 5, "127.0.0.1", slurm_port(STEP))


def test_a_given_master_address_is_kept() -> None:
    found = Placement.from_environment(STEP | MASTER)
    assert (found.master_addr, found.master_port) == ("n9", 29502)


@pytest.mark.parametrize("environment", [BATCH_SCRIPT, without(STEP, "SLURM_STEP_NUM_TASKS")])
def test_a_batch_script_is_no_rank(environment: dict[str, str]) -> None:
    assert Placement.from_environment(environment) is None


def test_torchrun_within_a_step_has_priority() -> None:
    assert Placement.from_environment(STEP | TORCHRUN) == Placement(5, 8, 1, 4, "n1", 29501)
    assert Placement.from_environment(BATCH_SCRIPT | OPEN_MPI | MASTER).world_size == 4


def test_a_reserved_port_is_used() -> None:
    assert slurm_port(STEP | {"SLURM_STEP_RESV_PORTS": "12000-12003"}) == 12000
    assert Placement.from_environment(STEP | {"SLURM_STEP_RESV_PORTS": "12005"}).master_port == 12005


def test_ports_depend_on_job_step_and_requeue_and_not_on_the_rank() -> None:
    changes: list[dict[str, str]] = [
        {},
        {"SLURM_STEP_ID": "4"},
        {"SLURM_JOB_ID": "42"},
        {"SLURM_RESTART_COUNT": "1"},
    ]
    ports = [slurm_port(STEP | change) for change in changes]
    assert len(set(ports)) == len(ports)
    assert all(20_000 <= port < 30_000 for port in ports)
    assert slurm_port(STEP) == slurm_port(STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert 20_000 <= slurm_port({"SLURM_JOB_ID": "4294967295"}) < 30_000


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("2(x3)", [2, 2, 2]), ("2(x2),1,3(x2)", [2, 2, 1, 3, 3]), ("16,8", [16, 8])]
)
def test_counts(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


@pytest.mark.parametrize("text", ["", "2(x", "two", "2,,1"])
def test_invalid_counts(text: str) -> None:
    with pytest.raises(UserError, match="is not a list of counts"):
        expand_counts(text)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("login1,gpu[07-09]", "login1"),
        ("n[3,5]-ib", "n3-ib"),
        ("n-a[1-2].cluster.org,b", "n-a1.cluster.org"),
        ("rack[1-2]n[05-08]", "rack1n05"),
    ],
)
def test_the_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize("nodes", ["", ","])
def test_invalid_node_lists(nodes: str) -> None:
    with pytest.raises(UserError, match="set MASTER_ADDR to the name of the first node"):
        first_node(nodes)


@pytest.mark.parametrize(
    ("shown", "master"), [("NodeName=gpu07 NodeAddr=10.0.0.7 NodeHostName=gpu07", "10.0.0.7"), ("", "gpu07")]
)
def test_slurm_knows_the_address_of_a_node_whose_name_does_not_resolve(
    monkeypatch: pytest.MonkeyPatch, shown: str, master: str
) -> None:
    commands: list[Any] = []

    def unknown(*arguments: Any) -> None:
        raise OSError

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout=shown)

    monkeypatch.setattr(placement.socket, "getaddrinfo", unknown)
    monkeypatch.setattr(subprocess, "run", run)
    assert Placement.from_environment(STEP).master_addr == master
    assert commands == [["scontrol", "show", "node", "gpu07"]]


# The variables and the placement of a single process


def test_export_sets_the_variables_that_libraries_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    Placement(3, 4, 1, 2, "n1", 4321).export()
    assert os.environ == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "4321",
    }
    assert Placement.from_environment(os.environ) == Placement(3, 4, 1, 2, "n1", 4321)


def test_single_process() -> None:
    placement = Placement.single_process()
    assert (placement.rank, placement.world_size, placement.local_rank, placement.local_world_size) == (0, 1, 0, 1)
    assert placement.master_port > 0
