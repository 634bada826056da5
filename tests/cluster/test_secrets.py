"""Runs of every launcher, watched: the losses are those of one host, or the sums of a stand-in are right. No command
line on any host and no file that others can read has a secret. Strangers on the network learn nothing and end nothing.
"""

import contextlib
import json
import os
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import own_files
import psutil
import pytest
import without_training
import yaml
from lab import Hosts, need
from lab_slurm import Slurm
from on_host import Command, wait_until
from workload import RANKS, Workload, losses

pytestmark = pytest.mark.cluster

SECONDS = 180
STEPS, MANY_STEPS = 60, 100_000
LITERAL = "0123456789abcdef0123456789abcdef01234567"
INHERITED = "hf_" + "NotARealToken" * 2
ODD = 'it\'s "odd" $HOME `x` %n \\ 5ec2e7'
SECRETS = [LITERAL, INHERITED, "5ec2e7"]
WAYS = {
    "deepspeed with pdsh": ("pdsh", ["launcher=deepspeed", "hostfile=HOSTFILE"]),
    "deepspeed with openmpi": ("mpi", ["launcher=deepspeed", "multinode=openmpi", "hostfile=HOSTFILE"]),
    "mpi": ("mpi", ["launcher=mpi", "hostfile=HOSTFILE"]),
    "torchrun": ("pdsh", ["launcher=torchrun", "hostfile=HOSTFILE"]),
    "slurm": ("slurm", ["launcher=slurm", "nodes=2"]),
    "deepspeed here": ("hosts", ["launcher=deepspeed", "processes_per_node=2"]),
    "local": ("hosts", ["launcher=local", "processes_per_node=2"]),
}
"""By way: the part of the lab that it needs, and keys of `launch`."""
TRAINED_ELSEWHERE = ("deepspeed with openmpi", "slurm", "deepspeed here", "local")
"""Ways whose ranks have a stand-in for the training. It has the losses of one host where DeepSpeed's runner or mpirun
alone starts the ranks, in the job that is submitted below, and on local ranks in tests/distributed/test_compare.py.
"""
NO_SPACES = ("deepspeed with pdsh",)
"""Ways that refuse spaces in the names of directories."""

STRANGER = """
import contextlib, json, socket, sys
host, port = sys.argv[1], int(sys.argv[2])
hello = b'{"type": "hello", "token": "00", "rank": 1, "world_size": 2, "host": "n2", "pid": 1, "log": null}\\n'
bye = b'{"type": "bye", "status": 0, "message": "\\x1b[2Jgo"}\\n'
recorded = b'{"nonce": "00"}\\n' + b"0" * 64 + b" " + bye
for sent in (b"GET / HTTP/1.1\\r\\n\\r\\n", b"\\x00\\xff\\n", hello + bye, recorded, b"[" * 100_000, b"x" * (1 << 26)):
    with socket.create_connection((host, port), timeout=10) as connection:
        challenge = json.loads(connection.makefile("rb").readline())
        assert list(challenge) == ["challenge"], challenge
        with contextlib.suppress(OSError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b"", "the watchdog answers a stranger"
print("said all")
"""
STORE_READER = """
import sys
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore(sys.argv[1], int(sys.argv[2]), is_master=False, timeout=timedelta(seconds=120))
print("stored", store.get("attempt/0/watchdog").decode())
"""


@pytest.fixture
def recipe(workload: Workload, tmp_path: Path) -> Path:
    """The workload's recipe with three secrets: a literal one, one of the command's environment, and an odd one."""
    raw = yaml.safe_load(workload.recipe.read_text())
    raw["launch"] = {**raw.get("launch", {}), "environment": {"WANDB_API_KEY": LITERAL, "HF_TOKEN": None, "ODD": ODD}}
    changed = workload.recipe.with_name("secrets.yaml")
    changed.write_text(yaml.safe_dump(raw))
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    return changed


