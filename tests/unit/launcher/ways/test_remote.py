"""The commands that start ranks on the hosts of a hostfile: words, files, environment, and errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch_cases import RANK, WORDS, command, hostfile, recipe, torchrun

from launcher.ways import launchers
from launcher.ways.launchers import ranks_command
from sparse_zero.errors import UserError

pytestmark = pytest.mark.usefixtures("plain_machine")


# DeepSpeed's runner


def test_deepspeed_on_all_hosts() -> None:
    made = command("deepspeed")
    assert Path(made.argv[0]).name == "deepspeed"
    assert made.argv[1:] == [
        *("--hostfile", "out/launch/hostfile", "--launcher", "pdsh", "--master_addr", "n1", "--master_port", "4321"),
        *("--force_multi", "--log_level", "critical", "--module", *WORDS),
    ]
    assert hostfile(made) == "n1 slots=4\nn2 slots=4\nn3 slots=2\n"
    assert made.files["out/launch/deepspeed_env"] == "PYTHONPATH=\nPYTHONSAFEPATH=1\nOMP_NUM_THREADS=2\n"
    assert made.environment == {"DS_ENV_FILE": str(Path.cwd() / "out/launch/deepspeed_env")}
    assert made.world_size == 10


def test_deepspeed_takes_words_to_the_other_hosts_as_they_are() -> None:
    odd = ["sparse_zero.train", "r.yaml", "sparse.targets=[*.v_proj,q$]", "a.b=$HOME;ls", "c.d=a&b"]
    for given, carried in zip(odd, command("deepspeed", odd).argv[-5:], strict=True):
        read = subprocess.run(["sh", "-c", f"printf %s {carried}"], capture_output=True, text=True, check=True)
        assert read.stdout == given
    # Without a shell in between, quotes would arrive too.
    assert command("deepspeed", odd, multinode="openmpi").argv[-5:] == odd


@pytest.mark.parametrize("word", ["a.b=two words", "a.b=it's", 'a.b="x"', "a.b=%n", "a.b=1\n2"])
def test_what_deepspeed_cannot_carry_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="cannot pass spaces, quotes and % to other hosts; write it into the recipe"):
        command("deepspeed", [*WORDS, word])


@pytest.mark.parametrize("value", ["a\nb", 'say "no"', "`ls`", "$HOME", "back\\slash", "a\rPATH;id=1", " a"])
def test_a_variable_that_deepspeed_cannot_carry_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"launch\.environment: DeepSpeed's runner cannot pass ODD="):
        command("deepspeed", environment={"ODD": value})


def test_deepspeed_with_openmpi_would_add_quotes_to_a_value() -> None:
    assert (
        "ODD=two words\n" in command("deepspeed", environment={"ODD": "two words"}).files["out/launch/deepspeed_env"]
    )
    with pytest.raises(UserError, match=r"launch\.environment: DeepSpeed's runner cannot pass ODD='two words'"):
        command("deepspeed", environment={"ODD": "two words"}, multinode="openmpi")


def test_pdsh_does_not_replace_a_part_of_a_value() -> None:
    assert "ODD=50%%n\n" in command("deepspeed", environment={"ODD": "50%n"}).files["out/launch/deepspeed_env"]


@pytest.mark.parametrize("line", ["A;id;B=1", "$(id)=1", "-x=1", "A B=1", "=1"])
def test_deepspeeds_own_file_cannot_name_a_command(tmp_path: Path, line: str) -> None:
    """The runner writes `export NAME=VALUE; ` into the command line of every host."""
    (tmp_path / ".deepspeed_env").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env: .* cannot be a variable"):
        command("deepspeed")


def test_deepspeeds_own_file_cannot_hold_a_command(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("A=$(id)\n")
    with pytest.raises(UserError, match=r"DeepSpeed's runner cannot pass A='\$\(id\)' to other hosts"):
        command("deepspeed")


@pytest.mark.parametrize("name", ["my project", "$(id)", "a;id", "100%n", "it's"])
def test_a_directory_that_deepspeed_cannot_carry_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The runner writes `cd DIRECTORY;`: in `my project` the ranks start in the home directory, with status 0."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "hosts").write_text("n1 slots=1\n")
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError, match=r"DeepSpeed's runner cannot pass the working directory to other hosts"):
        command("deepspeed")
    # These use no shell, or quote it.
    for launcher in ("mpi", "torchrun"):
        command(launcher)
    command("deepspeed", multinode="openmpi")
    command("deepspeed", hostfile=None, processes_per_node=2)


def test_a_python_that_deepspeed_cannot_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/my env/bin/python")
    with pytest.raises(UserError, match=r"'/opt/my env/bin/python': .* cannot pass the directory of Python"):
        command("deepspeed")


def test_deepspeed_is_given_the_chosen_devices() -> None:
    made = command("deepspeed", include="n1:1,3@n2")
    assert made.argv[made.argv.index("--include") + 1] == "n1:1,3@n2"
    assert hostfile(made) == "n1 slots=4\nn2 slots=4\n"
    assert made.world_size == 6
    with pytest.raises(UserError, match="chooses no devices with openmpi"):
        command("deepspeed", include="n1:1,3@n2", multinode="openmpi")
    fewer = command("deepspeed", include="n1:0,1,3@n2:2,3", processes_per_node=2)
    assert fewer.argv[fewer.argv.index("--include") + 1] == "n1:0,1@n2:2,3"


def test_deepspeeds_own_variables_are_kept_without_what_breaks_it(tmp_path: Path) -> None:
    own = "\n# PATH=/nowhere\nNCCL_DEBUG=INFO\n  \nno equals sign\nA = b=c \nOMP_NUM_THREADS=1\n"
    (tmp_path / "home" / ".deepspeed_env").write_text(own)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=WARN")
    made = command("deepspeed", environment={"A": "ours"})
    assert made.files["out/launch/deepspeed_env"] == (
        "PYTHONPATH=\nNCCL_DEBUG=WARN\nA=ours\nOMP_NUM_THREADS=2\nPYTHONSAFEPATH=1\n"
    )


@pytest.mark.parametrize("directory", ["home", "elsewhere"])
def test_deepspeeds_own_variables_may_stand_in_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str
) -> None:
    (tmp_path / directory).mkdir(exist_ok=True)
    (tmp_path / directory / "my_env").write_text("A=b\n")
    monkeypatch.setenv("DS_ENV_FILE", "my_env" if directory == "home" else str(tmp_path / directory / "my_env"))
    assert "A=b\n" in command("deepspeed").files["out/launch/deepspeed_env"]


def test_more_options_for_what_deepspeed_starts() -> None:
    made = command("deepspeed", multinode="openmpi", launcher_args=["--mca", "x", "a b"])
    assert "--launcher_args=--mca x 'a b'" in made.argv
    assert made.argv[made.argv.index("--launcher") + 1] == "openmpi"


# mpirun


def test_mpirun() -> None:
    made = command("mpi", watch="n1:5:secret", environment={"A": "b c"}, launcher_args=["--mca", "x", "y"])
    variables = {
        "PYTHONSAFEPATH": "1",
        "A": "b c",
        "SPARSE_ZERO_WATCH": "n1:5:secret",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "4321",
        "OMP_NUM_THREADS": "2",
    }
    assert made.argv == [
        *("mpirun", "--quiet", "-np", "10", "--hostfile", "out/launch/hostfile", "--bind-to", "none"),
        *(word for name in variables for word in ("-x", name)),
        *("--mca", "x", "y", *RANK),
    ]
    assert made.environment == variables
    assert made.files == {"out/launch/hostfile": "n1 slots=4\nn2 slots=4\nn3 slots=2\n"}


def test_mpirun_without_a_hostfile_is_for_this_machine() -> None:
    made = command("mpi", hostfile=None, processes_per_node=3, master_port=29505)
    assert hostfile(made) == "localhost slots=3\n"
    assert (made.world_size, made.environment["MASTER_ADDR"]) == (3, "localhost")
    assert made.environment["MASTER_PORT"] == "29505"


# torchrun


def test_torchrun_over_pdsh() -> None:
    made = command("torchrun", include="n2@n1", watch="n1:5:secret", launcher_args=["--max-restarts", "0"])
    here = os.getcwd()
    assert torchrun(made, "n1,n2") == [
        *("cd", here, "&&", "exec", "env"),
        *("PYTHONSAFEPATH=1", "SPARSE_ZERO_WATCH=n1:5:secret", "OMP_NUM_THREADS=2"),
        *(
            sys.executable,
            "-m",
            "launcher.ways.torchrun",
            "--nnodes",
            "2",
            "--node-rank",
            "1",
            "--nproc-per-node",
            "4",
        ),
        *("--master-addr", "n1", "--master-port", "4321", "--rdzv-id", "01234567"),
        *("--rdzv-conf", "timeout=300", "--max-restarts", "0"),
        *("-m", *WORDS),
    ]
    assert (made.environment, made.files, made.world_size) == ({}, {}, 8)


def test_torchrun_takes_any_word_to_the_other_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "100%name o'clock").mkdir()
    (tmp_path / "100%name o'clock" / "hosts").write_text("n1 slots=1\n")
    monkeypatch.chdir(tmp_path / "100%name o'clock")
    odd = ["sparse_zero.train", "a.b=it's [a] %n %% %h", 'c.d="$HOME"', "e.f=\n"]
    read = torchrun(command("torchrun", odd, environment={"FORMAT": "%name"}))
    assert read[-4:] == odd
    assert read[1] == str(tmp_path / "100%name o'clock")
    assert "FORMAT=%name" in read


def test_torchrun_wants_as_many_ranks_on_each_host() -> None:
    with pytest.raises(
        UserError, match=r"hosts: torchrun starts the same number of ranks on each host; .*processes_per_node"
    ):
        command("torchrun")
    assert command("torchrun", processes_per_node=2).world_size == 6


def test_torchrun_on_this_machine_takes_more_options_too() -> None:
    made = command("torchrun", hostfile=None, launcher_args=["--tee", "3"])
    assert made.argv[-2 - len(WORDS) - 1 :] == ["--tee", "3", "-m", *WORDS]


# Hosts


def test_nodes_and_processes_take_the_first_of_the_hostfile() -> None:
    made = command("mpi", nodes=2, processes_per_node=3)
    assert hostfile(made) == "n1 slots=3\nn2 slots=3\n"
    assert launchers.host_names(recipe("mpi", nodes=2)) == ["n1", "n2"]
    with pytest.raises(UserError, match=r"launch\.nodes: 4 requested, but hosts lists 3 hosts"):
        command("mpi", nodes=4)
    with pytest.raises(UserError, match=r"launch\.processes_per_node: 3 requested, but n3 has 2 slots in hosts"):
        command("mpi", processes_per_node=3)


@pytest.mark.parametrize("launcher", ["mpi", "deepspeed", "torchrun"])
def test_hosts_that_are_left(launcher: str) -> None:
    made = ranks_command(recipe(launcher, processes_per_node=2), WORDS, names=["n3", "n2"])
    assert made.world_size == 4
    assert "n1" not in " ".join([*made.argv, *made.files.values()])
    assert "n2" in [*made.argv, made.environment.get("MASTER_ADDR")] or "--master-addr n2" in made.argv[-1]


@pytest.mark.parametrize("launcher", ["mpi", "deepspeed", "torchrun"])
def test_the_users_meeting_place_and_threads(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    made = command(launcher, processes_per_node=2, master_addr="ib1", master_port=29507)
    everything = " ".join([*made.argv, *made.files.values(), *map("=".join, made.environment.items())])
    assert "ib1" in everything
    assert "29507" in everything
    assert "OMP_NUM_THREADS=3" in everything


@pytest.mark.parametrize("launcher", ["mpi", "deepspeed", "torchrun"])
def test_ranks_on_the_cpu_are_told_so(launcher: str) -> None:
    made = ranks_command(recipe(launcher, {"use_cpu": True}, processes_per_node=1), WORDS)
    everything = " ".join([*made.argv, *made.files.values(), *map("=".join, made.environment.items())])
    assert "DS_ACCELERATOR=cpu" in everything
    # One rank has all cores of its host.
    assert "OMP_NUM_THREADS" not in everything


# Files of the user's own in the working directory


@pytest.mark.parametrize("launcher", ["mpi", "deepspeed", "torchrun", "slurm"])
def test_python_does_not_search_the_working_directory(launcher: str) -> None:
    made = command(launcher, processes_per_node=2, watch="n1:5:secret")
    everything = [*made.files.values(), *made.argv, *map("=".join, made.environment.items())]
    assert any("PYTHONSAFEPATH=1" in text for text in everything)
    if launcher == "mpi":
        assert made.argv[made.argv.index("PYTHONSAFEPATH") - 1] == "-x"
    made = command(launcher, processes_per_node=2, environment={"PYTHONSAFEPATH": ""})
    everything = [*made.files.values(), *made.argv, *map("=".join, made.environment.items())]
    assert not any("PYTHONSAFEPATH=1" in text for text in everything), "a recipe may set it otherwise"


@pytest.mark.parametrize("launcher", ["mpi", "deepspeed", "torchrun"])
def test_the_users_pythonpath_reaches_the_other_hosts(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine:/too")
    made = command(launcher, processes_per_node=2)
    everything = [*made.files.values(), *made.argv, *map("=".join, made.environment.items())]
    assert any("PYTHONPATH=/mine:/too" in text for text in everything)
    made = command(launcher, processes_per_node=2, environment={"PYTHONPATH": "/other"})
    everything = [*made.files.values(), *made.argv, *map("=".join, made.environment.items())]
    assert any("PYTHONPATH=/other" in text for text in everything)


def test_deepspeed_does_not_put_the_working_directory_into_pythonpath(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runner does, unless the file of DS_ENV_FILE sets the variable."""
    assert "PYTHONPATH=\n" in command("deepspeed").files["out/launch/deepspeed_env"]
    (Path.home() / ".deepspeed_env").write_text("PYTHONPATH=/from/the/file\n")
    assert "PYTHONPATH=/from/the/file\n" in command("deepspeed").files["out/launch/deepspeed_env"]
