"""A machine without problems, for the tests of the doctor as a whole."""

import pytest
from doctor_cases import good_measurement, report

from launcher.doctor import links, report_collection, slurm_checks
from launcher.doctor.report_collection import HostResponse

DEMO = "model: {name: m}\ndata: {path: d, columns: {text: t, label: l}}\ntraining: {output_dir: out, use_cpu: true}\n"


@pytest.fixture
def good_machine(monkeypatch, tmp_path):
    """A working directory with a recipe and a hostfile, outside of Slurm. This machine's report has no problem."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SLURM_JOB_NODELIST", "DS_ENV_FILE", "PDSH_RCMD_TYPE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "recipe.yaml").write_text(DEMO)
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    monkeypatch.setattr(slurm_checks, "is_installed", lambda: False)
    monkeypatch.setattr(report_collection, "collect_here", lambda request, launch: HostResponse(report()))


@pytest.fixture
def measured(monkeypatch):
    """Replaces the start of the ranks. Returns: a list that collects the commands that would start them."""
    commands = []
    monkeypatch.setattr(links, "measure", lambda command: commands.append(command) or good_measurement())
    return commands
