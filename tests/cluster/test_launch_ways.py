"""The same run on two hosts, one rank each, through every launcher that users have: the losses of one host."""

import json
import re
from pathlib import Path

import own_files
import pytest
from lab import Hosts, need
from lab_slurm import Slurm
from workload import RANKS, STEPS, Workload, losses

pytestmark = pytest.mark.cluster

TRAIN = "sparse_zero.train"
COMMAND = ["sparse-zero", "train"]
SECONDS = 180
RUNNER = ["deepspeed", "--hostfile", "HOSTFILE"]
WAYS = {
    "deepspeed with pdsh by hand": ("pdsh", [*RUNNER, "--launcher", "pdsh", "--module", TRAIN], []),
    "mpirun by hand": ("mpi", ["mpirun", "-np", "2", "--hostfile", "HOSTFILE", "python", "-m", TRAIN], []),
    "srun by hand": ("slurm", ["srun", "-N2", "--ntasks-per-node=1", "python", "-m", TRAIN], []),
    "deepspeed with pdsh": ("pdsh", COMMAND, ["launcher=deepspeed", "hostfile=HOSTFILE"]),
    "deepspeed with openmpi": ("mpi", COMMAND, ["launcher=deepspeed", "multinode=openmpi", "hostfile=HOSTFILE"]),
    "mpi": ("mpi", COMMAND, ["launcher=mpi", "hostfile=HOSTFILE"]),
    "torchrun": ("pdsh", COMMAND, ["launcher=torchrun", "hostfile=HOSTFILE"]),
}
"""By way: the part of the lab that it needs, what stands before the run's own words, and keys of `launch`."""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def words(workload: Workload, output: Path) -> list[object]:
    """The run's own words, whatever launches it."""
    return [workload.recipe, f"training.output_dir={output}"]


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    return tmp_path / "hosts"


def same(output: Path, expected: dict[int, float]) -> None:
    assert len(expected) == STEPS
    assert losses(output) == pytest.approx(expected, abs=1e-5)
    assert json.loads((output / "results.json").read_text())["world_size"] == RANKS


@pytest.mark.parametrize("way", WAYS)
def test_the_losses_are_those_of_one_host(
    way: str,
    request: pytest.FixtureRequest,
    hosts: Hosts,
    hostfile: Path,
    words: list,
    output: Path,
    one_host_losses: dict[int, float],
) -> None:
    part, command, keys = WAYS[way]
    need(part)
    if part == "slurm":
        request.getfixturevalue("slurm")
    if command[0] != "deepspeed":
        # DeepSpeed's runner puts the working directory into PYTHONPATH; the command prevents it.
        own_files.write(hostfile.parent, own_files.NAMES if command == COMMAND else own_files.WITHOUT_SPARSE_ZERO)
    run = [*command, *words, *(f"launch.{key}" for key in keys)]
    hosts["n1"].run(
        *(str(word).replace("HOSTFILE", str(hostfile)) for word in run), cwd=hostfile.parent, timeout=SECONDS
    )
    same(output, one_host_losses)


@pytest.mark.parametrize("way", ["mpi", "torchrun", "deepspeed with openmpi"])
def test_a_working_directory_with_a_space(
    way: str, hosts: Hosts, hostfile: Path, workload: Workload, one_host_losses: dict[int, float]
) -> None:
    part, command, keys = WAYS[way]
    need(part)
    directory = hostfile.parent / "my project; id"
    directory.mkdir()
    words = [workload.recipe, "training.output_dir=my out", *(f"launch.{key}" for key in keys)]
    run = [str(word).replace("HOSTFILE", str(hostfile)) for word in [*command, *words]]
    hosts["n1"].run(*run, cwd=directory, timeout=SECONDS)
    same(directory / "my out", one_host_losses)


def test_deepspeed_over_pdsh_is_not_started_in_a_directory_with_a_space(
    hosts: Hosts, hostfile: Path, workload: Workload
) -> None:
    """Its runner would start the ranks in the home directory, with status 0."""
    need("pdsh")
    directory = hostfile.parent / "my project"
    directory.mkdir()
    words = [workload.recipe, "training.output_dir=out", f"launch.hostfile={hostfile}"]
    said = hosts["n1"].run(*COMMAND, *words, cwd=directory, timeout=SECONDS, status=2).output
    assert said == (
        f"sparse-zero: error: '{directory}': DeepSpeed's runner cannot pass the working directory to other hosts, "
        "because its name has a space or another special character; rename it, or choose launch.launcher=torchrun "
        "or mpi\n"
    )
    assert not (directory / "out").exists()


def test_torchrun_on_each_host(hosts: Hosts, words: list, output: Path, one_host_losses: dict[int, float]) -> None:
    meeting = ["--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:29500"]
    agents = [hosts[name].start("torchrun", *meeting, "-m", TRAIN, *words) for name in ("n1", "n2")]
    for agent in agents:
        agent.wait(SECONDS)
    same(output, one_host_losses)


def test_hosts_that_take_their_own_names_for_the_loopback(
    hosts: Hosts, hostfile: Path, words: list, output: Path, one_host_losses: dict[int, float]
) -> None:
    """As Debian's installer writes /etc/hosts; gloo would give the others that address."""
    need("pdsh")
    for name in ("n1", "n2"):
        own = hosts.root / f"hosts.{name}"
        lines = [line for line in (hosts.root / "etc" / "hosts").read_text().splitlines() if not line.endswith(name)]
        own.write_text("\n".join([*lines, f"127.0.1.1 {name}"]) + "\n")
        hosts[name].run("mount", "--bind", own, "/etc/hosts")
    try:
        launch = ["launch.launcher=torchrun", f"launch.hostfile={hostfile}"]
        hosts["n1"].run(*COMMAND, *words, *launch, cwd=hostfile.parent, timeout=SECONDS)
    finally:
        for name in ("n1", "n2"):
            hosts[name].run("umount", "/etc/hosts")
    same(output, one_host_losses)


def test_a_job_that_is_submitted_in_a_directory_with_a_space(
    slurm: Slurm, workload: Workload, tmp_path: Path, one_host_losses: dict[int, float]
) -> None:
    directory = tmp_path / "my project; id"
    directory.mkdir()
    words = [workload.recipe, "training.output_dir=my out", "training.run_name=it's $(id)"]
    submit = ["sparse-zero", "submit", *words, "launch.nodes=2", "--partition", "main", "--comment=x;id $HOME"]
    said = slurm.run(*submit, cwd=directory).output
    job = int(re.search(r"job (\d+) submitted", said)[1])
    slurm.wait(job, SECONDS)
    same(directory / "my out", one_host_losses)


def test_a_submitted_job(slurm: Slurm, words: list, output: Path, one_host_losses: dict[int, float]) -> None:
    submit = ["sparse-zero", "submit", *words, "launch.nodes=2", "--partition", "main"]
    said = slurm.run(*submit, cwd=output.parent).output
    job = int(re.search(r"job (\d+) submitted", said)[1])
    slurm.wait(job, SECONDS)
    same(output, one_host_losses)
    assert f"slurm-{job}.log" in said
