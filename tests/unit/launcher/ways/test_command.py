"""What the commands of all launchers have in common: prologue, container, environment, files, programs."""

import subprocess
import sys
from pathlib import Path

import pytest
from launch_cases import command, recipe, torchrun

from launcher.ways import launchers
from launcher.ways.command import SAFE_PATH, Command, rank_environment, wrapped
from sparse_zero.errors import UserError
from sparse_zero.recipe.launch import LaunchSection

pytestmark = pytest.mark.usefixtures("plain_machine")


def test_a_prologue_and_a_container_stand_before_python() -> None:
    launch = LaunchSection(
        launcher="slurm",
        prologue=["A='two words'; export A"],
        container=["env", "B=%h"],
        nodes=1,
        processes_per_node=1,
    )
    show = [sys.executable, "-c", "import os, sys; print(os.environ['A'], os.environ['B'], sys.argv[1:])", "a b", "'"]
    done = subprocess.run(wrapped(show, launch), capture_output=True, text=True, check=True)
    assert done.stdout == "two words %h ['a b', \"'\"]\n"
    assert wrapped(["x"], LaunchSection()) == ["x"]


@pytest.mark.parametrize("launcher", ["mpi", "slurm", "torchrun"])
def test_every_launcher_runs_them(launcher: str) -> None:
    made = command(launcher, prologue=["module load cuda"], container=["apptainer", "exec", "i.sif"], nodes=1)
    words = torchrun(made) if launcher == "torchrun" else made.argv
    start = words.index("bash")
    assert words[start : start + 4] == ["bash", "-c", 'set -e\nmodule load cuda\nexec "$@"', "bash"]
    assert words[start + 4 : start + 8] == ["apptainer", "exec", "i.sif", sys.executable]


def test_a_prologue_that_fails_starts_nothing() -> None:
    launch = LaunchSection(launcher="slurm", prologue=["false"])
    done = subprocess.run(wrapped(["echo", "started"], launch), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_variables_are_passed_on_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LaunchSection(environment={"A": "given", "HERE": None, "EMPTY": ""})
    with pytest.raises(UserError, match="HERE has no value and is not set here; give it a value"):
        rank_environment(launch)
    monkeypatch.setenv("HERE", "as it is")
    monkeypatch.setenv("A", "not this")
    assert rank_environment(launch) == {"A": "given", "HERE": "as it is", "EMPTY": "", **SAFE_PATH}
    assert rank_environment(launch, "n1:5:s")["SPARSE_ZERO_WATCH"] == "n1:5:s"


def test_a_commands_environment_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOES", "1")
    made = Command(["echo", "a b"], {"GOES": None, "COMES": "$x"}, {"deep/er/file": "secret\n"})
    assert "GOES" not in made.environ()
    assert made.environ()["COMES"] == "$x"
    assert made.shell() == "env -u GOES COMES='$x' echo 'a b'"
    made.write_files()
    assert Path("deep/er/file").read_text() == "secret\n"
    assert Path("deep/er/file").stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match=r"deep/er/file/x: cannot be written"):
        Command([], files={"deep/er/file/x": ""}).write_files()


def test_the_printed_line_is_what_is_run(tmp_path: Path) -> None:
    made = Command(["sh", "-c", 'printf %s "$A"'], {"A": "it's $HOME; `id` %n"})
    done = subprocess.run(["sh", "-c", made.shell()], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "it's $HOME; `id` %n")


@pytest.mark.parametrize(
    ("launcher", "launch", "program"),
    [
        ("slurm", {}, "srun"),
        ("mpi", {}, "mpirun"),
        ("torchrun", {}, "pdsh"),
        ("deepspeed", {}, "pdsh"),
        ("deepspeed", {"multinode": "openmpi"}, "mpirun"),
    ],
)
def test_a_program_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, launcher: str, launch: dict[str, str], program: str
) -> None:
    monkeypatch.setattr(launchers.shutil, "which", lambda name: None if name == program else name)
    with pytest.raises(UserError, match=f"{launcher} needs the program {program}, which is not installed"):
        launchers.check_programs(recipe(launcher, **launch).launch)
    if launcher in ("torchrun", "deepspeed"):
        launchers.check_programs(recipe(launcher, hostfile=None).launch)