@pytest.fixture
def own_names_for_the_loopback(hosts: Hosts) -> Iterator[None]:
    """On n1 and n2, as Debian's installer writes /etc/hosts; gloo would give the others that address."""
    for name in ("n1", "n2"):
        own = hosts.root / f"hosts.{name}"
        lines = [line for line in (hosts.root / "etc" / "hosts").read_text().splitlines() if not line.endswith(name)]
        own.write_text("\n".join([*lines, f"127.0.1.1 {name}"]) + "\n")
        hosts[name].run("mount", "--bind", own, "/etc/hosts")
    yield
    for name in ("n1", "n2"):
        hosts[name].run("umount", "/etc/hosts")


def environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def command_lines(hosts: Hosts) -> Iterator[tuple[str, str]]:
    for name in hosts:
        for process in hosts[name].processes():
            try:
                yield name, " ".join(process.cmdline())
            except psutil.Error:
                continue


def ranks(hosts: Hosts) -> list[psutil.Process]:
    return [
        process
        for name in hosts
        for process in hosts[name].processes("-m sparse_zero.train")
        if "RANK" in environ(process)
        or "SLURM_PROCID" in environ(process)
        or "OMPI_COMM_WORLD_RANK" in environ(process)
    ]


def files_with_secrets(directory: Path, secrets: list[str]) -> list[Path]:
    found = []
    for file in (Path(where, name) for where, _, names in os.walk(directory) for name in names):
        try:
            if file.is_file() and file.stat().st_size < 1 << 20:
                text = file.read_bytes()
                found += [file] if any(secret.encode() in text for secret in secrets) else []
        except FileNotFoundError:
            continue
    return found


class Observation:
    """What a user of the hosts could see while a run goes on."""

    def __init__(self, hosts: Hosts, directory: Path) -> None:
        self.hosts, self.directory = hosts, directory
        self.looks = 0
        self.files: dict[str, int] = {}
        """Modes of the files that contained a secret, by name."""
        self.watchdog: tuple[str, str, str] | None = None
        """Host, port and secret of the roll call."""
        self.programs: set[str] = set()

    def look(self) -> None:
        self.looks += 1
        secrets = [*SECRETS, *([self.watchdog[2]] if self.watchdog else [])]
        for host, line in command_lines(self.hosts):
            self.programs |= {Path(word).name for word in line.split()[:1]}
            shown = [secret for secret in secrets if secret in line]
            assert not shown, f"{host}: {shown} in {line}"
        for file in files_with_secrets(self.directory, secrets):
            with_mode = stat.S_IMODE(file.stat().st_mode) if file.exists() else 0o600
            self.files[file.name] = with_mode
        for process in ranks(self.hosts):
            if self.watchdog is None and (address := environ(process).get("SPARSE_ZERO_WATCH")):
                self.watchdog = tuple(address.rsplit(":", 2))


def has_saved(run: Command, output: Path) -> bool:
    assert run.status is None, f"{run}\nended ({run.status}); it printed\n{run.output}"
    return any(output.glob("checkpoint-*/manifest.json"))


def same_losses(output: Path, one_host: dict[int, float], steps: int = STEPS) -> None:
    """All steps were made on two ranks, and the first ones have the losses of the run on one host."""
    found = losses(output)
    assert max(found) == steps
    assert {step: found[step] for step in one_host} == pytest.approx(one_host, abs=1e-5)
    assert json.loads((output / "results.json").read_text())["world_size"] == RANKS


