"""The srun commands that start ranks."""

import subprocess

import pytest
from launch_cases import RANK, WORDS, command, recipe

from launcher.ways import launchers, slurm
from launcher.ways.command import SAFE_PATH
from launcher.ways.slurm import option_words
from sparse_zero.recipe.launch import LaunchSection

pytestmark = pytest.mark.usefixtures("plain_machine")


def test_srun_outside_of_a_job_asks_for_one() -> None:
    options = {"partition": "gpu", "time": "1:00:00", "exclusive": True, "mem_per_cpu": None, "requeue": False}
    made = command("slurm", nodes=2, processes_per_node=4, slurm=options, launcher_args=["--label"])
    assert made.argv == [
        *("srun", "--nodes", "2", "--ntasks", "8", "--ntasks-per-node", "4", "--kill-on-bad-exit=1"),
        *("--partition=gpu", "--time=1:00:00", "--exclusive", "--label", *RANK),
    ]
    assert (made.environment, made.files, made.world_size) == (SAFE_PATH, {}, 8)


def test_srun_within_a_job_takes_its_nodes_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"JOB_ID": "1", "JOB_NUM_NODES": "3", "GPUS_ON_NODE": "4", "NTASKS_PER_NODE": "1", "CPUS_PER_TASK": "6"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    made = command("slurm", slurm={"partition": "gpu"})
    assert made.argv == [
        *("srun", "--nodes", "3", "--ntasks", "12", "--ntasks-per-node", "4", "--kill-on-bad-exit=1"),
        *("--cpus-per-task=6", *RANK),
    ]
    fewer = slurm.slurm_command(LaunchSection(launcher="slurm", nodes=2), WORDS, use_cpu=True, nodes=["g1", "g3"])
    assert fewer.argv[1:9] == [
        *("--nodes", "2", "--ntasks", "8", "--ntasks-per-node", "4", "--nodelist", "g1,g3"),
    ]
    assert fewer.environment == {**SAFE_PATH, "OMP_NUM_THREADS": "6"}
    assert command("slurm", nodes=1).argv[1:5] == ["--nodes", "1", "--ntasks", "4"]
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert command("slurm").world_size == 6


def test_sruns_ranks_are_given_variables_by_its_environment() -> None:
    made = command("slurm", watch="n1:5:secret", environment={"A": "b"}, master_addr="ib1", master_port=29507)
    assert made.environment == {
        **SAFE_PATH,
        "MASTER_ADDR": "ib1",
        "MASTER_PORT": "29507",
    }
    assert made.private == {"A": "b", "SPARSE_ZERO_WATCH": "n1:5:secret"}
    assert made.environ().items() >= {**made.environment, **made.private}.items()
    assert made.private_file is None
    assert "secret" not in " ".join(made.argv)


def test_options_by_their_long_names() -> None:
    options = {"ntasks_per_node": 2, "gres": "gpu:a100:4", "hold": True, "mem": None, "nice": False, "begin": 0}
    assert option_words(options) == ["--ntasks-per-node=2", "--gres=gpu:a100:4", "--hold", "--begin=0"]


def test_the_nodes_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "g[1-3]")
    shown = subprocess.CompletedProcess([], 0, stdout="g1\ng2\ng3\n")
    monkeypatch.setattr(launchers.subprocess, "run", lambda words, **_: shown if words[-1] == "g[1-3]" else None)
    assert launchers.host_names(recipe("slurm")) == ["g1", "g2", "g3"]
    assert launchers.host_names(recipe("slurm", nodes=2)) == ["g1", "g2"]
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    assert launchers.host_names(recipe("slurm")) == []
