"""The same run on two hosts, one rank each, through every launcher that users have: the losses of one host."""

import json
import re
from pathlib import Path

import pytest
from lab import Hosts, need
from lab_slurm import Slurm
from workload import RANKS, STEPS, Workload, losses

pytestmark = pytest.mark.cluster

TRAIN = "sparse_zero.train"
SECONDS = 180
RUNNER = ["deepspeed", "--hostfile", "HOSTFILE"]
BY_HAND = {
    "deepspeed with pdsh": ("pdsh", [*RUNNER, "--launcher", "pdsh", "--module", TRAIN]),
    "mpirun": ("mpi", ["mpirun", "-np", "2", "--hostfile", "HOSTFILE", "python", "-m", TRAIN]),
    "srun": ("slurm", ["srun", "-N2", "--ntasks-per-node=1", "python", "-m", TRAIN]),
}
"""By way: the part of the lab that it needs, and what stands before the run's own words."""

BY_RECIPE = {
    "deepspeed with pdsh": ("pdsh", ["launcher=deepspeed", "hostfile=HOSTFILE"]),
    "deepspeed with openmpi": ("mpi", ["launcher=deepspeed", "multinode=openmpi", "hostfile=HOSTFILE"]),
    "mpi": ("mpi", ["launcher=mpi", "hostfile=HOSTFILE"]),
    "torchrun": ("pdsh", ["launcher=torchrun", "hostfile=HOSTFILE"]),
}
"""By way: the part of the lab that it needs, and keys of `launch`."""


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


def prepare(part: str, request: pytest.FixtureRequest) -> None:
    need(part)
    if part == "slurm":
        request.getfixturevalue("slurm")


def same(output: Path, expected: dict[int, float]) -> None:
    assert len(expected) == STEPS
    assert losses(output) == pytest.approx(expected, abs=1e-5)
    assert json.loads((output / "results.json").read_text())["world_size"] == RANKS


@pytest.mark.parametrize("way", BY_HAND)
def test_ranks_started_by_hand(
    way: str,
    request: pytest.FixtureRequest,
    hosts: Hosts,
    hostfile: Path,
    words: list,
    output: Path,
    one_host_losses: dict[int, float],
) -> None:
    part, launch = BY_HAND[way]
    prepare(part, request)
    launch = [word.replace("HOSTFILE", str(hostfile)) for word in launch]
    hosts["n1"].run(*launch, *words, cwd=hostfile.parent, timeout=SECONDS)
    same(output, one_host_losses)


def test_torchrun_on_each_host(hosts: Hosts, words: list, output: Path, one_host_losses: dict[int, float]) -> None:
    meeting = ["--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:29500"]
    agents = [hosts[name].start("torchrun", *meeting, "-m", TRAIN, *words) for name in ("n1", "n2")]
    for agent in agents:
        agent.wait(SECONDS)
    same(output, one_host_losses)


@pytest.mark.parametrize("way", BY_RECIPE)
def test_ranks_started_by_the_recipe(
    way: str,
    request: pytest.FixtureRequest,
    hosts: Hosts,
    hostfile: Path,
    words: list,
    output: Path,
    one_host_losses: dict[int, float],
) -> None:
    part, keys = BY_RECIPE[way]
    prepare(part, request)
    launch = [f"launch.{key.replace('HOSTFILE', str(hostfile))}" for key in keys]
    hosts["n1"].run("sparse-zero", "train", *words, *launch, cwd=hostfile.parent, timeout=SECONDS)
    same(output, one_host_losses)


def test_a_submitted_job(slurm: Slurm, words: list, output: Path, one_host_losses: dict[int, float]) -> None:
    submit = ["sparse-zero", "submit", *words, "launch.nodes=2", "--partition", "main"]
    said = slurm.run(*submit, cwd=output.parent).output
    job = int(re.search(r"job (\d+) submitted", said)[1])
    slurm.wait(job, SECONDS)
    same(output, one_host_losses)
    assert f"slurm-{job}.log" in said
