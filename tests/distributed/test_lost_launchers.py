"""kill -9 of each process that starts the ranks of a run on one machine: the ranks save and stop at once, one line
names what was killed, and a run that had finished is no failure. tests/cluster/test_deaths.py has the other launchers,
and a training that saves when its command is killed.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import without_training
from recipes import write_recipe
from trainer_cases import zero_config

from sparse_zero.recipe.launch import Launcher

pytestmark = pytest.mark.distributed

TASK, SAVE_STEPS = "sequence-classification", 10
SECONDS = 240
"""Timeout of whatever a test waits for. Two ranks import, and share two cores with other tests."""
STOP_SECONDS = 60
"""From the kill to the end of the command. Ranks that nobody tells train on for launch.grace_seconds, 200 here."""
KILLED = r"was killed by SIGKILL \(possibly by the kernel, out of memory\)"
OF_RANK = r"the launcher of rank [01] on \S+ \(process {pid}\) was killed \(possibly out of memory\) or crashed"


class Run:
    """A run of `sparse-zero train` on two ranks, with a stand-in for the training."""

    def __init__(self, recipe: Path, launcher: Launcher, *words: str) -> None:
        self.output = recipe.parent / "out"
        self._console = recipe.parent / "console"
        here = [f"launch.launcher={launcher}", "launch.processes_per_node=2", "launch.grace_seconds=200"]
        here.append(f"training.output_dir={self.output}")
        command = [sys.executable, "-m", "launcher", "train", recipe, *here, *words]
        environment = os.environ | without_training.environment()
        with self._console.open("wb") as console:
            self.process = psutil.Popen(
                command, stdout=console, stderr=console, start_new_session=True, env=environment
            )

    @property
    def printed(self) -> str:
        return self._console.read_text(errors="replace")

    def below(self, *words: str) -> list[psutil.Process]:
        """The processes of the run, this one excluded, whose command lines begin with one of `words`."""
        found = []
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(word in " ".join(process.cmdline()[:4]) for word in words):
                    found.append(process)
        return found

    @property
    def ranks(self) -> list[psutil.Process]:
        return [rank for rank in self.below("-m sparse_zero.train") if "sparse_zero.train" in rank.cmdline()[3]]

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None, f"ended ({self.process.returncode}) before {what}:\n{self.printed}"
            assert time.monotonic() < deadline, f"{what}: not in time:\n{self.printed}"
            time.sleep(0.02)

    def wait_until_saved(self) -> None:
        self.wait_until(lambda: any(self.output.glob("checkpoint-*/manifest.json")), "a checkpoint")

    def end(self) -> int:
        return self.process.wait(timeout=SECONDS)

    @property
    def newest_step(self) -> int:
        return max(int(path.parent.name.partition("-")[2]) for path in self.output.glob("checkpoint-*/manifest.json"))


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; who its parent is now may not care."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def start(bases: dict[str, Path], data: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run; kills what is left of it at the end."""
    (tmp_path / "zero.json").write_text(json.dumps(zero_config(2)))
    training = {"deepspeed": "zero.json", "save_strategy": "steps", "save_steps": SAVE_STEPS, "disable_tqdm": True}
    training |= {"logging_steps": 1, "save_total_limit": 2, "max_steps": 100_000, "eval_on_start": False}
    recipe = write_recipe(tmp_path / "run.yaml", bases[TASK], TASK, data, training=training)
    started: list[Run] = []
    seen: list[psutil.Process] = []

    def start(launcher: Launcher, *words: str) -> Run:
        started.append(Run(recipe, launcher, *words))
        return started[-1]

    yield start
    for run in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen += [*run.process.children(recursive=True), run.process]
    for process in seen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.parametrize(
    ("launcher", "victim", "said"),
    [
        ("deepspeed", "bin/deepspeed", rf"deepspeed \(process {{pid}}\) {KILLED}"),
        ("local", "launcher.ways.local_ranks", rf"launcher.ways.local_ranks \(process {{pid}}\) {KILLED}"),
    ],
)
def test_the_ranks_of_a_killed_launcher_save_and_stop(
    start: Callable[..., Run], launcher: Launcher, victim: str, said: str
) -> None:
    run = start(launcher)
    run.wait_until_saved()
    [launching], ranks = run.below(victim), run.ranks
    assert len(ranks) == 2
    since = time.monotonic()
    launching.kill()
    status = run.end()
    assert time.monotonic() - since < STOP_SECONDS, run.printed
    assert status not in (0, 2, 75), run.printed
    # Of a killed runner, the command and the ranks below it may be the first to say so.
    reasons = "|".join(each.format(pid=launching.pid) for each in (said, OF_RANK))
    [error] = re.findall("sparse-zero: error: (.*)", run.printed)
    assert re.fullmatch(rf"(?:{reasons}); the ranks are asked to save and stop", error), error
    assert not any(map(runs, ranks))
    checkpoint = run.output / f"checkpoint-{run.newest_step}"
    assert f"sparse-zero: the run has not finished; resume it from {checkpoint} with --resume" in run.printed
    assert "Traceback" not in run.printed
    # The console of rank 0 may have gone with the launcher.
    log = (run.output / "logs" / "rank-00000.log").read_text()
    assert log.count(f"sparse-zero: stopped at step {run.newest_step}: saved {checkpoint}") == 1


