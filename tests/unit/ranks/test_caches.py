"""Runs of users whose home directory cannot be written, and the line before an operator is compiled."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sparse_zero.ranks import caches
from sparse_zero.ranks.compilations import _announced

VARIABLES = ["HF_ASSETS_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home that cannot be made, also not by root."""
    (tmp_path / "file").write_text("")
    for variable in (*VARIABLES, "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_caches_move_to_a_directory_of_the_user(home):
    assert caches.use_writable_caches() == VARIABLES
    for variable in VARIABLES:
        directory = Path(os.environ[variable])
        assert (directory.is_dir(), directory.parent.parent) == (True, home)
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700
    assert caches.use_writable_caches() == []


def test_a_cache_that_is_named_or_can_be_written_stays(home, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(home / "hugging"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/nowhere")
    assert caches.use_writable_caches() == ["TORCH_EXTENSIONS_DIR"]
    assert os.environ["TRITON_CACHE_DIR"] == "/nowhere"
    assert "HF_DATASETS_CACHE" not in os.environ


def test_a_directory_of_another_user_is_not_used(home, monkeypatch):
    monkeypatch.setenv("USER", "me")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        caches.use_writable_caches()


def test_data_is_read_without_a_home(home, write_rows):
    """`datasets` fixes its cache at its import, so this needs a process."""
    path = write_rows([{"text": "a"}] * 20)
    code = (
        "from sparse_zero.ranks.caches import use_writable_caches; use_writable_caches()\n"
        "from sparse_zero.data.splits import load_splits\n"
        "from sparse_zero.recipe.recipe import DataSection\n"
        f"print(len(load_splits(DataSection(path={path!r}, columns={{}}))[0]))"
    )
    environment = os.environ | {"TMPDIR": str(home)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split()[-1:] == ["18"], done.stderr


def test_a_compilation_is_announced_and_a_finished_operator_is_not(tmp_path, caplog):
    calls = []
    load = _announced(lambda name, *args, **kwargs: calls.append((name, args, kwargs)), lambda *_: str(tmp_path))
    load("adam", ["adam.cpp"], verbose=False)
    assert "compiling the operator adam, once on this machine" in caplog.text
    caplog.clear()
    (tmp_path / "adam.so").write_text("")
    load("adam", ["adam.cpp"], build_directory=str(tmp_path))
    assert not caplog.records
    assert calls == [
        ("adam", (["adam.cpp"],), {"verbose": False}),
        ("adam", (["adam.cpp"],), {"build_directory": str(tmp_path)}),
    ]
