"""Locks of torch's loader: those of living processes stay, those of killed ones go."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_zero import operators

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["default", "own"])
def lock(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = tmp_path / "torch_extensions" / "py311_cpu" / "cpu_adam"
    if request.param == "own":
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "own"))
        directory = tmp_path / "own" / "cpu_adam"
    directory.mkdir(parents=True)
    return directory / "lock"


def test_a_lock_goes_when_its_process_was_killed(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators.os, "major", lambda device: 8)  # a disk of this machine
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        operators.remove_abandoned_locks()
        assert lock.exists(), "taken from a living process"
        holder.kill()
    assert lock.exists()
    operators.remove_abandoned_locks()
    assert not lock.exists()


def test_on_a_shared_disk_a_lock_stays_for_as_long_as_compiling_takes(lock: Path, monkeypatch) -> None:
    monkeypatch.setattr(operators.os, "major", lambda device: 0)
    lock.touch()
    operators.remove_abandoned_locks()
    assert lock.exists()
    before = time.time() - operators.ELSEWHERE_SECONDS - 1
    os.utime(lock, (before, before))
    operators.remove_abandoned_locks()
    assert not lock.exists()


def test_nothing_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "absent"))
    assert list(operators.directories()) == []
    operators.remove_abandoned_locks()
