"""A machine on which all launchers make the same commands."""

import os
from pathlib import Path

import pytest

from launcher.ways import devices, local, remote


@pytest.fixture
def plain_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eight cores, no accelerator, no job, no variables that change the commands."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "DS_")) or name in ("OMP_NUM_THREADS", "PYTHONPATH", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(devices, "count_accelerators", lambda: 0)
    monkeypatch.setattr(devices, "usable_cores", lambda: 8)
    monkeypatch.setattr(local, "free_port", lambda: 4321)
    monkeypatch.setattr(remote.uuid, "uuid4", lambda: type("Uuid", (), {"hex": "0123456789"}))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    (tmp_path / "home").mkdir()
    (tmp_path / "hosts").write_text("n1 slots=4\nn2 slots=4\nn3 slots=2\n")
    monkeypatch.chdir(tmp_path)
