"""Ranks of a stand-in for the training, started by the real launchers: how they exit, and that none is left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.processes import exit_status

SECONDS = 120
"""Timeout of whatever a test waits for. Launchers import torch, and share two cores with other tests."""

STAND_IN = """
import os, pathlib, signal, sys, time

rank = os.environ["RANK"]
role = [word for word in sys.argv if word.startswith("training.run_name=")][0].partition("=")[2]
print("progress of rank", rank)

def told(signum, frame):
    with open(f"told.{rank}", "a") as file:
        file.write(f"{signum} ")
    if role != "deaf":
        time.sleep(0.5)
        sys.exit(75 if role == "stops" else 0)

if role == "late":
    time.sleep(2)
signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGUSR1, told)
pathlib.Path(f"started.{rank}").write_text(str(os.getpid()))
if role == "finishes" and rank == "0":
    pathlib.Path("runs/finishes").mkdir(parents=True)
    pathlib.Path("runs/finishes/results.json").write_text('{"accuracy": 0.8}')
elif role == "refuses":
    if rank == "0":
        print("sparse-zero: error: no such column", file=sys.stderr)
    sys.exit(2)
elif role == "dies" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
elif role != "finishes":
    for _ in range(300):
        time.sleep(0.1)
"""
COMMAND = """
import sys
from launcher.ways import command
from launcher.cli import main

command.TRAINING_MODULE = "stand_in"
sys.exit(main(sys.argv[1:]))
"""


def reset_signals():
    """Tests in a shell's background ignore SIGINT, and their children would inherit that."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts `sparse-zero train` with two stand-in ranks; kills what is left at the end."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "recipe.yaml").write_text("model: {name: m}\ndata: {path: d, columns: {text: t, label: l}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    # Do not use the machine's accelerators.
    words = ["launch.processes_per_node=2", "training.use_cpu=true"]
    started = []

    def start(launcher, role, *options):
        words.extend([f"launch.launcher={launcher}", f"training.run_name={role}", *options])
        command = [sys.executable, "-c", COMMAND, "train", "recipe.yaml", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=reset_signals))
        return started[-1]

    yield start
    for process in (*started, *survivors()):
        process.kill()


def ranks(process):
    """The two ranks, once both have started."""
    deadline = time.monotonic() + SECONDS
    files = [Path("started.0"), Path("started.1")]
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [psutil.Process(int(file.read_text())) for file in files]


def survivors():
    """All processes of the stand-in: ranks, DeepSpeed's launcher and runner, torchrun."""
    found = []
    for process in psutil.process_iter(["cmdline", "status", "cwd"]):
        here = process.info["cwd"] == str(Path.cwd())
        if here and "stand_in" in (process.info["cmdline"] or []) and process.info["status"] != "zombie":
            found.append(process)
    return found


def end(process):
    out, err = process.communicate(timeout=SECONDS)
    assert survivors() == []
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("returncode", "status"), [(0, 0), (2, 2), (-15, 143), (247, 137), (241, 143), (137, 137), (255, 255)]
)
def test_exit_status(returncode, status):
    assert exit_status(returncode) == status


@pytest.mark.distributed
def test_deepspeed_only_the_ranks_error_is_printed(start):
    status, out, err = end(start("deepspeed", "refuses"))
    assert status == 2
    assert err == "sparse-zero: error: no such column\n"
    # Two ranks that print at once may share a line.
    assert out.count("progress of rank") > 0
    assert not re.sub(r"progress of rank|[0-9\s]", "", out), out


@pytest.mark.distributed
def test_deepspeed_sigterm_reaches_each_rank_once_and_all_end(start):
    process = start("deepspeed", "saves")
    ranks(process)
    process.terminate()
    status, _, err = end(process)
    assert (status, err) == (143, "")
    # The launcher sent no second SIGTERM, and the ranks had time to save.
    assert [Path(f"told.{rank}").read_text() for rank in (0, 1)] == ["15 ", "15 "]


@pytest.mark.distributed
def test_deepspeed_a_killed_launcher_is_a_failure_and_its_ranks_end(start):
    process = start("deepspeed", "saves")
    ranks(process)[0].parent().kill()
    status, _, err = end(process)
    assert status == 1
    reason = r"deepspeed \(process \d+\) exited with status 0 before its ranks"
    assert re.fullmatch(rf"sparse-zero: error: {reason}; the ranks are asked to save and stop\n", err)
    assert [Path(f"told.{rank}").read_text() for rank in (0, 1)] == ["15 ", "15 "]


