"""What the commands of all launchers have in common: prologue, container, environment, files, programs."""

import ast
import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launch_cases import command, recipe, torchrun

from launcher.ways import launchers, private_environment
from launcher.ways.command import Command, private_variables, wrapped
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
        private_variables(launch)
    monkeypatch.setenv("HERE", "as it is")
    monkeypatch.setenv("A", "not this")
    assert private_variables(launch) == {"A": "given", "HERE": "as it is", "EMPTY": ""}
    assert private_variables(launch, "n1:5:s")["SPARSE_ZERO_WATCH"] == "n1:5:s"


def test_a_commands_environment_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOES", "1")
    made = Command(["echo", "a b"], {"GOES": None, "COMES": "$x"}, {"deep/er/file": "a line\n"})
    assert "GOES" not in made.environ()
    assert made.environ()["COMES"] == "$x"
    assert made.shell() == "env -u GOES COMES='$x' echo 'a b'"
    with made.written_files():
        assert Path("deep/er/file").read_text() == "a line\n"
        assert Path("deep/er/file").stat().st_mode & 0o077 == 0
        with pytest.raises(UserError, match=r"deep/er/file/x: cannot be written"):
            Command([], files={"deep/er/file/x": ""}).written_files().__enter__()
    assert list(Path("deep").iterdir()) == []


def test_private_values_are_given_to_the_command_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Command(["echo"], {"PLAIN": "1"}, private={"A_TOKEN": "5ec2e7"})
    assert made.environ()["A_TOKEN"] == "5ec2e7"
    assert made.shell() == 'PLAIN=1 A_TOKEN="${A_TOKEN?}" echo'
    assert made.shown_environment() == {"PLAIN": "1", "A_TOKEN": "$A_TOKEN"}
    assert made.shown_files() == {}


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt, SystemExit])
def test_private_values_travel_in_a_file_that_is_removed(tmp_path: Path, ending: type[BaseException] | None) -> None:
    file = tmp_path / "launch" / "environment.n1.5"
    odd = {"A_TOKEN": "5ec2e7", "ODD": 'it\'s $HOME `ls` \\ % "two"\nlines', "EMPTY": ""}
    made = Command(["echo"], files={str(tmp_path / "launch" / "hosts"): ""}, private=odd, private_file=file)
    assert "A_TOKEN" not in made.environ()
    assert made.shell() == "echo"
    assert "5ec2e7" not in repr(made.shown_files())
    assert made.shown_files()[str(file)].startswith('export A_TOKEN="$A_TOKEN"\n')
    with contextlib.suppress(KeyboardInterrupt, SystemExit), made.written_files():
        assert file.stat().st_mode & 0o777 == 0o600
        for shell in ("sh", "bash"):
            show = [sys.executable, "-c", f"import os; print(repr([os.environ[name] for name in {list(odd)}]))"]
            words = [shell, "-c", f'{private_environment.read(file)} && exec "$@"', "sh", *show]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            assert ast.literal_eval(done.stdout) == list(odd.values())
        if ending:
            raise ending
    assert not (tmp_path / "launch").exists()


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_host_that_does_not_see_the_file_starts_nothing_and_says_why(tmp_path: Path, shell: str) -> None:
    file = tmp_path / "it's" / "environment.n1.5"
    done = subprocess.run(
        [shell, "-c", f"{private_environment.read(file)} && echo started"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"sparse-zero: error: {socket.gethostname()} cannot read {file}: ")


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