@pytest.mark.parametrize("way", WAYS)
def test_nobody_sees_a_secret_and_strangers_end_nothing(
    way: str, request: pytest.FixtureRequest, hosts: Hosts, recipe: Path, tmp_path: Path, one_host_losses: dict
) -> None:
    """In a working directory with a space in its name, and with files that are called like modules."""
    part, keys = WAYS[way]
    need(part)
    if part == "slurm":
        request.getfixturevalue("slurm")
    if way == "torchrun":
        request.getfixturevalue("own_names_for_the_loopback")
    space = "_" if way in NO_SPACES else " "
    directory = tmp_path / f"my{space}project" if way in NO_SPACES else tmp_path / "my project; id"
    directory.mkdir()
    own_files.write(directory)
    output = directory / f"my{space}out"
    words = [recipe, f"training.output_dir={output.name}", "training.save_steps=20"]
    words += [f"launch.{key.replace('HOSTFILE', str(tmp_path / 'hosts'))}" for key in keys]
    trains = way not in TRAINED_ELSEWHERE
    words.append(f"training.max_steps={STEPS if trains else MANY_STEPS}")
    env = {"HF_TOKEN": INHERITED} | ({} if trains else without_training.environment(hosts.environment["PYTHONPATH"]))
    run = hosts["n1"].start("sparse-zero", "train", *words, cwd=directory, env=env)
    seen = Observation(hosts, tmp_path)

    def look_until_saved() -> bool:
        seen.look()
        return has_saved(run, output)

    wait_until(look_until_saved, SECONDS, f"{run} has saved", every=0.03)
    assert seen.looks > 10
    assert len(ranks(hosts)) == 2
    for rank in ranks(hosts):
        assert [environ(rank)[name] for name in ("WANDB_API_KEY", "HF_TOKEN", "ODD")] == [LITERAL, INHERITED, ODD]
    host, port, secret = seen.watchdog
    seen.look()  # for the roll call's secret too
    # n3 is no host of the run; a run on one machine does not listen to it at all.
    here = host == "127.0.0.1"
    assert here == way.endswith(("here", "local"))
    assert "said all" in hosts["n1" if here else "n3"].run("python", "-c", STRANGER, host, port).output
    if not trains:
        without_training.end(output)
    run.wait(SECONDS)
    seen.look()
    assert set(seen.files.values()) <= {0o600}, seen.files
    expects_a_file = way in ("deepspeed with pdsh", "deepspeed with openmpi", "torchrun")
    assert [name.partition(".")[0] for name in seen.files] == (["environment"] if expects_a_file else [])
    assert files_with_secrets(tmp_path, [*SECRETS, secret]) == []
    assert not list((output / "launch").glob("*")), "left of the run"
    if trains:
        same_losses(output, one_host_losses)
    else:
        without_training.check(output, RANKS, hosts=1 if here else 2)
    assert not any(secret in run.output for secret in (*SECRETS, secret))
    assert "\x1b" not in run.output
    if "pdsh" in WAYS[way][0]:
        assert {"pdsh", "ssh"} <= seen.programs, "it was looked at while they ran"
    warned = re.findall(
        r"sparse-zero: warning: .*WANDB_API_KEY looks like a secret: write WANDB_API_KEY: null", run.output
    )
    assert len(warned) == 1, run.output


