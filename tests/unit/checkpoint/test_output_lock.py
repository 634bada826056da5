"""The lock of a run's output directory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparse_zero.checkpoint import output_lock
from sparse_zero.checkpoint.output_lock import LOCK_NAME, locked
from sparse_zero.errors import UserError
from sparse_zero.ranks.collectives import Ranks

HOLDER = """
import sys, time
from pathlib import Path
from sparse_zero.checkpoint.output_lock import locked
from sparse_zero.ranks.collectives import Ranks
with locked(Path(sys.argv[1]), Ranks()):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lock, "_TIMEOUT_SECONDS", 0.5)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "holds\n"
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {process.pid} on "), hold(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    with hold(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == os.getpid()


def hold(directory: Path) -> Any:
    return locked(directory, Ranks())


def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = f"training.output_dir: {tmp_path}/file/run: cannot be written to"
    with pytest.raises(UserError, match=message), hold(tmp_path / "file" / "run"):
        pass
