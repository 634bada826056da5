"""The same run on two hosts, one rank each: the losses of one host. test_secrets.py has the other ways to start it.

A comparison starts its runs in the same ways; here it does so by Slurm.
"""

import json
from pathlib import Path

import pytest
from lab import Hosts, need
from lab_slurm import Slurm
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


def test_a_comparison_under_slurm(
    hosts: Hosts, slurm: Slurm, workload: Workload, tmp_path: Path, one_host_losses: dict[int, float]
) -> None:
    """Each run of it has a rank on each host, and the sparse one has the losses of a single run."""
    methods = ["--methods", "sparse", "lora", "--seeds", "1", "--out", tmp_path / "compared"]
    keys = ["launch.launcher=slurm", "launch.nodes=2"]
    hosts["n1"].run("sparse-zero", "compare", workload.recipe, *methods, *keys, cwd=tmp_path, timeout=SECONDS)
    for method in ("sparse", "lora"):
        [results] = (tmp_path / "compared" / method).rglob("results.json")
        assert json.loads(results.read_text())["world_size"] == RANKS, method
        if method == "sparse":
            assert losses(results.parent) == pytest.approx(one_host_losses, abs=1e-5)
        assert len(json.loads(results.read_text())["optimizer_bytes_per_rank"]) == RANKS