def test_a_run_that_is_interrupted_while_it_starts_leaves_no_file(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    """After SIGKILL the next run in that directory removes the file."""
    need("pdsh")
    launch = ["launch.launcher=torchrun", f"launch.hostfile={tmp_path / 'hosts'}"]
    words = ["sparse-zero", "train", recipe, f"training.output_dir={tmp_path / 'out'}", *launch]

    def files() -> list[Path]:
        return list((tmp_path / "out" / "launch").glob("environment.*"))

    def interrupt(signum: int) -> None:
        before = files()
        run = hosts["n1"].start(*words, cwd=tmp_path, env={"HF_TOKEN": INHERITED})

        def has_written() -> bool:
            assert run.status is None, f"{run}\nended ({run.status}); it printed\n{run.output}"
            return bool(set(files()) - set(before))

        wait_until(has_written, SECONDS, "the file is written", every=0.005)
        run.process.send_signal(signum)
        run.wait(SECONDS, status=None)
        assert run.status != 0
        assert len(files()) == (signum == signal.SIGKILL)
        if signum != signal.SIGKILL:
            wait_until(lambda: not hosts.strays(), SECONDS, "what had started on the hosts has ended by itself")

    interrupt(signal.SIGINT)
    interrupt(signal.SIGKILL)
    hosts.end_strays(0)
    interrupt(signal.SIGTERM)
    assert files_with_secrets(tmp_path, SECRETS) == []


@pytest.mark.parametrize("way", ["srun", "mpirun", "torchrun"])
def test_ranks_that_were_started_by_hand(
    way: str, request: pytest.FixtureRequest, hosts: Hosts, workload: Workload, tmp_path: Path
) -> None:
    """Rank 0 runs the roll call. A stranger reads its place in torch's store, and nothing with which to join it.

    With a stand-in for the training: its losses are those of one host in the runs of these launchers above.
    """
    output = tmp_path / "out"
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    train = ["-m", "sparse_zero.train", workload.recipe, f"training.output_dir={output}"]
    train += [f"training.max_steps={MANY_STEPS}", "training.save_steps=20"]
    meeting, also = {"MASTER_ADDR": "n1", "MASTER_PORT": "29611"}, []
    modules = without_training.environment(hosts.environment["PYTHONPATH"])
    env = meeting | modules
    if way == "srun":
        request.getfixturevalue("slurm")
        run = hosts["n1"].start("srun", "-N2", "--ntasks-per-node=1", "python", *train, cwd=tmp_path, env=env)
    elif way == "mpirun":
        need("mpi")
        pass_on = [word for name in env for word in ("-x", name)]
        start = ["mpirun", "-np", "2", "--hostfile", tmp_path / "hosts", *pass_on]
        run = hosts["n1"].start(*start, "python", *train, cwd=tmp_path, env=env)
    else:
        place = ["--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "n1", "--master-port", meeting["MASTER_PORT"]]
        agents = [
            hosts[name].start("torchrun", *place, "--node-rank", rank, *train, env=modules)
            for rank, name in enumerate(["n1", "n2"])
        ]
        run = agents[0]
        also = agents[1:]
    reader = hosts["n3"].start("python", "-c", STORE_READER, *meeting.values())
    modes: dict[str, int] = {}

    def look_until_read() -> bool:
        assert run.status is None, f"{run}\nended ({run.status}); it printed\n{run.output}"
        for file in (output / "launch").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                modes[file.name] = stat.S_IMODE(file.stat().st_mode)
        return "stored" in reader.output

    wait_until(look_until_read, SECONDS, f"{reader} has read the store", every=0.005)
    stored = json.loads(re.search("stored (.*)", reader.output)[1])
    host, port, name = stored
    assert re.fullmatch(r"watchdog\.n1\.\d+", name), stored
    assert "said all" in hosts["n3"].run("python", "-c", STRANGER, host, port).output
    without_training.end(output)
    for command in (run, *also):
        command.wait(SECONDS)
    without_training.check(output, RANKS, hosts=2)
    assert set(modes.values()) <= {0o600}, modes
    assert not (output / "launch").exists(), "removed when all had joined"


def test_a_submitted_job_gets_the_values_in_its_environment(
    slurm: Slurm, recipe: Path, tmp_path: Path, one_host_losses: dict[int, float]
) -> None:
    """The script, which everyone can read, has the names. In a directory with a space in its name."""
    directory = tmp_path / "my project; id"
    directory.mkdir()
    output = directory / "my out"
    words = [recipe, "training.output_dir=my out", "training.run_name=it's $(id)"]
    words += ["launch.nodes=2", f"launch.environment.GIVEN={LITERAL[::-1]}"]
    submit = ["sparse-zero", "submit", *words, "--partition", "main", "--comment=x;id $HOME"]
    said = slurm.run(*submit, cwd=directory, env={"HF_TOKEN": INHERITED}).output
    secrets = [*SECRETS, LITERAL[::-1]]
    assert not any(secret in said for secret in secrets)
    script = (output / "submit.sbatch").read_text()
    assert "launch.environment.GIVEN=null" in script
    job = int(re.search(r"job (\d+) submitted", said)[1])
    assert f"slurm-{job}.log" in said
    found: list[str] = []

    def look_for_ranks() -> bool:
        for host, line in command_lines(slurm.hosts):
            assert not any(secret in line for secret in secrets), f"{host}: {line}"
        found[:] = [environ(rank).get("GIVEN", "") for rank in ranks(slurm.hosts)]
        return len(found) == 2 and all(found)

    wait_until(look_for_ranks, SECONDS, "two ranks have started", every=0.02)
    assert found == [LITERAL[::-1]] * 2
    slurm.wait(job, SECONDS)
    assert files_with_secrets(tmp_path, secrets) == []
    same_losses(output, one_host_losses, len(one_host_losses))
