"""What is wrong with hosts, hostfiles, ports and versions is said in one line, and nothing is left waiting."""

import re
from pathlib import Path

import pytest
from lab import Hosts, need
from on_host import Command
from workload import Workload

pytestmark = pytest.mark.cluster

OTHER_VERSION = """
import importlib.metadata

real = importlib.metadata.version
importlib.metadata.version = lambda name: "2.0.1" if name == "torch" else real(name)
"""


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    return tmp_path / "hosts"


def refused(run: Command, complaint: str, timeout: float = 60) -> None:
    """Ends with status 2 and one line of an error."""
    run.wait(timeout, status=2)
    assert len(re.findall("sparse-zero: error: ", run.output)) == 1, run.output
    assert re.search(f"sparse-zero: error: .*{complaint}", run.output), run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "hosts: No such file"),
        ("", "lists no host"),
        ("n1\nn2\n", "line 1: 'n1' is not of the form 'HOST slots"),
    ],
)
def test_a_wrong_hostfile(text: str | None, complaint: str, hosts: Hosts, workload: Workload, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    words = [workload.recipe, f"launch.hostfile={tmp_path / 'hosts'}"]
    refused(hosts["n1"].start("sparse-zero", "train", *words, cwd=tmp_path), complaint)


def test_unreachable_and_unknown_hosts(hosts: Hosts, hostfile: Path, workload: Workload) -> None:
    need("pdsh")
    hosts["n2"].unplug()
    hostfile.write_text("n1 slots=1\nn2 slots=1\nn9 slots=1\n")
    run = hosts["n1"].start(
        "sparse-zero", "train", workload.recipe, f"launch.hostfile={hostfile}", cwd=hostfile.parent
    )
    refused(run, "2 of 3 hosts cannot be reached: n2: .*; n9: .*n9")


def test_a_port_that_is_taken_on_the_first_host(
    hosts: Hosts, hostfile: Path, workload: Workload, tmp_path: Path
) -> None:
    need("pdsh")
    listen = "import socket, time; s = socket.create_server(('', 29555)); print('listens', flush=True); time.sleep(99)"
    taken = hosts["n2"].start("python", "-c", listen)
    taken.wait_for("listens")
    # The command is on n1, rank 0 on n2.
    hostfile.write_text("n2 slots=1\nn1 slots=1\n")
    words = [f"launch.hostfile={hostfile}", "launch.master_port=29555", f"training.output_dir={tmp_path / 'out'}"]
    run = hosts["n1"].start("sparse-zero", "train", workload.recipe, *words, cwd=tmp_path)
    refused(run, "the rendezvous port 29555 on n2 is in use")
    taken.end()


def test_another_version_of_torch_on_one_host(
    hosts: Hosts, hostfile: Path, workload: Workload, tmp_path: Path
) -> None:
    need("pdsh")
    # Each host has a /run of its own.
    hosts["n2"].run("mkdir", "/run/other")
    hosts["n2"].run("sh", "-c", f"cat > /run/other/sitecustomize.py <<'END'\n{OTHER_VERSION}END")
    path = f"/run/other:{hosts.environment['PYTHONPATH']}"
    words = [f"launch.hostfile={hostfile}", f"training.output_dir={tmp_path / 'out'}", "launch.launcher=torchrun"]
    run = hosts["n1"].start("sparse-zero", "train", workload.recipe, *words, cwd=tmp_path, env={"PYTHONPATH": path})
    refused(run, "rank 1 on n2 has torch 2.0.1, rank 0 on n1 has 2.13.0")


def test_a_runner_that_lost_its_hostfile_does_not_train_on_one_host(
    hosts: Hosts, workload: Workload, tmp_path: Path
) -> None:
    runner = ["deepspeed", "--hostfile", tmp_path / "nowhere", "--module", "sparse_zero.train", workload.recipe]
    words = ["launch.hostfile=hosts", "launch.nodes=2", f"training.output_dir={tmp_path / 'out'}"]
    # Without a GPU the runner takes this for the number of devices.
    run = hosts["n1"].start(*runner, *words, cwd=tmp_path, env={"DS_ACCELERATOR": "cpu"})
    run.wait(60, status=None)
    assert run.status != 0
    assert "launch.nodes is 2, but the ranks are on 1 host (n1)" in run.output
    assert not (tmp_path / "out" / "results.json").exists()
