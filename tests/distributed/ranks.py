"""Starts ranks on this machine and leaves none behind.

run_ranks starts them through the launchers that users have; ForkServer forks them, which takes a tenth of a second.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_MARK = "SPARSE_ZERO_TEST_RUN"
"""An environment variable that marks every process of a run, also those that leave its session."""

ANSWER_SECONDS = 900
"""How long a request may take."""

ON_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class ForkServer:
    """The process of fork_server.py, which forks ranks. It starts with the first request and ends with this one.

    Forked ranks share the hash seed and numpy's random state, and skip the interpreter's exit. test_training_loops,
    test_train_recipe and test_bad_input start ranks as users do.
    """

    def __init__(self, errors: Path) -> None:
        """Args: errors: a file for what the process prints."""
        self._errors = errors
        self._process: subprocess.Popen[str] | None = None

    def run(self, jobs: dict[str, list[dict[str, Any]]], directory: Path) -> dict[str, list[dict[str, Any]]]:
        """Run all jobs, see fork_server.py. Returns: how each launch of each job ended.

        Args: directory: where to write jobs.json, ends.json and the ranks' output, ends/JOB-LAUNCH.log.
        """
        if self._process is None:
            self._process = self._start()
        (directory / "jobs.json").write_text(json.dumps(jobs))
        request = {"jobs": str(directory / "jobs.json"), "ends": str(directory / "ends.json")}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
        answer = self._process.stdout.readline().strip() if ready else f"no answer for {ANSWER_SECONDS} s"
        if answer != "done":
            self._end()  # the next request starts another one
        assert answer == "done", f"the fork server failed ({answer}):\n{self._errors.read_text()[-4000:]}"
        return json.loads((directory / "ends.json").read_text())

    def call(self, count: int, function: str, arguments: list[object], directory: Path) -> None:
        """Call "module:function" on `count` ranks. Raises AssertionError with their output if one of them fails."""
        spec = {"count": count, "call": function, "arguments": [str(argument) for argument in arguments]}
        [end] = self.run({"ranks": [spec]}, directory)["ranks"]
        hanging = f", ranks {end['hanging']} hang" if "hanging" in end else ""
        assert end["statuses"] == [0] * count, f"{end['statuses']}{hanging}; the ranks printed\n{end['log']}"

    def _start(self) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
        with self._errors.open("w") as errors:
            return subprocess.Popen(command, env=os.environ | ON_CPU, stderr=errors, **pipes)

    def _end(self) -> None:
        """End the process; a first signal lets it kill its ranks."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def close(self) -> None:
        if self._process is not None:
            self._end()


@dataclass(frozen=True)
class Run:
    """A launch that has ended as it should."""

    output: str
    """stdout and stderr of all ranks and of the launcher."""
    seconds: float
    left_over: list[str]
    """Command lines of the processes that were still there when the launcher had ended (they are gone now)."""


def run_ranks(
    count: int,
    script_or_module: str | Path,
    *arguments: object,
    launcher: str = "torchrun",
    status: int = 0,
    timeout: float = 240,
) -> Run:
    """Run a script (a Path) or a module (a str) on `count` ranks, on CPUs and over gloo.

    launcher: "torchrun", "torchrun script" (the console script: unlike `python -m`, it does not put the working
    directory on its own path), "deepspeed" (its runner), or "launcher.ways.torchrun" (ours, which keeps a rank's exit
    status).
    Raises AssertionError, with everything that was printed, where the exit status is not `status` or never comes.
    """
    __tracebackhide__ = True
    module = [] if isinstance(script_or_module, Path) else ["--module" if launcher == "deepspeed" else "-m"]
    command = [*_launch(launcher, count), *module, str(script_or_module), *map(str, arguments)]
    mark = uuid.uuid4().hex
    environment = os.environ | ON_CPU | {_MARK: mark}
    started = time.monotonic()
    # A file and not a pipe: a rank that outlives its launcher would hold the pipe open.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            seconds = time.monotonic() - started
            left_over = _end(mark)
            process.wait()
        output.seek(0)
        printed = output.read()
    ending = f"ended with status {process.returncode}" if seconds < timeout else f"was ended after {timeout} s"
    assert process.returncode == status, f"{' '.join(command)}\n{ending}; it printed\n{printed}"
    return Run(printed, seconds, left_over)


def _launch(launcher: str, count: int) -> list[str]:
    if launcher == "deepspeed":
        runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
        return [*runner, "--num_gpus", str(count), "--hostfile", os.devnull, "--master_port", str(_free_port())]
    agent = ["--standalone", "--nproc-per-node", str(count)]
    if launcher == "torchrun script":
        return [str(Path(sys.executable).with_name("torchrun")), *agent]
    module = {"torchrun": "torch.distributed.run", "launcher.ways.torchrun": "launcher.ways.torchrun"}[launcher]
    return [sys.executable, "-m", module, *agent]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end(mark: str) -> list[str]:
    """Kill every process of a run that does not end by itself. Returns their command lines."""
    started_here = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(_MARK) == mark:
                started_here.append(process)
    # Helpers of a rank (a resource tracker) see a moment later that it is gone.
    _, alive = psutil.wait_procs(started_here, timeout=2)
    left = []
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(" ".join(process.cmdline()))
            process.kill()
    return left
