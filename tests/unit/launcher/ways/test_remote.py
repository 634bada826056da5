"""The commands that start ranks on the hosts of a hostfile: words, files, environment, and errors."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch_cases import RANK, WORDS, command, hostfile, recipe, torchrun

from launcher.ways import launchers, private_environment
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


@pytest.mark.parametrize("multinode", ["pdsh", "openmpi"])
@pytest.mark.parametrize("value", ["a\nb", 'say "no"', "`ls`", "$HOME", "back\\slash", "it's %n", " two  words ", ""])
def test_deepspeed_takes_any_value_to_the_other_hosts_by_a_file(value: str, multinode: str) -> None:
    made = command("deepspeed", environment={"ODD": value}, multinode=multinode, watch="n1:5:secret")
    shown = [*made.argv, *made.files.values(), *map(str, made.environment.items())]
    assert not any("secret" in text or (value and value in text) for text in shown if "ODD" in text)
    print_it = [sys.executable, "-c", "import os; print(ascii([os.environ['ODD'], os.environ['SPARSE_ZERO_WATCH']]))"]
    with made.written_files():
        if multinode == "pdsh":
            # As the runner and pdsh do; a host's shell gets one line
            exports = [line.split("=", maxsplit=1) for line in made.files["out/launch/deepspeed_env"].splitlines()]
            quoted = [(name, f'"{text}"' if set("$ ") & set(text) else text) for name, text in exports]
            line = "".join(f"export {name}={text}; " for name, text in quoted).replace("%%", "%")
            words = ["sh", "-c", line + shlex.join(print_it)]
        else:
            words = [*made.argv[made.argv.index("--no_python") + 1 : -len(RANK)], *print_it]
        done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout == ascii([value, "n1:5:secret"]) + "\n", done.stderr


def test_a_host_that_does_not_see_the_file_does_not_start_deepspeeds_launcher() -> None:
    made = command("deepspeed", environment={"A": "b"})
    first = next(line for line in made.files["out/launch/deepspeed_env"].splitlines() if "ENVIRONMENT=" in line)
    name, text = first.split("=", maxsplit=1)
    done = subprocess.run(
        ["sh", "-c", f'export {name}="{text.replace("%%", "%")}"; echo started'], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
    assert f"cannot read {made.private_file}: training.output_dir must be on a disk" in done.stderr


def test_what_the_runner_would_forward_by_itself_travels_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "5ec2e7")
    for multinode in ("pdsh", "openmpi"):
        made = command("deepspeed", multinode=multinode)
        assert made.private == {"MLFLOW_TRACKING_PASSWORD": "5ec2e7"}
        assert "MLFLOW_TRACKING_PASSWORD" not in made.environ()
        assert "5ec2e7" not in repr([made.argv, made.environment, made.files, made.shown_files()])


def test_a_value_that_a_shell_would_shorten_is_refused_without_being_shown() -> None:
    with pytest.raises(UserError, match=r"launch\.environment: ODD ends with a line break") as error:
        command("deepspeed", environment={"ODD": "5ec2e7\n"})
    assert "5ec2e7" not in str(error.value)
    assert command("deepspeed", environment={"ODD": "5ec2e7\n"}, multinode="openmpi").private["ODD"] == "5ec2e7\n"


def test_deepspeed_with_openmpi_would_add_quotes_to_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/two words")
    assert "PYTHONPATH=/two words\n" in command("deepspeed").files["out/launch/deepspeed_env"]
    with pytest.raises(UserError, match=r"PYTHONPATH='/two words': DeepSpeed's runner cannot pass it"):
        command("deepspeed", multinode="openmpi")


def test_pdsh_does_not_replace_a_part_of_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/50%n")
    assert "PYTHONPATH=/50%%n\n" in command("deepspeed").files["out/launch/deepspeed_env"]


@pytest.mark.parametrize("line", ["A;id;B=1", "$(id)=1", "-x=1", "A B=1", "=1"])
def test_deepspeeds_own_file_cannot_name_a_command(tmp_path: Path, line: str) -> None:
    """The runner writes `export NAME=VALUE; ` into the command line of every host."""
    (tmp_path / ".deepspeed_env").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env: .* cannot be a variable"):
        command("deepspeed")


def test_a_command_in_deepspeeds_own_file_is_a_value(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("A=$(id)\n")
    made = command("deepspeed")
    assert made.private == {"A": "$(id)"}
    assert "$(id)" not in made.files["out/launch/deepspeed_env"]


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
    assert made.private == {"NCCL_DEBUG": "WARN", "A": "ours"}
    assert made.files["out/launch/deepspeed_env"].startswith(
        "PYTHONPATH=\nPYTHONSAFEPATH=1\nOMP_NUM_THREADS=2\nSPARSE_ZERO_ENVIRONMENT=$([ -r "
    )
    assert "WARN" not in made.files["out/launch/deepspeed_env"]


@pytest.mark.parametrize("directory", ["home", "elsewhere"])
def test_deepspeeds_own_variables_may_stand_in_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str
) -> None:
    (tmp_path / directory).mkdir(exist_ok=True)
    (tmp_path / directory / "my_env").write_text("A=b\n")
    monkeypatch.setenv("DS_ENV_FILE", "my_env" if directory == "home" else str(tmp_path / directory / "my_env"))
    assert command("deepspeed").private == {"A": "b"}


def test_more_options_for_what_deepspeed_starts() -> None:
    made = command("deepspeed", multinode="openmpi", launcher_args=["--mca", "x", "a b"])
    assert "--launcher_args=--mca x 'a b'" in made.argv
    assert made.argv[made.argv.index("--launcher") + 1] == "openmpi"


# mpirun


def test_mpirun() -> None:
    made = command("mpi", watch="n1:5:secret", environment={"A": "b c"}, launcher_args=["--mca", "x", "y"])
    variables = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "4321"}
    private = {"A": "b c", "SPARSE_ZERO_WATCH": "n1:5:secret"}
    assert made.argv == [
        *("mpirun", "--quiet", "-np", "10", "--hostfile", "out/launch/hostfile", "--bind-to", "none"),
        *(word for name in (*variables, *private) for word in ("-x", name)),
        *("--mca", "x", "y", *RANK),
    ]
    assert (made.environment, made.private, made.private_file) == (variables, private, None)
    assert made.environ()["A"] == "b c"
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
        *("cd", here, "&&", *shlex.split(private_environment.read(made.private_file)), "&&"),
        *("exec", "env", "PYTHONSAFEPATH=1", "OMP_NUM_THREADS=2"),
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
    assert made.private == {"SPARSE_ZERO_WATCH": "n1:5:secret"}
    assert made.private_file.parent == Path(here) / "out" / "launch"
    assert "secret" not in " ".join(made.argv)


def test_torchrun_takes_any_word_to_the_other_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "100%name o'clock").mkdir()
    (tmp_path / "100%name o'clock" / "hosts").write_text("n1 slots=1\n")
    monkeypatch.chdir(tmp_path / "100%name o'clock")
    odd = ["sparse_zero.train", "a.b=it's [a] %n %% %h", 'c.d="$HOME"', "e.f=\n"]
    made = command("torchrun", odd, environment={"FORMAT": "%name"})
    read = torchrun(made)
    assert read[-4:] == odd
    assert read[1] == str(tmp_path / "100%name o'clock")
    assert made.private == {"FORMAT": "%name"}
    assert str(made.private_file) in read


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
    assert not any("/mine:/too" in text for text in everything)
    assert made.private == {"PYTHONPATH": "/other"}


def test_deepspeed_does_not_put_the_working_directory_into_pythonpath(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runner does, unless the file of DS_ENV_FILE sets the variable."""
    assert "PYTHONPATH=\n" in command("deepspeed").files["out/launch/deepspeed_env"]
    (Path.home() / ".deepspeed_env").write_text("PYTHONPATH=/from/the/file\n")
    made = command("deepspeed")
    assert made.private == {"PYTHONPATH": "/from/the/file"}
    assert "PYTHONPATH=\n" not in made.files["out/launch/deepspeed_env"]
