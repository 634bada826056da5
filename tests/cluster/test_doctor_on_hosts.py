"""`sparse-zero doctor` on real hosts: well ones, ones with something wrong, and the nodes of a Slurm job."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Host, Hosts, need
from lab_slurm import Slurm
from workload import Workload

pytestmark = pytest.mark.cluster

DOCTOR = (sys.executable, "-m", "launcher", "doctor")
SECONDS = 180


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    return tmp_path / "hosts"


def ask(host: Host, cwd: Path, *words: object, status: int = 0, before: tuple[object, ...] = ()) -> dict[str, Any]:
    """What the doctor says as JSON, whatever is printed around it."""
    __tracebackhide__ = True
    output = host.run(*before, *DOCTOR, *words, "--json", cwd=cwd, timeout=SECONDS, status=status).output
    return json.JSONDecoder().raw_decode(output[output.index("{\n") :])[0]


def problems(told: dict[str, Any], severity: str = "error") -> set[tuple[str, str]]:
    return {(found["host"], found["check"]) for found in told["findings"] if found["severity"] == severity}


def test_hosts_that_are_well(hosts: Hosts, hostfile: Path, workload: Workload, tmp_path: Path) -> None:
    """Asked from a third host, which has no rank.

    Any launcher starts these ranks by the command that starts those of a run, and test_secrets.py has them all.
    """
    need("pdsh")
    launch = [f"launch.hostfile={hostfile}", f"training.output_dir={tmp_path / 'out'}"]
    told = ask(hosts["n3"], tmp_path, workload.recipe, *launch)
    assert problems(told) == set()
    assert [*told["hosts"]] == ["n1", "n2"]
    assert told["ranks"]["hosts"] == {"0": "n1", "1": "n2"}
    assert [(link["from"], link["to"], link["right"]) for link in told["ranks"]["links"]] == [(0, 1, True)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts"], "something was left behind"


@pytest.fixture
def odd_n2(hosts: Hosts) -> Iterator[Host]:
    """n2, which takes its own name for a loopback address, knows no other, and has little shared memory."""
    host = hosts["n2"]
    lines = [
        "set -e",
        "echo '127.0.0.1 localhost\n127.0.1.1 n2' > /run/hosts",
        "mount --bind /run/hosts /etc/hosts",
        "mount -t tmpfs -o size=1m tmpfs /dev/shm",
    ]
    host.run("sh", "-c", "\n".join(lines))
    yield host
    host.run("umount", "/etc/hosts", "/dev/shm")


def test_hosts_with_something_wrong(
    hosts: Hosts, odd_n2: Host, hostfile: Path, workload: Workload, tmp_path: Path
) -> None:
    hosts["n3"].unplug()
    hostfile.write_text("n1 slots=2\nn2 slots=2\nn3 slots=2\n")
    # /run is each host's own.
    launch = [f"launch.hostfile={hostfile}", "training.output_dir=/run/out", "training.use_cpu=true"]
    told = ask(hosts["n1"], tmp_path, workload.recipe, *launch, status=1)
    assert problems(told) == {("n2", "network"), ("n2", "shared disk"), ("n3", "reachability")}
    assert ("n2", "shared memory") in problems(told, "warning")
    assert told["ranks"] is None
    said = " ".join(f"{found['message']} {found['remedy']}" for found in told["findings"])
    assert "its name n2 resolves to 127.0.1.1" in said
    assert "GLOO_SOCKET_IFNAME=eth0" in said
    assert "cannot resolve n1, the host of rank 0" in said


def test_ranks_that_cannot_reach_each_other(hosts: Hosts, hostfile: Path, workload: Workload, tmp_path: Path) -> None:
    """Each host is reached from the third, but not by the other."""
    need("mpi")
    soon = "launch.rendezvous_seconds=10"
    blocked = ("route", "add", "blackhole", f"{hosts['n2'].address}/32")
    hosts["n1"].run("ip", *blocked)
    try:
        words = [workload.recipe, f"launch.hostfile={hostfile}", "launch.launcher=mpi", soon]
        told = ask(hosts["n3"], tmp_path, *words, f"training.output_dir={tmp_path}/out", status=1)
    finally:
        hosts["n1"].run("ip", "route", "del", *blocked[2:])
    assert problems(told) == {(None, "ranks")}
    assert any("rank 1 on n2 cannot reach rank 0" in problem for problem in told["ranks"]["problems"])


def test_nodes_of_a_slurm_job(slurm: Slurm, workload: Workload, tmp_path: Path) -> None:
    words = [workload.recipe, "launch.launcher=slurm", f"training.output_dir={tmp_path}/out"]
    told = ask(slurm.controller, tmp_path, *words, before=("salloc", "--quiet", "--nodes=2"))
    assert problems(told) == set()
    assert [*told["hosts"]] == ["n1", "n2"]
    assert told["ranks"]["hosts"] == {"0": "n1", "1": "n2"}


def test_a_job_that_slurm_would_take_or_refuse(slurm: Slurm, workload: Workload, tmp_path: Path) -> None:
    words = [workload.recipe, "launch.launcher=slurm", f"training.output_dir={tmp_path}/out", "--no-ranks"]
    told = ask(slurm.controller, tmp_path, *words, "launch.nodes=2")
    assert any(found["message"].startswith("sbatch accepts the job") for found in told["findings"])
    assert problems(ask(slurm.controller, tmp_path, *words, "launch.nodes=3", status=1)) == {(None, "slurm")}
    # No single option is out of range, but no node has so many cores.
    told = ask(slurm.controller, tmp_path, *words, "launch.processes_per_node=50", status=1)
    assert any(found["message"].startswith("sbatch rejects the job") for found in told["findings"])
    assert slurm.jobs() == [], "a job was queued"
