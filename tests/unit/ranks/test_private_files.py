"""Files that carry a secret: who can read them, and when they are removed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_zero.errors import UserError
from sparse_zero.ranks import private_files


def test_only_the_owner_can_read_a_file(tmp_path: Path) -> None:
    file = private_files.own_file(tmp_path / "launch", "environment")
    before = os.umask(0)
    try:
        private_files.write(file, "secret")
    finally:
        os.umask(before)
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("secret", 0o600)
    (file.parent / "other").touch()
    private_files.remove(file)
    assert [path.name for path in file.parent.iterdir()] == ["other"]
    (file.parent / "other").unlink()
    private_files.remove(file)
    assert not file.parent.exists()


def test_an_older_file_gives_it_neither_its_mode_nor_its_place(tmp_path: Path) -> None:
    file = private_files.own_file(tmp_path, "environment")
    (tmp_path / "elsewhere").write_text("as it was")
    file.symlink_to(tmp_path / "elsewhere")
    private_files.write(file, "secret")
    assert (tmp_path / "elsewhere").read_text() == "as it was"
    file.chmod(0o666)
    private_files.write(file, "secret")
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_files_of_killed_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    kept = [f"environment.{here}.{os.getppid()}", f"environment.elsewhere.{ended.pid}", f"hosts.{here}.{ended.pid}"]
    for name in (*kept, f"environment.{here}.{ended.pid}"):
        (tmp_path / name).touch()
    file = private_files.own_file(tmp_path, "environment")
    private_files.write(file, "")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, file.name}
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / f"environment.{here}.{ended.pid}").touch()
    private_files.write(file, "")
    assert list(tmp_path.iterdir()) == [file], "also where nothing else keeps the directory"


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "launch").touch()
    with pytest.raises(UserError, match=r"launch/environment.* cannot be written"):
        private_files.write(private_files.own_file(tmp_path / "launch", "environment"), "")
