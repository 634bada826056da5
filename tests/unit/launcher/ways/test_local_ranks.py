"""Ranks that launcher.ways.local_ranks starts on this machine, with a stand-in for the training."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

STAND_IN = """
import json, os, pathlib, signal, sys, time

rank, (mine,) = os.environ["RANK"], sys.argv[1 + int(os.environ["RANK"]):][:1]
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
def told(signum, frame):
    pathlib.Path(f"told.{rank}").write_text(str(signum))
    sys.exit(75)
for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
    signal.signal(signum, signal.SIG_IGN if mine == "deaf" else told)
pathlib.Path(f"new.{rank}").write_text(json.dumps([os.getpid(), {name: os.environ[name] for name in names}]))
os.rename(f"new.{rank}", f"started.{rank}")
while not all(pathlib.Path(f"started.{other}").exists() for other in range(len(sys.argv) - 1)):
    time.sleep(0.01)
if mine == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif mine.isdigit():
    sys.exit(int(mine))
time.sleep(60)
"""
QUICK = "import sys; from launcher.ways import local_ranks as ranks; ranks.GRACE_SECONDS = 0.3; sys.exit(ranks.main())"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a rank for each role: a status to end with, `killed`, `waits` or `deaf`."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    started = []

    def start(*roles: str) -> subprocess.Popen:
        words = ["--processes", str(len(roles)), "--master-port", "29501", "-m", "stand_in", *roles]
        started.append(subprocess.Popen([sys.executable, "-c", QUICK, *words], start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
    for pid, _ in facts():
        if psutil.pid_exists(pid) and "stand_in" in psutil.Process(pid).cmdline():
            os.kill(pid, signal.SIGKILL)


def facts() -> list[tuple[int, dict[str, str]]]:
    return [tuple(json.loads(file.read_text())) for file in sorted(Path.cwd().glob("started.*"))]


def end(process: subprocess.Popen) -> int:
    status = process.wait(timeout=30)
    assert not any(psutil.pid_exists(pid) for pid, _ in facts())
    return status


def test_each_rank_is_told_its_place(start) -> None:
    assert end(start("0", "0")) == 0
    same = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    assert [place for _, place in facts()] == [{"RANK": rank, "LOCAL_RANK": rank, **same} for rank in "01"]


@pytest.mark.parametrize(("roles", "status"), [(["waits", "3"], 3), (["2", "waits"], 2), (["waits", "killed"], 137)])
def test_the_first_failure_ends_the_others_and_gives_its_status(start, roles: list[str], status: int) -> None:
    assert end(start(*roles)) == status
    told = Path(f"told.{roles.index('waits')}")
    assert told.read_text() == str(signal.SIGTERM.value)


def test_a_rank_that_does_not_listen_is_killed(start) -> None:
    assert end(start("deaf", "3")) == 3


def test_a_rank_that_is_done_does_not_end_the_others(start) -> None:
    process = start("0", "waits")
    deadline = time.monotonic() + 30
    while len(facts()) < 2 or psutil.pid_exists(facts()[0][0]):
        assert time.monotonic() < deadline
        # It is waited for by its parent, or it would still exist.
        time.sleep(0.05)
    assert process.poll() is None
    assert not Path("told.1").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_passed_on_and_the_ranks_status_kept(start, signum: signal.Signals) -> None:
    process = start("waits", "waits")
    deadline = time.monotonic() + 30
    while len(facts()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signum)
    assert end(process) == 75
    assert [Path(f"told.{rank}").read_text() for rank in (0, 1)] == [str(signum.value)] * 2
