"""A rank, a host or a cable goes: every other rank ends within a minute, and one message says which and where.

Ranks that really train are in two tests, and in tests/distributed/test_faults.py, at many points of the training.
The others have a stand-in for it: what differs in them is the launcher, and what dies.
"""

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import without_training
from lab import Hosts, need
from on_host import Command, wait_until
from workload import Workload

pytestmark = pytest.mark.cluster

SECONDS = 60
"""How long the last rank may take to end."""
SILENCE = 6
LAST_STEP = 100_000
"""No run gets there."""

WAYS = {
    "deepspeed": ("pdsh", ["sparse-zero", "train"], ["launcher=deepspeed", "hostfile=HOSTFILE"]),
    "mpi": ("mpi", ["sparse-zero", "train"], ["launcher=mpi", "hostfile=HOSTFILE"]),
    "torchrun": ("pdsh", ["sparse-zero", "train"], ["launcher=torchrun", "hostfile=HOSTFILE"]),
    "slurm": ("slurm", ["sparse-zero", "train"], ["launcher=slurm", "nodes=2"]),
    "srun by hand": ("slurm", ["srun", "-N2", "--ntasks-per-node=1", "python", "-m", "sparse_zero.train"], []),
}
"""By way: the part of the lab that it needs, the command, and keys of `launch`."""


def ranks_on(hosts: Hosts, name: str) -> list[psutil.Process]:
    """The ranks themselves, without the launchers, whose command lines name the same module."""
    found = []
    for process in hosts[name].processes("sparse_zero.train"):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = [word for word in process.cmdline()[1:4] if word != "-u"]
            if words[:2] == ["-m", "sparse_zero.train"] and "python" in process.name():
                found.append(process)
    return found


def kill_rank(hosts: Hosts, name: str) -> None:
    [rank] = ranks_on(hosts, name)
    rank.kill()


def kill_everything(hosts: Hosts, name: str) -> None:
    for process in hosts[name].strays():
        process.kill()


def power_off(hosts: Hosts, name: str) -> None:
    hosts[name].kill()


