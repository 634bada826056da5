"""The commands that start ranks on this machine, and its accelerators."""

import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_cases import dry_run, one_error

from launcher.cli import main
from launcher.ways import devices
from launcher.ways.command import SAFE_PATH
from sparse_zero.errors import UserError

BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    """Eight cores, no accelerator, none of the variables that change the command."""
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that what a test leaves in it is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(devices, "count_accelerators", lambda: 0)
    monkeypatch.setattr(devices, "usable_cores", lambda: 8)


def test_deepspeed_command(capsys, recipe):
    command, environment = dry_run(
        capsys, recipe, "launch.processes_per_node=2", "launch.master_port=29501", "training.seed=7"
    )
    assert command == [
        *(str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "29501"),
        *("--hostfile", "/dev/null", "--log_level", "critical"),
        *("--module", "sparse_zero.train", recipe),
        *("launch.processes_per_node=2", "launch.master_port=29501", "training.seed=7"),
    ]
    assert environment == {"DS_ACCELERATOR": "cpu", **SAFE_PATH, "OMP_NUM_THREADS": "4"}


def test_torchrun_command(capsys, recipe):
    words = ["launch.launcher=torchrun", "launch.processes_per_node=3"]
    command, environment = dry_run(capsys, recipe, *words)
    torchrun = [sys.executable, "-m", "launcher.ways.torchrun"]
    ranks = ["--nproc-per-node", "3", "-m", "sparse_zero.train", recipe, *words]
    assert command[:3] == torchrun
    assert command[3:6] == ["--rdzv-backend", "one-machine", "--rdzv-endpoint"]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", command[6])
    assert command[7:] == ranks
    assert environment == {**SAFE_PATH, "OMP_NUM_THREADS": "2"}

    command, _ = dry_run(capsys, recipe, *words, "launch.master_port=29501")
    assert command[6] == "127.0.0.1:29501"


def test_the_users_own_environment_is_kept(capsys, recipe, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert dry_run(capsys, recipe, "launch.processes_per_node=2")[1] == SAFE_PATH


def test_one_rank_keeps_torchs_own_threads(capsys, recipe):
    command, environment = dry_run(capsys, recipe)
    assert command[1:3] == ["--num_gpus", "1"]
    assert environment == {"DS_ACCELERATOR": "cpu", **SAFE_PATH}


def test_dry_run_prints_a_line_that_a_shell_reads_back(capsys, recipe, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    odd = ["model.name=it's a $HOME `dir`", "sparse.targets=['*.v_proj', \"o proj\"]", "data.revision=a\nb"]
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("--dry-run started a process"))
    main(["train", recipe, "launch.processes_per_node=2", "--dry-run", *odd])
    line = capsys.readouterr().out.rstrip("\n")
    monkeypatch.undo()
    read = subprocess.run(["sh", "-c", f"set -- {line}; printf '%s\\0' \"$@\""], capture_output=True, text=True)
    words = read.stdout.split("\0")[:-1]
    assert words[:4] == ["env", "-u", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR=cpu"]
    assert words[4:6] == ["PYTHONSAFEPATH=1", "OMP_NUM_THREADS=4"]
    assert words[6] == str(BIN / "deepspeed")
    assert words[-3:] == odd
    assert words == shlex.split(line)


def test_automatic_ports_of_two_runs_differ(capsys, recipe):
    def port():
        command, _ = dry_run(capsys, recipe)
        return int(command[command.index("--master_port") + 1])

    with socket.socket() as first_run:
        first_run.bind(("", port()))
        first_run.listen()
        taken = first_run.getsockname()[1]
        ports = {port() for _ in range(5)}
    assert taken not in ports
    assert len(ports) > 1, "the port is a constant"


# Accelerators


@pytest.mark.parametrize("node", ["nvidia0", "kfd", "dri/renderD128", "accel/accel0", "dxg", None])
def test_accelerators_are_counted_by_torch_only_where_there_is_a_device_node(node, tmp_path, monkeypatch):
    monkeypatch.undo()
    asked = []
    fake = SimpleNamespace(accelerator=SimpleNamespace(device_count=lambda: asked.append(1) or 4))
    monkeypatch.setitem(sys.modules, "torch", fake)
    for other in ("nvidiactl", "null", "dri/card0"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()
    if node:
        (tmp_path / node).parent.mkdir(exist_ok=True)
        (tmp_path / node).touch()
    assert devices.count_accelerators(tmp_path) == (4 if node else 0)
    assert asked == ([1] if node else [])


def test_ranks_for_accelerators():
    assert devices.count_ranks("auto", 0) == 1
    assert devices.count_ranks("auto", 4) == 4
    assert devices.count_ranks(3, 4) == 3
    assert devices.count_ranks(16, 0) == 16
    with pytest.raises(UserError, match=r"5 ranks .* has 4"):
        devices.count_ranks(5, 4)


def test_gpus_of_the_machine(capsys, recipe, monkeypatch):
    monkeypatch.setattr(devices, "count_accelerators", lambda: 4)
    command, environment = dry_run(capsys, recipe)
    assert command[1:3] == ["--num_gpus", "4"]
    assert environment == SAFE_PATH
    command, environment = dry_run(capsys, recipe, "training.use_cpu=true", "launch.processes_per_node=8")
    assert command[1:3] == ["--num_gpus", "8"]
    assert environment == {"DS_ACCELERATOR": "cpu", **SAFE_PATH, "OMP_NUM_THREADS": "1"}
    assert main(["train", recipe, "launch.processes_per_node=5", "--dry-run"]) == 2
    assert "5 ranks need as many accelerators, this machine has 4" in one_error(capsys)


def test_chosen_gpus_survive_deepspeeds_runner(capsys, recipe, monkeypatch):
    monkeypatch.setattr(devices, "count_accelerators", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2, 7")
    command, environment = dry_run(capsys, recipe, "launch.processes_per_node=2")
    assert command[1:3] == ["--include", "localhost:5,2"]
    assert environment == {"CUDA_VISIBLE_DEVICES": None, **SAFE_PATH}
    assert dry_run(capsys, recipe, "launch.launcher=torchrun")[1] == SAFE_PATH

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937,GPU-1")
    assert main(["train", recipe, "--dry-run"]) == 2
    assert "launch.launcher=torchrun" in one_error(capsys)
