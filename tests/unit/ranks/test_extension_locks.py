"""Locks of torch's loader: those of living processes stay, those of killed ones go."""

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


def test_a_lock_goes_when_its_process_was_killed(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension_locks, "_may_be_held_unseen", lambda lock: False)
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        extension_locks.remove_abandoned_locks()
        assert lock.exists(), "taken from a living process"
        holder.kill()
    assert lock.exists()
    extension_locks.remove_abandoned_locks()
    assert not lock.exists()


@pytest.mark.parametrize(
    ("device", "namespace", "unseen"),
    [
        (8, extension_locks.FIRST_NAMESPACE, False),
        (0, extension_locks.FIRST_NAMESPACE, True),
        (8, "pid:[4026532000]", True),
    ],
)
def test_who_may_hold_a_lock_unseen(lock: Path, monkeypatch, device: int, namespace: str, unseen: bool) -> None:
    """A process of another host, or one outside of this container."""
    lock.touch()
    monkeypatch.setattr(extension_locks.os, "major", lambda _: device)
    monkeypatch.setattr(extension_locks.os, "readlink", lambda _: namespace)
    assert extension_locks._may_be_held_unseen(lock.stat()) == unseen


def test_a_lock_that_has_passed_on_stays(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new holder had none yet when it was looked at, the old one none any more."""
    lock.touch()
    monkeypatch.setattr(extension_locks, "_may_be_held_unseen", lambda _: False)

    def pass_on(_: Path) -> bool:
        other = lock.with_name("other")
        other.touch()
        other.replace(lock)
        return False

    monkeypatch.setattr(extension_locks, "_is_open_here", pass_on)
    extension_locks.remove_abandoned_locks()
    assert lock.exists()


def test_a_lock_that_may_be_held_unseen_stays_for_as_long_as_compiling_takes(lock: Path, monkeypatch) -> None:
    monkeypatch.setattr(extension_locks, "_may_be_held_unseen", lambda _: True)
    lock.touch()
    extension_locks.remove_abandoned_locks()
    assert lock.exists()
    before = time.time() - extension_locks.UNSEEN_SECONDS - 1
    os.utime(lock, (before, before))
    extension_locks.remove_abandoned_locks()
    assert not lock.exists()


def test_nothing_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "absent"))
    assert list(extension_locks.directories()) == []
    extension_locks.remove_abandoned_locks()