@pytest.mark.distributed
def test_torchrun_a_killed_agent_is_named_and_its_ranks_get_sigterm(start):
    process = start("torchrun", "saves")
    agent = ranks(process)[0].parent()
    agent.kill()
    status, _, err = end(process)
    assert status == 137
    assert err.startswith(f"sparse-zero: error: launcher.ways.torchrun (process {agent.pid}) was killed by SIGKILL")
    assert err.count("\n") == 1
    assert [Path(f"told.{rank}").read_text() for rank in (0, 1)] == ["15 ", "15 "]


@pytest.mark.distributed
def test_deepspeed_ctrl_c_before_the_ranks_exist(start):
    process = start("deepspeed", "saves")
    while not any("deepspeed.launcher.launch" in launcher.info["cmdline"] for launcher in survivors()):
        time.sleep(0.05)
    # As a terminal does, to every process of the foreground group.
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = end(process)
    assert (status, err) == (130, "")
    assert not Path("started.0").exists()


@pytest.mark.distributed
def test_torchrun_a_second_signal_kills_ranks_that_ignore_the_first(start):
    process = start("torchrun", "deaf")
    alive = ranks(process)
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + SECONDS
    while not all(Path(f"told.{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline, "no rank got the signal"
        time.sleep(0.05)
    assert all(rank.is_running() for rank in alive)
    process.send_signal(signal.SIGINT)
    status, _, err = end(process)
    assert (status, err) == (130, "")


@pytest.mark.distributed
@pytest.mark.parametrize(("launcher", "signum"), [("deepspeed", signal.SIGTERM), ("torchrun", signal.SIGUSR1)])
def test_ranks_that_save_and_stop_give_the_command_their_status(start, launcher, signum):
    process = start(launcher, "stops")
    ranks(process)
    process.send_signal(signum)
    status, _, err = end(process)
    assert (status, err) == (75, "")
    # SIGUSR1 is passed on as SIGUSR1; any other signal reaches the ranks as SIGTERM.
    first = f"{signal.SIGUSR1 if signum == signal.SIGUSR1 else signal.SIGTERM:d} "
    told = [Path(f"told.{rank}").read_text() for rank in (0, 1)]
    assert any(of_rank == first for of_rank in told)
    assert all(of_rank.startswith(first) for of_rank in told)


@pytest.mark.distributed
def test_a_warning_waits_until_ranks_have_a_handler(start):
    process = start("torchrun", "late")
    while not any("launcher.ways.torchrun" in launcher.info["cmdline"] for launcher in survivors()):
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert end(process)[0] == 0
    assert [Path(f"told.{rank}").read_text() for rank in (0, 1)] == [f"{signal.SIGUSR1:d} "] * 2


@pytest.mark.distributed
@pytest.mark.parametrize(("role", "expected"), [("refuses", 2), ("dies", 137)])
def test_torchrun_a_ranks_status_is_kept_and_no_report_printed(start, role, expected):
    status, _, err = end(start("torchrun", role))
    assert status == expected
    assert err.count("\n") == 1
    assert err.startswith("sparse-zero: error: ")


@pytest.mark.distributed
def test_torchrun_json_is_alone_on_stdout(start):
    status, out, err = end(start("torchrun", "finishes", "--json"))
    assert status == 0
    assert json.loads(out) == {"accuracy": 0.8}
    assert err.count("progress of rank") == 2


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from launcher import processes
from launcher.ways.command import Command
from sparse_zero.ranks import private_files
from sparse_zero.ranks.watchdog import Watchdog

write = private_files.write

def interrupted(file, text):
    write(file, text)
    assert file.stat().st_mode & 0o777 == 0o600
    os.kill(os.getpid(), int(sys.argv[1]))

private_files.write = interrupted
watchdog = Watchdog(print, silence_seconds=30)
command = Command(["sleep", "60"], private={"A": "5ec2e7"}, private_file=Path("launch/environment.n1.1").absolute())
status = processes.run(command, watchdog).status
watchdog.close()
sys.exit(status)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_right_after_a_secret_was_written_leaves_no_file(tmp_path, signum):
    command = [sys.executable, "-c", INTERRUPTED, str(int(signum))]
    done = subprocess.run(command, cwd=tmp_path, preexec_fn=reset_signals, timeout=60)
    assert done.returncode == 128 + signum
    assert list(tmp_path.iterdir()) == []