@pytest.fixture
def start(
    request: pytest.FixtureRequest, hosts: Hosts, workload: Workload, tmp_path: Path
) -> Callable[..., tuple[Command, Path]]:
    """Starts a long run on n1 and n2 and waits until it has a checkpoint. Returns: the command, its output.

    Where it trains, the run on one host comes before: it compiles DeepSpeed's operator if that has not been done.
    """

    def start(way: str, *keys: str, trains: bool = False) -> tuple[Command, Path]:
        part, command, launch = WAYS[way]
        need(part)
        if part == "slurm":
            request.getfixturevalue("slurm")
        if trains:
            request.getfixturevalue("one_host_losses")
        (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
        output = tmp_path / "out"
        words = [f"launch.{key.replace('HOSTFILE', str(tmp_path / 'hosts'))}" for key in launch]
        training = ["training.save_steps=20", "training.save_total_limit=2", f"training.max_steps={LAST_STEP}"]
        words += [f"training.output_dir={output}", *training, f"launch.silence_seconds={SILENCE}", *keys]
        env = {} if trains else without_training.environment(hosts.environment["PYTHONPATH"])
        run = hosts["n1"].start(*command, workload.recipe, *words, cwd=tmp_path, env=env)

        def has_saved() -> bool:
            assert run.status is None, f"{run}\nended ({run.status}); it printed\n{run.output}"
            return any(output.glob("checkpoint-*/manifest.json"))

        wait_until(has_saved, 240, f"{run} has saved")
        return run, output

    return start


def end(run: Command, hosts: Hosts, since: float) -> tuple[int, str]:
    """Status and output of a run whose ranks are all gone in time, on every host that still runs."""
    run.wait(SECONDS, status=None)
    wait_until(lambda: not any(ranks_on(hosts, name) for name in hosts), SECONDS, "all ranks have ended")
    assert time.monotonic() - since < SECONDS
    return run.status, run.output


@pytest.mark.parametrize(
    ("way", "harm", "victim", "said"),
    [
        ("deepspeed", kill_rank, "n2", r"rank 1 on n2 \(process \d+\) exited unexpectedly"),
        ("torchrun", kill_everything, "n2", r"rank 1 on n2 \(process \d+\) exited unexpectedly"),
        ("slurm", kill_rank, "n2", r"rank 1 on n2 \(process \d+\) exited unexpectedly"),
        ("srun by hand", kill_rank, "n2", r"rank 1 on n2 \(process \d+\) exited unexpectedly"),
        ("srun by hand", kill_rank, "n1", r"rank 0 on n1 exited unexpectedly"),
        ("torchrun", power_off, "n2", rf"n2 \(rank 1\) has not answered for {SILENCE} s"),
    ],
)
def test_all_ranks_end_with_one_message(
    way: str, harm: Callable[[Hosts, str], None], victim: str, said: str, hosts: Hosts, start: Callable
) -> None:
    run, output = start(way, trains=way == "deepspeed")
    since = time.monotonic()
    harm(hosts, victim)
    status, printed = end(run, hosts, since)
    assert status not in (0, 2, 75)
    assert len(re.findall(r"sparse-zero: error: ", printed)) == 1, printed
    assert re.search(rf"sparse-zero: error: {said}", printed), printed
    if victim == "n2":
        assert f"its log is {output}/logs/rank-00001.log" in printed
    assert "Traceback" not in printed
    print(f"{way}, {harm.__name__}: all ranks gone after {time.monotonic() - since:.1f} s")


def test_the_run_starts_again_on_the_host_that_is_left(hosts: Hosts, start: Callable) -> None:
    """The rank behind the cut cable ends by itself. A training that fewer ranks go on with: test_preemption.py."""
    run, output = start("deepspeed", "launch.max_restarts=2", "launch.min_nodes=1")
    since = time.monotonic()
    hosts["n2"].unplug()
    wait_until(lambda: not ranks_on(hosts, "n2"), SECONDS, "the rank on n2 has ended")
    run.wait_for("sparse-zero: restarting", SECONDS - (time.monotonic() - since))
    without_training.end(output)
    run.wait(120)
    [error] = re.findall("sparse-zero: error: (.*)", run.output)
    assert re.match(rf"n2 \(rank 1\) has not answered for {SILENCE} s", error)
    assert f"its log is {output}/logs/rank-00001.log" in run.output
    assert "Traceback" not in run.output
    assert "sparse-zero: restarting on n1 (restart 1 of 2)" in run.output
    assert without_training.check(output, ranks=1)[0] > 20, "resumed from a checkpoint"


def test_the_run_starts_again_on_all_hosts_after_a_rank_died(hosts: Hosts, start: Callable) -> None:
    run, output = start("mpi", "launch.max_restarts=1")
    kill_rank(hosts, "n2")
    run.wait_for(r"sparse-zero: restarting on n1, n2 \(restart 1 of 1\)")
    without_training.end(output)
    run.wait(120)
    assert without_training.check(output, ranks=2, hosts=2)[0] > 20, "resumed from a checkpoint"


def test_killing_the_command_ends_the_ranks_of_all_hosts_and_saves(hosts: Hosts, start: Callable) -> None:
    run, output = start("torchrun", trains=True)
    since = time.monotonic()
    run.process.kill()
    end(run, hosts, since)
    newest = max(int(path.parent.name.partition("-")[2]) for path in output.glob("checkpoint-*/manifest.json"))
    assert newest % 20, "a checkpoint that is no regular one: saved when the command was gone"


KILLED = r"was killed by SIGKILL \(possibly by the kernel, out of memory\)"
LOST = r"the launcher of rank {} on {} \(process {}\) was killed \(possibly out of memory\) or crashed"
SIGNALLED = "[a-z.]+ \\(process {2}\\) " + KILLED
LEFT_BEHIND = r"[a-z.]+ \(process \d+\) exited with status \d+ before its ranks"


def launching(hosts: Hosts, name: str, program: str) -> psutil.Process:
    """The oldest process of a host that is this program, or runs this module or script, without what names it only in
    a later word.
    """
    found = []
    for process in hosts[name].processes(program):
        with contextlib.suppress(psutil.NoSuchProcess):
            head = [word.rpartition("/")[2] for word in process.cmdline()[:4]]
            if program == head[0] or (head[0].startswith("python") and program in head):
                found.append(process)
    return min(found, key=lambda process: (process.create_time(), process.pid))


@pytest.mark.parametrize(
    ("way", "victim", "program", "said"),
    [
        ("deepspeed", "n1", "pdsh", rf"(?:{LEFT_BEHIND}|{LOST.format('[01]', 'n[12]', '[0-9]+')})"),
        ("deepspeed", "n1", "deepspeed.launcher.launch", LOST),
        ("torchrun", "n1", "pdsh", SIGNALLED),
        ("torchrun", "n2", "launcher.ways.torchrun", LOST),
    ],
)
def test_the_ranks_of_a_killed_launcher_save_and_stop(
    way: str, victim: str, program: str, said: str, hosts: Hosts, start: Callable
) -> None:
    # Ranks that nobody tells would go on for so long.
    run, output = start(way, "launch.grace_seconds=600")
    process = launching(hosts, victim, program)
    since = time.monotonic()
    inside = process_id_inside(process)
    process.kill()
    status, printed = end(run, hosts, since)
    assert status not in (0, 2, 75), printed
    [error] = re.findall("sparse-zero: error: (.*)", printed)
    said = said.format(int(victim == "n2"), victim, inside)
    assert re.fullmatch(rf"{said}; the ranks are asked to save and stop", error), printed
    newest = max(int(path.parent.name.partition("-")[2]) for path in output.glob("checkpoint-*/manifest.json"))
    # The console of rank 0 may have gone with the launcher.
    log = (output / "logs" / "rank-00000.log").read_text()
    assert f"sparse-zero: stopped at step {newest}: saved {output}/checkpoint-{newest}; resume with" in log
    assert (
        f"sparse-zero: the run has not finished; resume it from {output}/checkpoint-{newest} with --resume" in printed
    )
    assert "Traceback" not in printed
    print(f"{way}, {program} on {victim}: all ranks gone after {time.monotonic() - since:.1f} s")


@pytest.mark.parametrize(
    ("way", "victim", "program"), [("mpi", "n1", "mpirun"), ("mpi", "n2", "orted"), ("slurm", "n1", "srun")]
)
def test_killed_launchers_that_take_ranks_with_them(
    way: str, victim: str, program: str, hosts: Hosts, start: Callable
) -> None:
    """Open MPI and Slurm may end the ranks themselves, before they have saved. The last checkpoint is whole."""
    run, output = start(way, "launch.grace_seconds=600")
    process = launching(hosts, victim, program)
    since = time.monotonic()
    process.kill()
    status, printed = end(run, hosts, since)
    assert status not in (0, 2, 75), printed
    assert "sparse-zero: error: " in printed
    newest = max(int(path.parent.name.partition("-")[2]) for path in output.glob("checkpoint-*/manifest.json"))
    assert (
        f"sparse-zero: the run has not finished; resume it from {output}/checkpoint-{newest} with --resume" in printed
    )


def process_id_inside(process: psutil.Process) -> int:
    """The number of a process in its own host's namespace."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"^NSpid:.*\s(\d+)$", status, re.MULTILINE)[1])


def test_a_signal_to_one_rank_stops_all_and_saves(hosts: Hosts, start: Callable) -> None:
    run, _ = start("deepspeed")
    [rank] = ranks_on(hosts, "n2")
    rank.terminate()
    run.wait(SECONDS, status=75)
    assert run.output.count("sparse-zero: stopped at step") == 1
    assert "sparse-zero: error" not in run.output
