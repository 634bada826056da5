"""The same run on two hosts, one rank each, through every launcher that users have: the losses of one host."""

import json
from pathlib import Path

import pytest
from lab import Hosts, need
from workload import RANKS, STEPS, Workload, losses

pytestmark = pytest.mark.cluster

DEEPSPEED = {
    "pdsh": ["--launcher", "pdsh"],
    "openmpi": ["--launcher", "openmpi", "--launcher_args=--allow-run-as-root"],
}
TRAIN = "sparse_zero.train"
SECONDS = 180


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


@pytest.mark.parametrize("way", DEEPSPEED)
def test_deepspeed_with_a_hostfile(
    way: str, hosts: Hosts, hostfile: Path, words: list, output: Path, one_host_losses: dict[int, float]
) -> None:
    need({"openmpi": "mpi"}.get(way, way))
    hosts["n1"].run(
        *("deepspeed", "--hostfile", hostfile, *DEEPSPEED[way], "--module", TRAIN, *words),
        cwd=hostfile.parent,
        timeout=SECONDS,
    )
    same(output, one_host_losses)


def test_torchrun_on_each_host(hosts: Hosts, words: list, output: Path, one_host_losses: dict[int, float]) -> None:
    meeting = ["--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:29500"]
    agents = [hosts[name].start("torchrun", *meeting, "-m", TRAIN, *words) for name in ("n1", "n2")]
    for agent in agents:
        agent.wait(SECONDS)
    same(output, one_host_losses)
