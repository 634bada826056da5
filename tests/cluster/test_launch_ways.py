"""The same run on two hosts, one rank each: the losses of one host. test_secrets.py has the other ways to start it."""

import json
from pathlib import Path

import pytest
from lab import Hosts, need
from workload import RANKS, STEPS, Workload, losses

pytestmark = pytest.mark.cluster

TRAIN = "sparse_zero.train"
COMMAND = ["sparse-zero", "train"]
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


def test_the_deepspeed_runner_by_hand(
    hosts: Hosts, hostfile: Path, words: list, output: Path, one_host_losses: dict[int, float]
) -> None:
    need("pdsh")
    run = ["deepspeed", "--hostfile", hostfile, "--launcher", "pdsh", "--module", TRAIN, *words]
    hosts["n1"].run(*run, cwd=hostfile.parent, timeout=SECONDS)
    same(output, one_host_losses)


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
