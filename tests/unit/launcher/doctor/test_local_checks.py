"""Problems of the machine that starts a run: hidden settings and missing programs."""

import os
import stat

import pytest
from doctor_cases import only_problem, problems, recipe

from launcher.doctor import local_checks


def test_lines_of_a_deepspeed_environment_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "home" / ".deepspeed_env"
    file.parent.mkdir()
    file.write_text("NCCL_DEBUG=INFO\n\n# was: A=1\nUNSET\n")
    found = [*local_checks.hidden_settings({}, file.parent, tmp_path)]
    assert [finding.severity for finding in found] == ["warning"] * 3
    assert "line 2 is blank" in found[0].message
    assert "line 3 is a comment" in found[1].message
    assert "status 0" in found[1].message
    assert "line 4 has no =" in found[2].message
    file.write_text("NCCL_DEBUG=INFO\n")
    assert [finding.severity for finding in local_checks.hidden_settings({}, file.parent, tmp_path)] == ["ok"]
    file.unlink()
    (tmp_path / "named").write_text("\n")
    found = only_problem(local_checks.hidden_settings({"DS_ENV_FILE": "named"}, file.parent, tmp_path))
    assert "line 1 is blank" in found.message


def test_other_hidden_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [*local_checks.hidden_settings({"PDSH_RCMD_TYPE": "ssh"}, tmp_path, tmp_path)] == []
    found = only_problem(local_checks.hidden_settings({"PDSH_RCMD_TYPE": "rsh"}, tmp_path, tmp_path))
    assert "PDSH_RCMD_TYPE=rsh" in found.message
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "hostfile").touch()
    assert "job/hostfile" in only_problem(local_checks.hidden_settings({}, tmp_path, tmp_path)).message


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Returns: a function that replaces PATH with programs that print the given texts."""

    def install(**texts):
        directory = tmp_path / "bin"
        directory.mkdir(exist_ok=True)
        for name, text in texts.items():
            program = directory / name
            program.write_text(f"#!{os.path.realpath('/bin/sh')}\necho '{text}'\n")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(directory))

    return install


@pytest.mark.parametrize(
    ("launch", "missing"),
    [
        ({"hostfile": "h"}, ["ssh", "pdsh"]),
        ({"hostfile": "h", "launcher": "torchrun"}, ["ssh", "pdsh"]),
        ({"hostfile": "h", "multinode": "openmpi"}, ["ssh", "mpirun", "ompi_info"]),
        ({"hostfile": "h", "launcher": "mpi"}, ["ssh", "mpirun"]),
        ({"launcher": "mpi"}, ["mpirun"]),
        ({}, []),
    ],
)
def test_programs_that_a_launcher_needs(launch, missing, programs):
    programs(other="")
    settings = recipe(**launch).launch
    found = problems(local_checks.launcher_programs(settings))
    assert [finding.message.partition(" ")[0] for finding in found] == missing
    assert all(finding.severity == "error" and "apt-get install" in finding.remedy for finding in found)
    programs(**dict.fromkeys(missing, "rcmd modules: rsh,ssh,exec (default: rsh)"))
    assert problems(local_checks.launcher_programs(settings)) == []


def test_pdsh_without_ssh(programs):
    programs(ssh="", pdsh="rcmd modules: rsh,exec (default: rsh)")
    assert "no ssh module" in only_problem(local_checks.launcher_programs(recipe(hostfile="h").launch)).message
