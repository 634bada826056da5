"""The commands that start ranks on several hosts: words, files, environment, and what is refused."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.ways import devices, launchers, local, reachability, remote, slurm
from launcher.ways.command import Command, rank_environment, wrapped
from launcher.ways.launchers import ranks_command
from launcher.ways.slurm import option_words
from sparse_zero.errors import UserError
from sparse_zero.ranks.network import address_towards, interface_towards
from sparse_zero.recipe.launch import LaunchSection
from sparse_zero.recipe.recipe import Recipe

WORDS = ["sparse_zero.train", "recipe.yaml", "training.seed=7"]
RANK = [sys.executable, "-u", "-m", *WORDS]


@pytest.fixture(autouse=True)
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


def recipe(launcher: str, training: dict[str, Any] | None = None, **launch: Any) -> Recipe:
    if launcher != "slurm":
        launch = {"hostfile": "hosts"} | launch
    raw = {"model": {"name": "m"}, "data": {"path": "d", "columns": {"text": "t", "label": "l"}}}
    raw |= {"launch": {"launcher": launcher} | launch, "training": {"output_dir": "out"} | (training or {})}
    return Recipe.model_validate(raw)


def command(launcher: str, words: list[str] = WORDS, watch: str | None = None, **launch: Any) -> Command:
    return ranks_command(recipe(launcher, **launch), words, watch)


def hostfile(made: Command) -> str:
    return made.files["out/launch/hostfile"]


# DeepSpeed's runner


def test_deepspeed_on_all_hosts() -> None:
    made = command("deepspeed")
    assert Path(made.argv[0]).name == "deepspeed"
    assert made.argv[1:] == [
        *("--hostfile", "out/launch/hostfile", "--launcher", "pdsh", "--master_addr", "n1", "--master_port", "4321"),
        *("--force_multi", "--log_level", "critical", "--module", *WORDS),
    ]
    assert hostfile(made) == "n1 slots=4\nn2 slots=4\nn3 slots=2\n"
    assert made.files["out/launch/deepspeed_env"] == "OMP_NUM_THREADS=2\n"
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


@pytest.mark.parametrize("value", ["a\nb", 'say "no"', "`ls`", "$HOME", "back\\slash"])
def test_a_variable_that_deepspeed_cannot_carry_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"launch\.environment: DeepSpeed's runner cannot pass ODD="):
        command("deepspeed", environment={"ODD": value})


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
    assert made.files["out/launch/deepspeed_env"] == "NCCL_DEBUG=WARN\nA=ours\nOMP_NUM_THREADS=2\n"


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


def torchrun(made: Command, hosts: str = "n1") -> list[str]:
    """The words that a shell on the host of number 1 makes of pdsh's command line."""
    assert made.argv[:-1] == ["pdsh", "-S", "-f", "1024", "-R", "ssh", "-w", hosts]
    # As pdsh does
    line = "%".join(part.replace("%n", "1") for part in made.argv[-1].split("%%"))
    return shlex.split(line)


