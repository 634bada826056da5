"""A process whose parent is killed, and what launchers are told by."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sparse_zero.ranks.parent_watch import POLL_SECONDS, has_launcher

RANK = """
import os, sys, time
from pathlib import Path
from sparse_zero.ranks.parent_watch import watch_parent

watch_parent(os.getppid(), lambda parent: Path("told").write_text(str(parent)), os.environ)
Path("started").write_text(str(os.getpid()))
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys, threading
# A thread that starts a rank may end before it. That is no reason to stop.
started = threading.Thread(target=lambda: subprocess.Popen([sys.executable, "-c", sys.argv[1]]))
started.start()
started.join()
threading.Event().wait(60)
"""


def wait_for(path: Path, process: subprocess.Popen) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.01)
    return path.read_text()


def test_a_rank_notices_that_its_launcher_was_killed(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK], cwd=tmp_path)
    rank = psutil.Process(int(wait_for(tmp_path / "started", launcher)))
    try:
        time.sleep(3 * POLL_SECONDS)
        assert not (tmp_path / "told").exists(), "the thread that started it has ended, the launcher has not"
        launcher.kill()
        launcher.wait()
        assert wait_for(tmp_path / "told", launcher) == str(launcher.pid)
    finally:
        launcher.kill()
        rank.kill()


RUNNER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


@pytest.mark.parametrize("is_deepspeed", [True, False])
def test_a_rank_of_deepspeed_notices_that_the_runner_was_killed(tmp_path: Path, is_deepspeed: bool) -> None:
    """Its launcher waits for it without noticing."""
    environment = os.environ | ({"CROSS_RANK": "0"} if is_deepspeed else {})
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, LAUNCHER, RANK], cwd=tmp_path, env=environment)
    rank = psutil.Process(int(wait_for(tmp_path / "started", runner)))
    launcher = rank.parent()
    try:
        time.sleep(3 * POLL_SECONDS)
        assert not (tmp_path / "told").exists()
        runner.kill()
        runner.wait()
        if is_deepspeed:
            assert wait_for(tmp_path / "told", runner) == str(runner.pid)
        else:
            time.sleep(3 * POLL_SECONDS)
            assert not (tmp_path / "told").exists()
    finally:
        for process in (runner, launcher, rank):
            process.kill()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        # Started by hand: the shell may end.
        ({"RANK": "0", "WORLD_SIZE": "2"}, False),
        ({"SPARSE_ZERO_WATCH": "n1:5:secret"}, True),
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, True),
        ({"RANK": "0", "CROSS_RANK": "0"}, True),
        ({"OMPI_COMM_WORLD_RANK": "1"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, True),
    ],
)
def test_launchers_that_outlive_their_ranks(environ: dict[str, str], expected: bool) -> None:
    assert has_launcher(environ) is expected