def test_a_launcher_that_is_killed_after_its_run_has_finished_is_no_failure(start: Callable[..., Run]) -> None:
    run = start("deepspeed")
    run.wait_until_saved()
    [launching], ranks = run.below("bin/deepspeed"), run.ranks
    # Stopped, it cannot end with its ranks.
    launching.suspend()
    without_training.end(run.output)
    run.wait_until((run.output / "results.json").exists, "the results")
    run.wait_until(lambda: not any(map(runs, ranks)), "no rank")
    without_training.check(run.output, ranks=2)
    launching.kill()
    assert run.end() == 0, run.printed
    assert "sparse-zero: error" not in run.printed


def test_the_ranks_of_a_killed_agent_that_was_started_by_hand(
    start: Callable[..., Run], bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    training = {"deepspeed": "zero.json", "save_strategy": "steps", "save_steps": SAVE_STEPS, "max_steps": 100_000}
    (tmp_path / "zero.json").write_text(json.dumps(zero_config(2)))
    recipe = write_recipe(tmp_path / "run.yaml", bases[TASK], TASK, data, training=training)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (tmp_path / "console").open("wb") as console:
        agent = psutil.Popen(
            [*words, "-m", "sparse_zero.train", recipe],
            stdout=console,
            stderr=console,
            env=os.environ | without_training.environment(),
        )
    deadline = time.monotonic() + SECONDS
    try:
        while not any((tmp_path / "run").glob("checkpoint-*/manifest.json")):
            assert agent.poll() is None, (tmp_path / "console").read_text()
            assert time.monotonic() < deadline, (tmp_path / "console").read_text()
            time.sleep(0.05)
        ranks = agent.children()
    finally:
        children = agent.children(recursive=True)
        agent.kill()
    _, left = psutil.wait_procs(children, timeout=STOP_SECONDS)
    for process in left:
        process.kill()
    assert not left, (tmp_path / "console").read_text()
    assert len(ranks) == 2
    printed = (tmp_path / "console").read_text()
    assert len(re.findall(rf"sparse-zero: error: {OF_RANK.format(pid=agent.pid)}", printed)) == 1
    assert re.search(r"sparse-zero: stopped at step \d+: saved \S+; resume with --resume", printed), printed


def test_a_rank_that_hangs_for_good_is_named(start: Callable[..., Run]) -> None:
    run = start("local", "launch.grace_seconds=4")
    run.wait_until_saved()
    [hanging] = [rank for rank in run.ranks if rank.environ()["RANK"] == "1"]
    hanging.suspend()
    time.sleep(1)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    [error] = re.findall("sparse-zero: error: (.*)", run.printed)
    assert re.fullmatch(
        rf"rank 1 on \S+ \(process {hanging.pid}\) did not answer the request to stop within 4 s "
        rf"\(launch.grace_seconds\): all ranks are killed; its log is {run.output}/logs/rank-00001.log",
        error,
    ), error
    assert f"resume it from {run.output}/checkpoint-" in run.printed
    # Rank 0 waited for it, and says where.
    assert "Thread 0x" in (run.output / "logs" / "rank-00000.log").read_text()