def test_torchrun_over_pdsh() -> None:
    made = command("torchrun", include="n2@n1", watch="n1:5:secret", launcher_args=["--max-restarts", "0"])
    here = os.getcwd()
    assert torchrun(made, "n1,n2") == [
        *("cd", here, "&&", "exec", "env", "SPARSE_ZERO_WATCH=n1:5:secret", "OMP_NUM_THREADS=2"),
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


# Slurm


def test_srun_outside_of_a_job_asks_for_one() -> None:
    options = {"partition": "gpu", "time": "1:00:00", "exclusive": True, "mem_per_cpu": None, "requeue": False}
    made = command("slurm", nodes=2, processes_per_node=4, slurm=options, launcher_args=["--label"])
    assert made.argv == [
        *("srun", "--nodes", "2", "--ntasks", "8", "--ntasks-per-node", "4", "--kill-on-bad-exit=1"),
        *("--partition=gpu", "--time=1:00:00", "--exclusive", "--label", *RANK),
    ]
    assert (made.environment, made.files, made.world_size) == ({}, {}, 8)


def test_srun_within_a_job_takes_its_nodes_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"JOB_ID": "1", "JOB_NUM_NODES": "3", "GPUS_ON_NODE": "4", "NTASKS_PER_NODE": "1", "CPUS_PER_TASK": "6"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    made = command("slurm", slurm={"partition": "gpu"})
    assert made.argv == [
        *("srun", "--nodes", "3", "--ntasks", "12", "--ntasks-per-node", "4", "--kill-on-bad-exit=1"),
        *("--cpus-per-task=6", *RANK),
    ]
    fewer = slurm.slurm_command(LaunchSection(launcher="slurm", nodes=2), WORDS, use_cpu=True, nodes=["g1", "g3"])
    assert fewer.argv[1:9] == [
        *("--nodes", "2", "--ntasks", "8", "--ntasks-per-node", "4", "--nodelist", "g1,g3"),
    ]
    assert fewer.environment == {"OMP_NUM_THREADS": "6"}
    assert command("slurm", nodes=1).argv[1:5] == ["--nodes", "1", "--ntasks", "4"]
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert command("slurm").world_size == 6


def test_sruns_ranks_are_given_variables_by_its_environment() -> None:
    made = command("slurm", watch="n1:5:secret", environment={"A": "b"}, master_addr="ib1", master_port=29507)
    assert made.environment == {
        "A": "b",
        "SPARSE_ZERO_WATCH": "n1:5:secret",
        "MASTER_ADDR": "ib1",
        "MASTER_PORT": "29507",
    }
    assert "secret" not in " ".join(made.argv)


def test_options_by_their_long_names() -> None:
    options = {"ntasks_per_node": 2, "gres": "gpu:a100:4", "hold": True, "mem": None, "nice": False, "begin": 0}
    assert option_words(options) == ["--ntasks-per-node=2", "--gres=gpu:a100:4", "--hold", "--begin=0"]


def test_the_nodes_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "g[1-3]")
    shown = subprocess.CompletedProcess([], 0, stdout="g1\ng2\ng3\n")
    monkeypatch.setattr(launchers.subprocess, "run", lambda words, **_: shown if words[-1] == "g[1-3]" else None)
    assert launchers.host_names(recipe("slurm")) == ["g1", "g2", "g3"]
    assert launchers.host_names(recipe("slurm", nodes=2)) == ["g1", "g2"]
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    assert launchers.host_names(recipe("slurm")) == []


# What is common to all


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
    assert rank_environment(launch) == {"A": "given", "HERE": "as it is", "EMPTY": ""}
    assert rank_environment(launch, "n1:5:s")["SPARSE_ZERO_WATCH"] == "n1:5:s"


def test_a_commands_environment_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOES", "1")
    made = Command(["echo", "a b"], {"GOES": None, "COMES": "$x"}, {"deep/er/file": "secret\n"})
    assert "GOES" not in made.environ()
    assert made.environ()["COMES"] == "$x"
    assert made.shell() == "env -u GOES 'COMES=$x' echo 'a b'"
    made.write_files()
    assert Path("deep/er/file").read_text() == "secret\n"
    assert Path("deep/er/file").stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match=r"deep/er/file/x: cannot be written"):
        Command([], files={"deep/er/file/x": ""}).write_files()


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


# Reach


def test_hosts_that_do_not_answer_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'case "$0" in n1) exit 0;; n2) echo first >&2; echo "no route" >&2; exit 255;; *) exit 3;; esac'
    monkeypatch.setattr(reachability, "SSH", ["sh", "-c", script])
    assert reachability.unreachable_hosts(["n1", "n2", "n3"]) == {"n2": "no route", "n3": "sh exited with status 3"}
    assert reachability.unreachable_hosts([]) == {}
    monkeypatch.setattr(reachability, "SSH", ["no-such-program"])
    assert reachability.unreachable_hosts(["n1"]) == {"n1": "no-such-program: No such file or directory"}
    monkeypatch.setattr(reachability, "_SECONDS", 0.1)
    monkeypatch.setattr(reachability, "SSH", ["sh", "-c", "exec sleep 30"])
    assert reachability.unreachable_hosts(["n1"]) == {"n1": "no answer within 0.1 s"}


def test_mpirun_asks_no_ssh_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(reachability, "unreachable_hosts", lambda names: asked.append(list(names)) or {})
    monkeypatch.setattr(reachability.socket, "gethostname", lambda: "n1")
    launchers.unreachable(recipe("mpi"), ["n1", "localhost", "n2"])
    launchers.unreachable(recipe("deepspeed"), ["n1", "n2"])
    assert asked == [["n2"], ["n1", "n2"]]


def test_the_address_that_ranks_reach_this_process_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability.socket, "gethostname", lambda: "n1")
    monkeypatch.setattr(launchers, "address_towards", lambda towards: f"address towards {towards}")
    assert launchers.watching_address(recipe("deepspeed", hostfile=None), []) == "127.0.0.1"
    assert launchers.watching_address(recipe("deepspeed"), ["n1", "n2", "n3"]) == "address towards n2"
    assert launchers.watching_address(recipe("deepspeed"), ["n1"]) == "n1"
    assert launchers.watching_address(recipe("slurm"), []) == "n1"
    monkeypatch.undo()
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_towards("127.0.0.1") == "lo"
