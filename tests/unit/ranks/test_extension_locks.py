"""Locks of torch's extension loader: those of live processes stay, those of killed ones are removed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_zero.ranks import extension_locks

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


def test_the_lock_of_a_killed_process_is_removed(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension_locks, "_may_be_held_elsewhere", lambda lock: False)
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        extension_locks.remove_abandoned_locks()
        assert lock.exists(), "removed from a live process"
        holder.kill()
    assert lock.exists()
    extension_locks.remove_abandoned_locks()
    assert not lock.exists()


@pytest.mark.parametrize(
    ("device", "namespace", "elsewhere"),
    [
        (8, extension_locks.INITIAL_PID_NAMESPACE, False),
        (0, extension_locks.INITIAL_PID_NAMESPACE, True),
        (8, "pid:[4026532000]", True),
    ],
)
def test_where_the_holder_of_a_lock_may_be(
    lock: Path, monkeypatch, device: int, namespace: str, elsewhere: bool
) -> None:
    """On another host, or outside of this container."""
    lock.touch()
    monkeypatch.setattr(extension_locks.os, "major", lambda _: device)
    monkeypatch.setattr(extension_locks.os, "readlink", lambda _: namespace)
    assert extension_locks._may_be_held_elsewhere(lock.stat()) == elsewhere


def test_a_lock_that_has_a_new_holder_stays(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new holder did not have it yet when it was examined, and the old holder no longer."""
    lock.touch()
    monkeypatch.setattr(extension_locks, "_may_be_held_elsewhere", lambda _: False)

    def replace(_: Path) -> bool:
        other = lock.with_name("other")
        other.touch()
        other.replace(lock)
        return False

    monkeypatch.setattr(extension_locks, "_is_open_here", replace)
    extension_locks.remove_abandoned_locks()
    assert lock.exists()


def test_a_lock_that_may_be_held_elsewhere_stays_for_the_time_of_a_compilation(lock: Path, monkeypatch) -> None:
    monkeypatch.setattr(extension_locks, "_may_be_held_elsewhere", lambda _: True)
    lock.touch()
    extension_locks.remove_abandoned_locks()
    assert lock.exists()
    before = time.time() - extension_locks.STALE_SECONDS - 1
    os.utime(lock, (before, before))
    extension_locks.remove_abandoned_locks()
    assert not lock.exists()


def test_there_is_no_extension_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "absent"))
    assert list(extension_locks.extension_directories()) == []
    extension_locks.remove_abandoned_locks()
